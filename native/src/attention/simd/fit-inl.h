// Blocks of 4 and 5 bits, with the scale (and the minimum) of the smallest error.
//
// ggml takes the scale from the largest value, which is right for that one and for no other. Here TRIED scales around
// it are tried on the values; each is then fitted to the integers it gave, by least squares, which also says how much
// error is left. The best one is rounded to F16 and the values to the integers nearest to it: the same blocks as ever,
// with 10 to 20 % less squared error.
//
// Every instruction set must give the same bits, and so must torch (torch_model/rounding.py), in whatever order they
// add and whether or not they fuse a product and a sum. So the sums are taken over whole numbers, small enough to be
// exact in F32: the values become integers of up to fit_one first.
//
// Compiled once per instruction set, inside its anonymous namespace: see kernel/kernel-inl.h.

#pragma once

#include "attention/simd/blocks-inl.h"
#include "attention/simd/vector-inl.h"

namespace intactkv {
namespace {

constexpr int TRIED = 8;
constexpr int TRIED_V = W < TRIED ? TRIED / W : 1;  // vectors with a lane for each of them
constexpr int TRIED_AT = W > TRIED ? W / TRIED : 1; // values that such a vector meets at a time
constexpr float FIT_LEAST = 1e-20f;                 // of the largest value, or the range; F16 has no such scale: 0

// What the largest value, or the range, of a block becomes: |sums| stay below 2^24 with the largest integers.
template <ggml_type T> constexpr float fit_one = T == GGML_TYPE_IQ4_NL ? 4096.0f : 16384.0f;

// The smallest and the largest integer.
template <ggml_type T> constexpr float level_min = T == GGML_TYPE_IQ4_NL ? -127.0f : -(float) block<T>::offset;
template <ggml_type T>
constexpr float level_max = T == GGML_TYPE_IQ4_NL ? 113.0f : level_min<T> + (five_bits<T> ? 31.0f : 15.0f);

// The scales tried, in units of the one that takes the largest value to the lowest integer (ggml's: 1). Negative: to
// the other end, which differs for IQ4_NL only.
template <ggml_type T> struct fit {
    static constexpr float scales[TRIED] = { 0.8f, 0.85f, 0.9f, 0.95f, 1.0f, 1.03f, 1.06f, 1.1f };
};
template <> struct fit<GGML_TYPE_Q5_0> {
    static constexpr float scales[TRIED] = { 0.88f, 0.91f, 0.94f, 0.97f, 1.0f, 1.02f, 1.04f, 1.06f };
};
template <> struct fit<GGML_TYPE_IQ4_NL> {
    static constexpr float scales[TRIED] = { 0.84f, 0.89f, 0.945f, 1.0f, -0.9f, -0.97f, -1.03f, -1.1f };
};

// With a minimum: what is cut off at the lower end and at the upper end, in units of the range.
template <> struct fit<GGML_TYPE_Q4_1> {
    static constexpr float low[TRIED] = { 0.0f, 0.0f, 0.0f, 0.025f, 0.025f, 0.025f, 0.05f, 0.05f };
    static constexpr float high[TRIED] = { 0.0f, 0.025f, 0.05f, 0.0f, 0.025f, 0.05f, 0.0f, 0.025f };
};
template <> struct fit<GGML_TYPE_Q5_1> {
    static constexpr float low[TRIED] = { 0.0f, -0.01f, -0.01f, -0.01f, 0.0f, 0.0f, 0.01f, 0.01f };
    static constexpr float high[TRIED] = { 0.0f, -0.01f, 0.0f, 0.01f, -0.01f, 0.01f, -0.01f, 0.0f };
};

// What a value is multiplied with, for each scale tried, after `start` was taken off.
template <ggml_type T> struct tries {
    float start[TRIED] = {};
    float steps[TRIED] = {};

    constexpr tries() {
        for (int i = 0; i < TRIED; i++) {
            if constexpr (block<T>::min) {
                start[i] = fit<T>::low[i] * fit_one<T>;
                steps[i] = level_max<T> / (fit_one<T> * (1.0f - fit<T>::low[i] - fit<T>::high[i]));
            } else {
                steps[i] = -level_min<T> / (fit_one<T> * fit<T>::scales[i]);
            }
        }
    }
};

// One value in each lane; where a vector meets two, values half a block apart.
inline vf each(const float * x) {
#if INTACTKV_X86 >= 3
    return _mm512_insertf32x8(_mm512_set1_ps(x[0]), _mm256_set1_ps(x[QK / 2]), 1);
#else
    return set1(*x);
#endif
}

// Numbers of the scales tried.
inline vf load_tried(const float * x, int i) {
#if INTACTKV_X86 >= 3
    return (void) i, _mm512_broadcast_f32x8(_mm256_loadu_ps(x));
#else
    return load(x + i * W);
#endif
}
inline void store_tried(float * x, int i, vf a) {
#if INTACTKV_X86 >= 3
    (void) i, _mm256_storeu_ps(x, _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)));
#else
    store(x + i * W, a);
#endif
}

// Between two of IQ4_NL's values, half of them belong to either.
inline float iq4_middle(int i) {
    return 0.5f * (float) (iq4_values[i - 1] + iq4_values[i]);
}

// The nearest of a type's integers. The bounds stand between the product that x is and the sum that whole() may be: a
// compiler must not fuse these.
template <ggml_type T> inline vf nearest_level(vf x) {
    if constexpr (T == GGML_TYPE_IQ4_NL) {
        vf level = set1(level_min<T>);
        for (int i = 1; i < 16; i++) {
            level += as_float((x >= set1(iq4_middle(i))) & as_int(set1((float) (iq4_values[i] - iq4_values[i - 1]))));
        }
        return level;
    } else {
        return whole(min(max(x, set1(level_min<T>)), set1(level_max<T>)));
    }
}

// The same as they stand in the block, from 0.
template <ggml_type T> inline vi nearest_code(vf x) {
    if constexpr (T == GGML_TYPE_IQ4_NL) {
        vi n = {};
        for (int i = 1; i < 16; i++) {
            n -= x >= set1(iq4_middle(i));
        }
        return n;
    } else {
        return nearest(min(max(x, set1(level_min<T>)), set1(level_max<T>))) + block<T>::offset;
    }
}

// For each scale tried, sums over the values x and the integers q that it gives: q, q*q, q*x. All are exact.
struct fit_sums {
    float q[TRIED], qq[TRIED], qx[TRIED];
};

template <ggml_type T> inline void sum_tries(const float * x, fit_sums & sums) {
    static constexpr tries<T> tried;
    vf start[TRIED_V], step[TRIED_V], q[TRIED_V] = {}, qq[TRIED_V] = {}, qx[TRIED_V] = {};
    for (int i = 0; i < TRIED_V; i++) {
        start[i] = load_tried(tried.start, i);
        step[i] = load_tried(tried.steps, i);
    }
    for (int j = 0; j < QK / TRIED_AT; j++) {
        const vf v = each(x + j);
        for (int i = 0; i < TRIED_V; i++) {
            vf n;
            if constexpr (block<T>::min) {
                n = nearest_level<T>((v - start[i]) * step[i]);
                q[i] += n;
            } else {
                n = nearest_level<T>(v * step[i]);
            }
            qq[i] = fma(n, n, qq[i]);
            qx[i] = fma(n, v, qx[i]);
        }
    }
    for (int i = 0; i < TRIED_V; i++) {
        store_tried(sums.q, i, q[i]);
        store_tried(sums.qq, i, qq[i]);
        store_tried(sums.qx, i, qx[i]);
    }
}

// The codes into the block: low nibbles the first half, high nibbles the second; fifth bits before them.
template <ggml_type T> inline void store_codes(uint8_t * p, const vi * n) {
    constexpr int half = QK / 2 / W;
    uint8_t * qs = p + block<T>::head;
    if constexpr (five_bits<T>) {
        uint32_t fifth = 0;
        for (int i = 0; i < QK / W; i++) {
            fifth |= sign_bits(n[i] << 27) << (i * W);
        }
        memcpy(qs - 4, &fifth, sizeof(fifth));
    }
    for (int i = 0; i < half; i++) {
        store_u8(qs + i * W, (n[i] & 15) | ((n[i + half] & 15) << 4));
    }
}

// The first of the largest: of how much of the squares each scale explains.
inline int best_of(const float * gain) {
    int best = 0;
    float most = -1.0f;
    for (int i = 0; i < TRIED; i++) {
        best = gain[i] > most ? i : best;
        most = gain[i] > most ? gain[i] : most;
    }
    return best;
}

template <ggml_type T> inline void store_fitted(uint8_t * p, const float * x) {
    vf top = load(x), bottom = -top;
    for (int i = W; i < QK; i += W) {
        top = max(top, load(x + i));
        bottom = max(bottom, -load(x + i));
    }
    const float high = max_of(top), low = -max_of(bottom);
    const float size = block<T>::min ? high - low : high > -low ? high : -low;
    // scale 0: all integers are 0, but where there is a minimum
    float d = 0.0f, m = low;
    if (size >= FIT_LEAST) {
        alignas(64) float whole_x[QK];
        const float start = block<T>::min ? low : 0.0f;
        const float side = !block<T>::min && high > -low ? -1.0f : 1.0f; // the largest value to the lowest integer
        const float inv = fit_one<T> / size * side;
        vf sum_x = {};
        for (int i = 0; i < QK; i += W) {
            // the bounds: see nearest_level()
            const vf v = (load(x + i) - start) * inv;
            const vf n = whole(min(max(v, set1(-fit_one<T>)), set1(fit_one<T>)));
            store(whole_x + i, n);
            sum_x += n;
        }
        fit_sums sums;
        sum_tries<T>(whole_x, sums);
        const float unit = size / fit_one<T> * side;
        float gain[TRIED];
        if constexpr (block<T>::min) {
            const int32_t sx = (int32_t) sum(sum_x);
            int32_t a[TRIED], b[TRIED];
            for (int i = 0; i < TRIED; i++) {
                const int32_t q = (int32_t) sums.q[i];
                a[i] = QK * (int32_t) sums.qx[i] - sx * q;
                b[i] = QK * (int32_t) sums.qq[i] - q * q;
                gain[i] = (float) a[i] * (float) a[i] / (float) b[i];
            }
            const int best = best_of(gain);
            d = (float) a[best] / (float) b[best] * unit;
            const int64_t c = (int64_t) sx * (int64_t) sums.qq[best] - (int64_t) sums.q[best] * (int64_t) sums.qx[best];
            // the product of two F32 is exact in double: fused with the sum or not, the result is the same
            m = (float) ((double) low + (double) ((float) c / (float) b[best]) * (double) unit);
        } else {
            for (int i = 0; i < TRIED; i++) {
                gain[i] = sums.qx[i] * sums.qx[i] / sums.qq[i];
            }
            const int best = best_of(gain);
            d = sums.qx[best] / sums.qq[best] * unit;
        }
    }
    const uint16_t d16 = to_f16(d), m16 = to_f16(m);
    memcpy(p, &d16, sizeof(d16));
    if constexpr (block<T>::min) {
        memcpy(p + 2, &m16, sizeof(m16));
    }
    d = f16(&d16);
    m = block<T>::min ? f16(&m16) : 0.0f;
    const float inv = d != 0.0f ? 1.0f / d : 0.0f;
    vi n[QK / W];
    for (int i = 0; i < QK / W; i++) {
        n[i] = nearest_code<T>((load(x + i * W) - m) * inv);
    }
    store_codes<T>(p, n);
}

template <ggml_type T> inline void narrow_fitted(const float * x, void * out, int64_t n_values) {
    for (int64_t i = 0; i < n_values / QK; i++) {
        store_fitted<T>((uint8_t *) out + i * block<T>::bytes, x + i * QK);
    }
}

} // namespace
} // namespace intactkv
