// The KV types: how a row of K or V becomes numbers. Layouts as in ggml-common.h of the pinned source.
//
// A quantized block is 32 values: value = scale * n + low, with n an integer of a few bits. For the unsigned types
// (4 and 5 bits) V uses n as stored and folds the offset into `low`; K needs signed bytes.
//
// Compiled once per instruction set, inside its anonymous namespace: see kernel/kernel-inl.h.

#pragma once

#include "attention/simd/vector-inl.h"

namespace intactkv {
namespace {

constexpr int QK = 32;

// The largest absolute value of a block's QK floats.
inline float largest_of(const float * x) {
    vf top = {};
    for (int i = 0; i < QK; i += W) {
        top = max(top, as_float(as_int(load(x + i)) & 0x7fffffff));
    }
    return max_of(top);
}

template <ggml_type T> struct block;

template <> struct block<GGML_TYPE_F16> {
    static constexpr int bytes = 2 * QK, head = 0, offset = 0;
    static constexpr bool quant = false, min = false;
};
template <> struct block<GGML_TYPE_BF16> {
    static constexpr int bytes = 2 * QK, head = 0, offset = 0;
    static constexpr bool quant = false, min = false;
};
template <> struct block<GGML_TYPE_Q8_0> {
    static constexpr int bytes = 34, head = 2, offset = 0;
    static constexpr bool quant = true, min = false;
};
template <> struct block<GGML_TYPE_Q4_0> {
    static constexpr int bytes = 18, head = 2, offset = 8;
    static constexpr bool quant = true, min = false;
};
template <> struct block<GGML_TYPE_Q4_1> {
    static constexpr int bytes = 20, head = 4, offset = 0;
    static constexpr bool quant = true, min = true;
};
template <> struct block<GGML_TYPE_Q5_0> {
    static constexpr int bytes = 22, head = 6, offset = 16;
    static constexpr bool quant = true, min = false;
};
template <> struct block<GGML_TYPE_Q5_1> {
    static constexpr int bytes = 24, head = 8, offset = 0;
    static constexpr bool quant = true, min = true;
};
template <> struct block<GGML_TYPE_IQ4_NL> {
    static constexpr int bytes = 18, head = 2, offset = 0;
    static constexpr bool quant = true, min = false;
};

// A KV type as a constant.
template <ggml_type T> struct kv_type {
    static constexpr ggml_type type = T;
};

// Calls f(kv_type<type>{}): here a number becomes code, and nowhere else. It stands here and not beside FUSED_TYPES
// (call.h), because a function that is not compiled for the target cannot take in one that is.
template <int I = 0, typename F> inline void for_type(ggml_type type, const F & f) {
    if constexpr (I < FUSED_N_TYPES) { // fused_supported() lets no other type through
        if (type == FUSED_TYPES[I]) {
            f(kv_type<FUSED_TYPES[I]>{});
        } else {
            for_type<I + 1>(type, f);
        }
    }
}

template <ggml_type T> constexpr bool five_bits = T == GGML_TYPE_Q5_0 || T == GGML_TYPE_Q5_1;

alignas(16) const int8_t iq4_values[16] = { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 };

// The 32 fifth bits of a Q5 block stand before its nibbles.
template <ggml_type T> inline uint32_t high_bits(const uint8_t * b) {
    return load_as<uint32_t>(b + block<T>::head - 4);
}

// The 32 integers of a block as signed bytes, in the offset form of K if BIAS is K_BIAS.
#if INTACTKV_X86 >= 2
template <ggml_type T, int BIAS> inline __m256i unpacked(const uint8_t * b) {
    const uint8_t * qs = b + block<T>::head;
    __m256i x;
    if constexpr (T == GGML_TYPE_Q8_0) {
        x = load_as<__m256i>(qs);
    } else {
        const __m128i n = load_as<__m128i>(qs);
        x = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(n, 4), n), _mm256_set1_epi8(15));
        if constexpr (five_bits<T>) {
            // byte i of the block: bit i%8 of byte i/8
            const __m256i which = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
            const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32((int) high_bits<T>(b)), which);
            const __m256i bit = _mm256_set1_epi64x((long long) 0x8040201008040201);
            const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
            x = _mm256_or_si256(x, _mm256_and_si256(set, _mm256_set1_epi8(16)));
        }
        if constexpr (T == GGML_TYPE_IQ4_NL) {
            x = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_as<__m128i>(iq4_values)), x);
        }
    }
    if constexpr (BIAS - block<T>::offset != 0) {
        x = _mm256_add_epi8(x, _mm256_set1_epi8((char) (BIAS - block<T>::offset)));
    }
    return x;
}
#endif

template <ggml_type T, int BIAS> inline void unpack(const uint8_t * b, uint8_t * out) {
#if INTACTKV_X86 >= 2
    const __m256i x = unpacked<T, BIAS>(b);
    memcpy(out, &x, sizeof(x));
#else
    const uint8_t * qs = b + block<T>::head;
    for (int i = 0; i < QK; i++) {
        int n;
        if constexpr (T == GGML_TYPE_Q8_0) {
            n = (int8_t) qs[i];
        } else {
            n = i < QK / 2 ? qs[i] & 15 : qs[i - QK / 2] >> 4;
            if constexpr (five_bits<T>) {
                n |= ((high_bits<T>(b) >> i) & 1) << 4;
            }
            if constexpr (T == GGML_TYPE_IQ4_NL) {
                n = iq4_values[n];
            }
        }
        out[i] = (uint8_t) (n - block<T>::offset + BIAS);
    }
#endif
}

// 8 x W dwords: a block of each of W cells -> [8][W]
template <ggml_type T> inline void transpose(const uint8_t * const * in, size_t offset, vi (&out)[QK / 4]) {
#if INTACTKV_X86 >= 3
    __m512i z[8], u[8], w[8];
    for (int i = 0; i < 8; i++) {
        const int c = i < 4 ? i : i + 4; // cells c and c+4 in the halves
        const __m256i low = unpacked<T, K_BIAS>(in[c] + offset), high = unpacked<T, K_BIAS>(in[c + 4] + offset);
        z[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    for (int i = 0; i < 8; i += 2) {
        u[i] = _mm512_unpacklo_epi32(z[i], z[i + 1]);
        u[i + 1] = _mm512_unpackhi_epi32(z[i], z[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        w[i] = _mm512_unpacklo_epi64(u[i], u[i + 2]);
        w[i + 1] = _mm512_unpackhi_epi64(u[i], u[i + 2]);
        w[i + 2] = _mm512_unpacklo_epi64(u[i + 1], u[i + 3]);
        w[i + 3] = _mm512_unpackhi_epi64(u[i + 1], u[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        out[j] = (vi) _mm512_shuffle_i32x4(w[j], w[j + 4], 0x88);
        out[j + 4] = (vi) _mm512_shuffle_i32x4(w[j], w[j + 4], 0xdd);
    }
#elif INTACTKV_X86 == 2
    __m256i z[8], u[8], w[8];
    for (int i = 0; i < 8; i++) {
        z[i] = unpacked<T, K_BIAS>(in[i] + offset);
    }
    for (int i = 0; i < 8; i += 2) {
        u[i] = _mm256_unpacklo_epi32(z[i], z[i + 1]);
        u[i + 1] = _mm256_unpackhi_epi32(z[i], z[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        w[i] = _mm256_unpacklo_epi64(u[i], u[i + 2]);
        w[i + 1] = _mm256_unpackhi_epi64(u[i], u[i + 2]);
        w[i + 2] = _mm256_unpacklo_epi64(u[i + 1], u[i + 3]);
        w[i + 3] = _mm256_unpackhi_epi64(u[i + 1], u[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        out[j] = (vi) _mm256_permute2x128_si256(w[j], w[j + 4], 0x20);
        out[j + 4] = (vi) _mm256_permute2x128_si256(w[j], w[j + 4], 0x31);
    }
#else
    alignas(64) uint8_t bytes[W][QK];
    for (int c = 0; c < W; c++) {
        unpack<T, K_BIAS>(in[c] + offset, bytes[c]);
    }
    for (int j = 0; j < QK / 4; j++) {
        for (int c = 0; c < W; c++) {
            out[j][c] = load_as<int32_t>(bytes[c] + j * 4);
        }
    }
#endif
}

// The same as 16-bit integers: QK of them in BLOCK_S vectors.
constexpr int BLOCK_S = QK / (2 * W);

template <ggml_type T> inline void unpack_s16(const uint8_t * b, vs * out) {
#if INTACTKV_X86 >= 3
    out[0] = (vs) _mm512_cvtepi8_epi16(unpacked<T, 0>(b));
#elif INTACTKV_X86 == 2
    const __m256i x = unpacked<T, 0>(b);
    out[0] = (vs) _mm256_cvtepi8_epi16(_mm256_castsi256_si128(x));
    out[1] = (vs) _mm256_cvtepi8_epi16(_mm256_extracti128_si256(x, 1));
#else
    uint8_t bytes[QK];
    unpack<T, 0>(b, bytes);
    for (int i = 0; i < BLOCK_S; i++) {
        out[i] = __builtin_convertvector(load_as<vsb2>(bytes + i * 2 * W), vs);
    }
#endif
}

// V in floats: n of W values, values i*W..i*W+W-1 of a block; for F16 and BF16 the values themselves.
template <ggml_type T> inline vf values(const uint8_t * b, int i) {
    constexpr int half = QK / 2 / W; // vectors in the low nibbles
    const uint8_t * qs = b + block<T>::head;
    if constexpr (T == GGML_TYPE_F16) {
        return load_f16((const uint16_t *) b + i * W);
    } else if constexpr (T == GGML_TYPE_BF16) {
        return load_bf16((const uint16_t *) b + i * W);
    } else if constexpr (T == GGML_TYPE_Q8_0) {
        return load_s8(qs + i * W);
    } else {
        const vi x = load_u8(qs + i % half * W);
        vi n = i < half ? x & 15 : x >> 4;
        if constexpr (five_bits<T>) {
            vi lane;
            for (int l = 0; l < W; l++) {
                lane[l] = i * W + l;
            }
            n |= ((set1((int32_t) high_bits<T>(b)) >> lane) & 1) << 4;
        }
        if constexpr (T == GGML_TYPE_IQ4_NL) {
#if INTACTKV_X86 >= 3
            const __m512 table = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_as<__m128i>(iq4_values)));
            return _mm512_permutexvar_ps((__m512i) n, table);
#else
            vi v;
            for (int l = 0; l < W; l++) {
                v[l] = iq4_values[n[l]];
            }
            return to_float(v);
#endif
        } else {
            return to_float(n);
        }
    }
}

// Scale and low of V's values above.
template <ggml_type T> inline float block_scale(const uint8_t * b) {
    return f16(b);
}
template <ggml_type T> inline float block_low(const uint8_t * b) {
    return block<T>::min ? f16(b + 2) : -block<T>::offset * f16(b);
}

} // namespace
} // namespace intactkv
