// The kernel for AVX2, FMA and F16C.

#if defined(__x86_64__)

#define INTACTKV_X86 2
#define INTACTKV_TARGET fused_avx2
#define INTACTKV_NAME "avx2"
#include "attention/targets/before_pragma.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "attention/kernel/kernel-inl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
