// The kernel for AVX-512 with VNNI.

#if defined(__x86_64__)

#include "attention/call.h"

#include <cmath>
#include <cstring>

// GCC's own header initializes "undefined" vectors with themselves.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

#define INTACTKV_X86 4
#define INTACTKV_ARM 0

namespace intactkv {
namespace {
#include "attention/lanes/simd-inl.h"
#include "attention/lanes/blocks-inl.h"
#include "attention/lanes/gemm-inl.h"
#include "attention/lanes/rows-inl.h"
#include "attention/kernel/kernel-inl.h"
} // namespace

extern const fused_kernel fused_avx512vnni;
const fused_kernel fused_avx512vnni = { "avx512vnni", run, rotate, widen, narrow };

} // namespace intactkv

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
