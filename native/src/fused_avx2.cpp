// The kernel for AVX2, FMA and F16C.

#if defined(__x86_64__)

#include "fused_call.h"

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
#include "fused_simd.h"
#include "fused_blocks.h"
#include "fused_gemm.h"
#include "fused_rows.h"
#include "fused_kernel.h"
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
