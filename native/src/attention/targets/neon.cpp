// The kernel for NEON (every 64-bit ARM).

#if defined(__aarch64__)

#include "attention/call.h"

#include <cmath>
#include <cstring>
#include <arm_neon.h>

#define INTACTKV_X86 0
#define INTACTKV_ARM 1

namespace intactkv {
namespace {
#include "attention/lanes/simd-inl.h"
#include "attention/lanes/blocks-inl.h"
#include "attention/lanes/gemm-inl.h"
#include "attention/lanes/rows-inl.h"
#include "attention/kernel/kernel-inl.h"
} // namespace

extern const fused_kernel fused_neon;
const fused_kernel fused_neon = { "neon", run, rotate, widen, narrow };

} // namespace intactkv

#endif
