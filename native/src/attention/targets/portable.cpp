// The kernel in portable C++: the compiler's own vectors, no intrinsics.

#define INTACTKV_TARGET fused_portable
#define INTACTKV_NAME "portable"
#include "attention/targets/before_pragma.h"

#include "attention/kernel/kernel-inl.h"
