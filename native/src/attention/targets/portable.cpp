// The kernel in portable C++: the compiler's own vectors, no intrinsics.

#include "attention/call.h"

#include <cmath>
#include <cstring>

#define INTACTKV_X86 0
#define INTACTKV_ARM 0

namespace intactkv {
namespace {
#include "attention/lanes/simd-inl.h"
#include "attention/lanes/blocks-inl.h"
#include "attention/lanes/gemm-inl.h"
#include "attention/lanes/rows-inl.h"
#include "attention/kernel/kernel-inl.h"
} // namespace

extern const fused_kernel fused_portable;
const fused_kernel fused_portable = { "portable", run, rotate, widen, narrow };

} // namespace intactkv
