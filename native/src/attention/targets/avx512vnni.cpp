// The kernel for AVX-512 with VNNI.

#if defined(__x86_64__)

#define INTACTKV_X86 4
#define INTACTKV_TARGET fused_avx512vnni
#define INTACTKV_NAME "avx512vnni"
#include "attention/targets/before_pragma.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                                          \
        __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

#include "attention/kernel/kernel-inl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
