// Rows on their way into the cache: rotated by a Hadamard matrix, rounded to its type.
//
// Compiled once per instruction set, inside its anonymous namespace: see kernel/kernel-inl.h.

#pragma once

#include "attention/simd/blocks-inl.h"
#include "attention/simd/fit-inl.h"
#include "attention/simd/vector-inl.h"

namespace intactkv {
namespace {

// x[i ^ D] in lane i
template <int D> inline vf across(vf x) {
#if INTACTKV_X86 >= 3
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(_mm512_xor_si512(lane, _mm512_set1_epi32(D)), x);
#elif INTACTKV_X86 == 2
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_permutevar8x32_ps(x, _mm256_xor_si256(lane, _mm256_set1_epi32(D)));
#else
    vf r;
    for (int i = 0; i < W; i++) {
        r[i] = x[i ^ D];
    }
    return r;
#endif
}

// Sums and differences of lanes D apart.
template <int D> inline vf butterfly(vf x) {
    vi sign;
    for (int i = 0; i < W; i++) {
        sign[i] = i & D ? INT32_MIN : 0;
    }
    return across<D>(x) + as_float(as_int(x) ^ sign);
}

inline void rotate(float * x, int64_t n_values, int n) {
    const float scale = 1.0f / __builtin_sqrtf((float) n);
    for (float * b = x; b < x + n_values; b += n) {
        for (int i = 0; i < n; i += W) {
            vf v = butterfly<2>(butterfly<1>(load(b + i) * scale));
            if constexpr (W >= 8) {
                v = butterfly<4>(v);
            }
            if constexpr (W >= 16) {
                v = butterfly<8>(v);
            }
            store(b + i, v);
        }
        for (int h = W; h < n; h *= 2) {
            for (int i = 0; i < n; i += 2 * h) {
                for (int j = i; j < i + h; j += W) {
                    const vf u = load(b + j), w = load(b + j + h);
                    store(b + j, u + w);
                    store(b + j + h, u - w);
                }
            }
        }
    }
}

inline void widen(const uint16_t * x, float * out, int64_t n_values) {
    for (int64_t i = 0; i < n_values; i += W) {
        store(out + i, load_f16(x + i));
    }
}

#if INTACTKV_X86 >= 2 || INTACTKV_ARM
inline void store_f16(uint16_t * p, vf a) {
#if INTACTKV_X86 >= 3
    _mm256_storeu_si256((__m256i *) p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
#elif INTACTKV_X86 == 2
    _mm_storeu_si128((__m128i *) p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
#else
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a)));
#endif
}

// A block of Q8_0: the scale at F16, 32 bytes.
inline void store_q8_0(uint8_t * p, const float * x) {
    const float amax = largest_of(x);
    uint16_t scale[W];
    store_f16(scale, set1(amax / 127.0f));
    memcpy(p, scale, sizeof(uint16_t));
    const float inv = amax != 0.0f ? 127.0f / amax : 0.0f;
    for (int i = 0; i < QK; i += W) {
        store_u8(p + 2 + i, nearest(load(x + i) * inv));
    }
}

#endif

inline bool narrow(ggml_type type, const float * x, void * out, int64_t n_values) {
    switch (type) {
#if INTACTKV_X86 >= 2 || INTACTKV_ARM
        case GGML_TYPE_F16:
            for (int64_t i = 0; i < n_values; i += W) {
                store_f16((uint16_t *) out + i, load(x + i));
            }
            return true;
        case GGML_TYPE_Q8_0:
            for (int64_t i = 0; i < n_values / QK; i++) {
                store_q8_0((uint8_t *) out + i * block<GGML_TYPE_Q8_0>::bytes, x + i * QK);
            }
            return true;
#endif
        case GGML_TYPE_Q4_0: return narrow_fitted<GGML_TYPE_Q4_0>(x, out, n_values), true;
        case GGML_TYPE_Q4_1: return narrow_fitted<GGML_TYPE_Q4_1>(x, out, n_values), true;
        case GGML_TYPE_Q5_0: return narrow_fitted<GGML_TYPE_Q5_0>(x, out, n_values), true;
        case GGML_TYPE_Q5_1: return narrow_fitted<GGML_TYPE_Q5_1>(x, out, n_values), true;
        case GGML_TYPE_IQ4_NL: return narrow_fitted<GGML_TYPE_IQ4_NL>(x, out, n_values), true;
        default: return false;
    }
}

} // namespace
} // namespace intactkv
