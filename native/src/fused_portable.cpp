// The kernel in portable C++: the compiler's own vectors, no intrinsics.

#include "fused_call.h"

#include <cmath>
#include <cstring>

#define INTACTKV_X86 0
#define INTACTKV_ARM 0

namespace intactkv {
namespace {
#include "fused_simd.h"
#include "fused_blocks.h"
#include "fused_gemm.h"
#include "fused_rows.h"
#include "fused_kernel.h"
} // namespace

extern const fused_kernel fused_portable;
const fused_kernel fused_portable = { "portable", run, rotate, widen, narrow };

} // namespace intactkv
