// The kernel for NEON with dot products (Armv8.2).

#if defined(__aarch64__)

#include "attention/call.h"

#include <cmath>
#include <cstring>
#include <arm_neon.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#define INTACTKV_X86 0
#define INTACTKV_ARM 2

namespace intactkv {
namespace {
#include "attention/lanes/simd-inl.h"
#include "attention/lanes/blocks-inl.h"
#include "attention/lanes/gemm-inl.h"
#include "attention/lanes/rows-inl.h"
#include "attention/kernel/kernel-inl.h"
} // namespace

extern const fused_kernel fused_neon_dotprod;
const fused_kernel fused_neon_dotprod = { "neon-dotprod", run, rotate, widen, narrow };

} // namespace intactkv

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
