// The kernel for NEON with dot products (Armv8.2).

#if defined(__aarch64__)

#define INTACTKV_ARM 2
#define INTACTKV_TARGET fused_neon_dotprod
#define INTACTKV_NAME "neon-dotprod"
#include "attention/targets/before_pragma.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#include "attention/kernel/kernel-inl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
