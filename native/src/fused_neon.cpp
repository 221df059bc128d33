// The kernel for NEON (every 64-bit ARM).

#if defined(__aarch64__)

#include "fused_call.h"

#include <cmath>
#include <cstring>
#include <arm_neon.h>

#define INTACTKV_X86 0
#define INTACTKV_ARM 1

namespace intactkv {
namespace {
#include "fused_simd.h"
#include "fused_blocks.h"
#include "fused_gemm.h"
#include "fused_rows.h"
#include "fused_kernel.h"
} // namespace

extern const fused_kernel fused_neon;
const fused_kernel fused_neon = { "neon", run, rotate, widen, narrow };

} // namespace intactkv

#endif
