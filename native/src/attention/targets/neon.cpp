// The kernel for NEON (every 64-bit ARM).

#if defined(__aarch64__)

#define INTACTKV_ARM 1
#define INTACTKV_TARGET fused_neon
#define INTACTKV_NAME "neon"
#include "attention/targets/before_pragma.h"

#include "attention/kernel/kernel-inl.h"

#endif
