// The kernel for AVX2, FMA and F16C.

#if defined(__x86_64__)

#include "attention/call.h"

#include <cmath>
#include <cstring>
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define INTACTKV_X86 2
#define INTACTKV_ARM 0

namespace intactkv {
namespace {
#include "attention/lanes/simd-inl.h"
#include "attention/lanes/blocks-inl.h"
#include "attention/lanes/gemm-inl.h"
#include "attention/lanes/rows-inl.h"
#include "attention/kernel/kernel-inl.h"
} // namespace

extern const fused_kernel fused_avx2;
const fused_kernel fused_avx2 = { "avx2", run, rotate, widen, narrow };

} // namespace intactkv

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
