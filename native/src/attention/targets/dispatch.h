// What is compiled for each instruction set, all from the same source, and which of them is used.

#pragma once

#include <cstdint>

#include "attention/call.h"

namespace intactkv {

struct fused_target {
    const char * isa;

    // Computes this thread's share of the items (kernel/kernel-inl.h).
    void (*run)(const fused_call & call, int ith, int nth);

    // In-place product of each block of n values with the orthonormal Walsh-Hadamard matrix, as upstream's
    // GGML_HINT_SRC0_IS_HADAMARD: the same sums, the same bits. n: a power of 2, n_values a multiple of it.
    void (*rotate)(float * x, int64_t n_values, int n);

    // F16 values to F32. n_values: a multiple of 16.
    void (*widen)(const uint16_t * x, float * out, int64_t n_values);

    // F32 values to F16 or to blocks of Q8_0, as upstream rounds them on x86; to blocks of 4 and 5 bits with the scale
    // of the smallest error (simd/fit-inl.h), the same bits everywhere. false: not this type, or not here.
    // n_values: a multiple of 16, of 32 for blocks.
    bool (*narrow)(ggml_type type, const float * x, void * out, int64_t n_values);
};

#if defined(__x86_64__)
extern const fused_target fused_avx512vnni;
extern const fused_target fused_avx512;
extern const fused_target fused_avx2;
#elif defined(__aarch64__)
extern const fused_target fused_neon_dotprod;
extern const fused_target fused_neon;
#endif
extern const fused_target fused_portable;

// The best this machine has, or the one that INTACTKV_ISA names.
const fused_target & fused_chosen();

// Another choice for later calls, by name; nullptr: the best. false: this machine has not got it. For tests.
bool fused_choose(const char * isa);

// The name of the chosen one: "avx512vnni", "avx512", "avx2", "neon-dotprod", "neon" or "portable".
const char * fused_isa();

} // namespace intactkv
