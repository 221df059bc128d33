// Vectors of W floats and the few operations on them that the compiler needs help with.
//
// The vector types are the compiler's own (GCC, Clang), so + - * & | << work on them. INTACTKV_X86 (2: AVX2+FMA+F16C, 3:
// AVX-512 F/BW/DQ/VL, 4: the same with VNNI) or INTACTKV_ARM (1: NEON, 2: with dot products) say for which instruction
// set; neither: portable.
//
// Compiled once per instruction set, inside its anonymous namespace: see kernel/kernel-inl.h.

#pragma once

#include "attention/call.h"

namespace intactkv {
namespace {

#if INTACTKV_X86 >= 3
constexpr int W = 16;
#elif INTACTKV_X86 == 2
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef uint8_t vub __attribute__((vector_size(W)));
typedef int8_t vsb __attribute__((vector_size(W)));
typedef int16_t vs __attribute__((vector_size(4 * W)));
typedef int8_t vsb2 __attribute__((vector_size(2 * W)));

// K bytes are kept with this added, because x86's dot products want one side unsigned.
constexpr int K_BIAS = INTACTKV_X86 >= 4 ? 128 : 0;

template <typename T> inline T load_as(const void * p) {
    T r;
    memcpy(&r, p, sizeof(r));
    return r;
}

inline vf load(const float * p) {
    return load_as<vf>(p);
}
inline void store(float * p, vf a) {
    memcpy(p, &a, sizeof(a));
}
inline void store(void * p, vi a) {
    memcpy(p, &a, sizeof(a));
}
inline vf set1(float a) {
    return vf{} + a;
}
inline vi set1(int32_t a) {
    return vi{} + a;
}
inline vf to_float(vi a) {
    return __builtin_convertvector(a, vf);
}
inline vf as_float(vi a) {
    return (vf) a;
}
inline vi as_int(vf a) {
    return (vi) a;
}

// W bytes or halves as integers. GCC takes __builtin_convertvector() apart into single bytes here.
inline vi load_u8(const uint8_t * p) {
#if INTACTKV_X86 >= 3
    return (vi) _mm512_cvtepu8_epi32(load_as<__m128i>(p));
#elif INTACTKV_X86 == 2
    return (vi) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) p));
#else
    return __builtin_convertvector(load_as<vub>(p), vi);
#endif
}
inline vf load_s8(const uint8_t * p) {
#if INTACTKV_X86 >= 3
    return to_float((vi) _mm512_cvtepi8_epi32(load_as<__m128i>(p)));
#elif INTACTKV_X86 == 2
    return to_float((vi) _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) p)));
#else
    return to_float(__builtin_convertvector(load_as<vsb>(p), vi));
#endif
}
inline vi load_u16(const uint16_t * p) {
#if INTACTKV_X86 >= 3
    return (vi) _mm512_cvtepu16_epi32(load_as<__m256i>(p));
#elif INTACTKV_X86 == 2
    return (vi) _mm256_cvtepu16_epi32(load_as<__m128i>(p));
#else
    return __builtin_convertvector(load_as<vh>(p), vi);
#endif
}
inline vf load_bf16(const uint16_t * p) {
    return as_float(load_u16(p) << 16);
}

// a*b + c
inline vf fma(vf a, vf b, vf c) {
#if INTACTKV_X86 >= 3
    return _mm512_fmadd_ps(a, b, c);
#elif INTACTKV_X86 == 2
    return _mm256_fmadd_ps(a, b, c);
#elif INTACTKV_ARM
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

// The larger; b where one is not a number.
inline vf max(vf a, vf b) {
#if INTACTKV_X86 >= 3
    return _mm512_max_ps(a, b);
#elif INTACTKV_X86 == 2
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

// The smaller; b where one is not a number.
inline vf min(vf a, vf b) {
#if INTACTKV_X86 >= 3
    return _mm512_min_ps(a, b);
#elif INTACTKV_X86 == 2
    return _mm256_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}

inline vf to_float(vh h) {
#if INTACTKV_X86 >= 3
    return _mm512_cvtph_ps((__m256i) h);
#elif INTACTKV_X86 == 2
    return _mm256_cvtph_ps((__m128i) h);
#elif INTACTKV_ARM
    return vcvt_f32_f16((float16x4_t) h);
#else
    // exponent and mantissa moved into place, then the exponent's bias corrected by a product; inf and NaN by hand
    const vi x = __builtin_convertvector(h, vi);
    const vi sign = (x & 0x8000) << 16;
    const vi em = x & 0x7fff;
    const vf f = as_float(em << 13) * set1(0x1p112f);
    const vi big = (em << 13) | 0x7f800000;
    return as_float((em > 0x7bff ? big : as_int(f)) | sign);
#endif
}
inline vf load_f16(const uint16_t * p) {
    return to_float(load_as<vh>(p));
}

// W F16 numbers, one from each row. Not by way of memory: a load of what several stores wrote waits for all of them.
inline vf gather_f16(const uint8_t * const * rows, size_t offset) {
    vh h;
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) {
        h[i] = load_as<uint16_t>(rows[i] + offset);
    }
    return to_float(h);
}

inline float f16(const void * p) {
    uint16_t h;
    memcpy(&h, p, sizeof(h));
#if INTACTKV_X86 >= 2
    return _cvtsh_ss(h);
#else
    uint16_t lanes[W] = { h };
    return load_f16(lanes)[0];
#endif
}

// The nearest F16, ties to even.
inline uint16_t to_f16(float x) {
#if INTACTKV_X86 >= 2
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#elif INTACTKV_ARM
    return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0);
#else
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    const uint32_t sign = bits >> 31 << 15, size = bits & 0x7fffffff;
    if (size >= 0x47800000) { // 2^16: infinite, or not a number
        return (uint16_t) (sign | (size > 0x7f800000 ? 0x7e00 : 0x7c00));
    }
    if (size < 0x38800000) { // 2^-14: no longer normal; the last bit of 1/2 is worth as much as that of the result
        float y;
        memcpy(&y, &size, sizeof(y));
        y += 0.5f;
        memcpy(&bits, &y, sizeof(bits));
        return (uint16_t) (sign | (bits - 0x3f000000));
    }
    // half of the last bit, less a little where that bit is even; a carry goes to the exponent, as it should
    return (uint16_t) (sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
#endif
}

inline float sum(vf a) {
#if INTACTKV_X86 >= 3
    return _mm512_reduce_add_ps(a);
#elif INTACTKV_ARM
    return vaddvq_f32(a);
#else
    float r = 0.0f;
    for (int i = 0; i < W; i++) {
        r += a[i];
    }
    return r;
#endif
}

// out[i] = sum(a[i])
inline void sum4(const vf * a, float * out) {
#if INTACTKV_X86 >= 3
    const __m512 lo = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    const __m512 hi = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    const __m512d x = (__m512d) lo, y = (__m512d) hi;
    const __m512 four = _mm512_add_ps((__m512) _mm512_unpacklo_pd(x, y), (__m512) _mm512_unpackhi_pd(x, y));
    const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
#elif INTACTKV_X86 == 2
    const __m256 two = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
#elif INTACTKV_ARM
    store(out, vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])));
#else
    for (int i = 0; i < 4; i++) {
        out[i] = sum(a[i]);
    }
#endif
}

inline float max_of(vf a) {
#if INTACTKV_X86 >= 3
    return _mm512_reduce_max_ps(a);
#elif INTACTKV_ARM
    return vmaxvq_f32(a);
#else
    float r = a[0];
    for (int i = 1; i < W; i++) {
        r = a[i] > r ? a[i] : r;
    }
    return r;
#endif
}

// acc + the dot products of 4 signed bytes of q and 4 bytes of k (with K_BIAS), in each of W lanes.
inline vi dot4(vi acc, vi k, vi q) {
#if INTACTKV_X86 >= 4
    return (vi) _mm512_dpbusd_epi32((__m512i) acc, (__m512i) k, (__m512i) q);
#elif INTACTKV_X86 == 3
    const __m512i s =
            _mm512_mask_sub_epi8((__m512i) q, _mm512_movepi8_mask((__m512i) k), _mm512_setzero_si512(), (__m512i) q);
    const __m512i p = _mm512_maddubs_epi16(_mm512_abs_epi8((__m512i) k), s);
    return acc + (vi) _mm512_madd_epi16(p, _mm512_set1_epi16(1));
#elif INTACTKV_X86 == 2
    const __m256i p = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i) k), _mm256_sign_epi8((__m256i) q, (__m256i) k));
    return acc + (vi) _mm256_madd_epi16(p, _mm256_set1_epi16(1));
#elif INTACTKV_ARM >= 2
    return (vi) vdotq_s32((int32x4_t) acc, (int8x16_t) k, (int8x16_t) q);
#elif INTACTKV_ARM
    const int16x8_t lo = vmull_s8(vget_low_s8((int8x16_t) k), vget_low_s8((int8x16_t) q));
    const int16x8_t hi = vmull_s8(vget_high_s8((int8x16_t) k), vget_high_s8((int8x16_t) q));
    return acc + (vi) vpaddq_s32(vpaddlq_s16(lo), vpaddlq_s16(hi));
#else
    // bytes of each lane by shifts; each product fits 16 bits
    const vi k0 = (k << 24) >> 24, k1 = (k << 16) >> 24, k2 = (k << 8) >> 24, k3 = k >> 24;
    const vi q0 = (q << 24) >> 24, q1 = (q << 16) >> 24, q2 = (q << 8) >> 24, q3 = q >> 24;
    return acc + k0 * q0 + k1 * q1 + k2 * q2 + k3 * q3;
#endif
}

#if INTACTKV_X86 >= 2
// acc + the dot products of 2 signed 16-bit integers of each of W lanes
inline vi dot2(vi acc, vi a, vi b) {
#if INTACTKV_X86 >= 4
    return (vi) _mm512_dpwssd_epi32((__m512i) acc, (__m512i) a, (__m512i) b);
#elif INTACTKV_X86 == 3
    return acc + (vi) _mm512_madd_epi16((__m512i) a, (__m512i) b);
#else
    return acc + (vi) _mm256_madd_epi16((__m256i) a, (__m256i) b);
#endif
}
#endif

// Has the sum computed here. GCC puts off sums of integers, as their order does not matter: it keeps eight products of
// each accumulator on the stack, and adds them at the end.
inline void settle(vi & acc) {
#if INTACTKV_X86 == 2 || INTACTKV_X86 == 3
    __asm__("" : "+v"(acc));
#else
    (void) acc;
#endif
}

// 2W values of two cells, side by side as pair_dot() wants them.
struct cell_pair {
    vs a, b;
};

inline cell_pair make_pair(vs v0, vs v1) {
#if INTACTKV_X86 >= 3
    return { (vs) _mm512_unpacklo_epi16((__m512i) v0, (__m512i) v1),
        (vs) _mm512_unpackhi_epi16((__m512i) v0, (__m512i) v1) };
#elif INTACTKV_X86 == 2
    return { (vs) _mm256_unpacklo_epi16((__m256i) v0, (__m256i) v1),
        (vs) _mm256_unpackhi_epi16((__m256i) v0, (__m256i) v1) };
#else
    return { v0, v1 };
#endif
}

// (lo, hi) + w[0] * the first cell's values + w[1] * the second's, in an order that in_order() undoes.
inline void pair_dot(vi & lo, vi & hi, const cell_pair & p, const int16_t * w) {
#if INTACTKV_X86 >= 2
    const vi both = set1(load_as<int32_t>(w));
    lo = dot2(lo, (vi) p.a, both);
    hi = dot2(hi, (vi) p.b, both);
#elif INTACTKV_ARM
    const int16x8_t a = (int16x8_t) p.a, b = (int16x8_t) p.b;
    lo = (vi) vmlal_n_s16(vmlal_n_s16((int32x4_t) lo, vget_low_s16(a), w[0]), vget_low_s16(b), w[1]);
    hi = (vi) vmlal_n_s16(vmlal_n_s16((int32x4_t) hi, vget_high_s16(a), w[0]), vget_high_s16(b), w[1]);
#else
    for (int i = 0; i < W; i++) {
        lo[i] += p.a[i] * w[0] + p.b[i] * w[1];
        hi[i] += p.a[W + i] * w[0] + p.b[W + i] * w[1];
    }
#endif
}

// Sums of pair_dot() as the values were: lo the first W, hi the others.
inline void in_order(vi & lo, vi & hi) {
#if INTACTKV_X86 >= 3
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    const __m512i a = (__m512i) lo, b = (__m512i) hi;
    lo = (vi) _mm512_permutex2var_epi32(a, first, b);
    hi = (vi) _mm512_permutex2var_epi32(a, second, b);
#elif INTACTKV_X86 == 2
    const __m256i a = (__m256i) lo, b = (__m256i) hi;
    lo = (vi) _mm256_permute2x128_si256(a, b, 0x20);
    hi = (vi) _mm256_permute2x128_si256(a, b, 0x31);
#else
    (void) lo, (void) hi;
#endif
}

// 1.5 * 2^23, and its bits. A float of |a| < 2^22 that this is added to is rounded to an integer, ties to even: the bits of
// the sum are ROUNDER_BITS + that integer.
constexpr float ROUNDER = 12582912.0f;
constexpr int32_t ROUNDER_BITS = 0x4b400000;

// The nearest integers, ties to even; |a| < 2^22.
inline vi nearest(vf a) {
#if INTACTKV_X86 >= 3
    return (vi) _mm512_cvtps_epi32(a);
#elif INTACTKV_X86 == 2
    return (vi) _mm256_cvtps_epi32(a);
#elif INTACTKV_ARM
    return vcvtnq_s32_f32(a);
#else
    return as_int(a + ROUNDER) - ROUNDER_BITS;
#endif
}

// The same as floats.
inline vf whole(vf a) {
#if INTACTKV_X86 >= 3
    return _mm512_roundscale_ps(a, 0);
#elif INTACTKV_X86 == 2
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif INTACTKV_ARM
    return vrndnq_f32(a);
#else
    return (a + ROUNDER) - ROUNDER;
#endif
}

// The lowest byte of each lane.
inline void store_u8(uint8_t * p, vi a) {
#if INTACTKV_X86 >= 3
    _mm_storeu_si128((__m128i *) p, _mm512_cvtepi32_epi8((__m512i) a));
#else
    for (int i = 0; i < W; i++) {
        p[i] = (uint8_t) a[i];
    }
#endif
}

// Bit i: lane i is negative.
inline uint32_t sign_bits(vi a) {
#if INTACTKV_X86 >= 3
    return _mm512_movepi32_mask((__m512i) a);
#elif INTACTKV_X86 == 2
    return (uint32_t) _mm256_movemask_ps((__m256) a);
#else
    uint32_t bits = 0;
    for (int i = 0; i < W; i++) {
        bits |= (uint32_t) (a[i] < 0) << i;
    }
    return bits;
#endif
}

// Rounded to nearest, |a| < 2^15.
inline void store_s16(int16_t * p, vf a) {
    const vi n = nearest(a);
#if INTACTKV_X86 >= 3
    _mm256_storeu_si256((__m256i *) p, _mm512_cvtepi32_epi16((__m512i) n));
#else
    for (int i = 0; i < W; i++) {
        p[i] = (int16_t) n[i];
    }
#endif
}

// 2^x for x <= 0: 2^n * 2^r with |r| <= 1/2, minimax polynomial of degree 5 (error below 2e-7 of the result, 1 for 0);
// exactly 0 below -127, NaN for NaN.
inline vf exp2_neg(vf x) {
    x = max(set1(-127.0f), x);
#if INTACTKV_X86 >= 3
    const vf n = _mm512_roundscale_ps(x, 0);
#else
    const vf t = x + set1(ROUNDER);
    const vf n = t - set1(ROUNDER);
#endif
    const vf r = x - n;
    vf p = set1(1.326472731e-3f);
    p = fma(p, r, set1(9.671512991e-3f));
    p = fma(p, r, set1(5.550733581e-2f));
    p = fma(p, r, set1(2.402224243e-1f));
    p = fma(p, r, set1(6.931470037e-1f));
    p = fma(p, r, set1(1.0f));
#if INTACTKV_X86 >= 3
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, _mm512_set1_ps(-127.0f), _CMP_NEQ_UQ), p, n);
#else
    // n = -127 gives the bits of 0
    return p * as_float((as_int(t) - (ROUNDER_BITS - 127)) << 23);
#endif
}

// tanh by e^(-2|x|); absolute error below 2e-7
inline vf tanh(vf x) {
    const vi sign = as_int(x) & (int32_t) 0x80000000;
    const vf a = as_float(as_int(x) & 0x7fffffff);
    const vf e = exp2_neg(a * (-2.0f * FUSED_LOG2E));
    return as_float(as_int((1.0f - e) / (1.0f + e)) | sign);
}

} // namespace
} // namespace intactkv
