// Values: the weights times V of a tile's cells, added to what the item has so far, for all rows of one KV head.
//
//   reads   mem.s: weights, narrow [row][cell] or wide [cell][row]; mem.beta [row]; V of the cells at mem.v_rows
//   writes  mem.acc [KV head][row][dim_v] = beta * acc + weights . V
//   between mem.v, wide: V of the tile, expanded once
//
// Quantized V in integers, two cells at a time: a weight is multiplied by its block's scale and rounded to 16 bits of the
// largest such product in the tile, an error below 2^-16 of that. Wide only on x86, else V is expanded to floats there.
//
// Compiled once per instruction set, inside its anonymous namespace: see kernel-inl.h.

#pragma once

#include "attention/kernel/cells-inl.h"
#include "attention/kernel/item-inl.h"
#include "attention/simd/blocks-inl.h"
#include "attention/simd/gemm-inl.h"
#include "attention/simd/vector-inl.h"

namespace intactkv {
namespace {

constexpr int VALUE_ROWS = INTACTKV_X86 >= 3 ? 4 : 2; // rows that share an expansion of V in registers
constexpr int VALUE_COLS = W >= 16 ? 64 : 32;         // columns of V that do so, for F16 and BF16
constexpr float WEIGHT_MAX = 32767.0f;                // of a weight in 16 bits
constexpr float WEIGHT_TINY = 1.0e-30f;               // smaller largest weights might have no finite inverse

// The weights of R rows for a block of V, as narrow_values_quant() wants them.
template <int R> struct weights {
    alignas(64) int16_t w[R][FUSED_TILE];
    float unit[R], lows[R];

    // p: [row][cell]. N: the number of vectors if it is known (then they stay in registers), else 0.
    template <ggml_type T, int N> void set(const row_list & rows, size_t offset, const float * p, int n) {
        const int n_vec = N > 0 ? N : n;
        vf scale[FUSED_TILE / W], low[FUSED_TILE / W];
        for (int v = 0; v < n_vec; v++) {
            scale[v] = gather_f16(rows.here + v * W, offset);
            if constexpr (block<T>::min) {
                low[v] = gather_f16(rows.here + v * W, offset + 2);
            }
        }
        for (int r = 0; r < R; r++) {
            vf product[FUSED_TILE / W], largest = {}, total = {};
            for (int v = 0; v < n_vec; v++) {
                const vf pc = load(p + r * FUSED_TILE + v * W);
                product[v] = pc * scale[v];
                largest = max(largest, as_float(as_int(product[v]) & 0x7fffffff));
                if constexpr (block<T>::min) {
                    total = fma(pc, low[v], total);
                }
            }
            const float w_max = max_of(largest);
            const float inv = w_max > WEIGHT_TINY ? WEIGHT_MAX / w_max : 0.0f;
            for (int v = 0; v < n_vec; v++) {
                store_s16(w[r] + v * W, product[v] * inv);
            }
            unit[r] = w_max * (1.0f / WEIGHT_MAX);
            lows[r] = block<T>::min ? sum(total) : 0.0f;
        }
    }
};

// Quantized V: acc[r][d0..d0+32) of R rows.
template <ggml_type T, int R>
inline void narrow_values_quant(const work & w, const row_list & rows, int n, int r0, int h, int d0) {
    const int row0 = h * w.it.rows + r0;
    const size_t offset = (size_t) (d0 / QK * block<T>::bytes);

    weights<R> u;
    if (W >= 16 && n > FUSED_TILE - W) {
        u.template set<T, FUSED_TILE / W>(rows, offset, w.mem.s + r0 * FUSED_TILE, 0);
    } else {
        u.template set<T, 0>(rows, offset, w.mem.s + r0 * FUSED_TILE, round_up(n, W) / W);
    }

    const bool ahead = r0 == 0 && new_line<T>(d0 / QK);
    vi acc[R][2 * BLOCK_S] = {};
    for (int c = 0; c < n; c += 2) { // behind the last cell comes itself once more, with a weight of 0
        vs v0[BLOCK_S], v1[BLOCK_S];
        unpack_s16<T>(rows.here[c] + offset, v0);
        unpack_s16<T>(rows.here[c + 1] + offset, v1);
        if (ahead) {
            rows.prefetch(c, offset);
            rows.prefetch(c + 1, offset);
        }
        for (int i = 0; i < BLOCK_S; i++) {
            const cell_pair pair = make_pair(v0[i], v1[i]);
            for (int r = 0; r < R; r++) {
                pair_dot(acc[r][2 * i], acc[r][2 * i + 1], pair, u.w[r] + c);
            }
        }
    }
    for (int r = 0; r < R; r++) {
        float * out = w.mem.acc + (row0 + r) * w.dim_v + d0;
        for (int i = 0; i < 2 * BLOCK_S; i++) {
            if (i % 2 == 0) {
                in_order(acc[r][i], acc[r][i + 1]);
            }
            const vf old = fma(load(out + i * W), set1(w.mem.beta[r0 + r]), set1(u.lows[r]));
            store(out + i * W, fma(to_float(acc[r][i]), set1(u.unit[r]), old));
        }
    }
}

// F16 and BF16: acc[r][d0..d0+N) of R rows.
template <ggml_type T, int R, int N>
inline void narrow_values_float(const work & w, const row_list & rows, int n, int r0, int h, int d0) {
    const int row0 = h * w.it.rows + r0;
    constexpr int NV = N / W;
    vf acc[R][NV];
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < NV; v++) {
            acc[r][v] = load(w.mem.acc + (row0 + r) * w.dim_v + d0 + v * W) * w.mem.beta[r0 + r];
        }
    }
    for (int c = 0; c < n; c++) {
        const uint8_t * p = rows.here[c] + d0 * 2;
        for (int line = 0; r0 == 0 && line < N; line += 32) {
            rows.prefetch(c, (d0 + line) * 2);
        }
        for (int v = 0; v < NV; v++) {
            const vf value = values<T>(p, v);
            for (int r = 0; r < R; r++) {
                acc[r][v] = fma(value, set1(w.mem.s[(r0 + r) * FUSED_TILE + c]), acc[r][v]);
            }
        }
    }
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < NV; v++) {
            store(w.mem.acc + (row0 + r) * w.dim_v + d0 + v * W, acc[r][v]);
        }
    }
}

// All columns of R rows.
template <ggml_type T, int R>
inline void narrow_values_rows(const work & w, const row_list & rows, int n, int r0, int h) {
    int d = 0;
    if constexpr (block<T>::quant) {
        for (; d < w.dim_v; d += QK) {
            narrow_values_quant<T, R>(w, rows, n, r0, h, d);
        }
    } else {
        for (; d + VALUE_COLS <= w.dim_v; d += VALUE_COLS) {
            narrow_values_float<T, R, VALUE_COLS>(w, rows, n, r0, h, d);
        }
        for (; d < w.dim_v; d += 16) {
            narrow_values_float<T, R, 16>(w, rows, n, r0, h, d);
        }
    }
}

template <ggml_type T> inline void narrow_values(const work & w, int n, int h) {
    const row_list rows(w.mem.v_rows, h, round_up(n, W));
    int r = 0;
    for (; r + VALUE_ROWS <= w.it.rows; r += VALUE_ROWS) {
        narrow_values_rows<T, VALUE_ROWS>(w, rows, n, r, h);
    }
    if constexpr (VALUE_ROWS > 2) {
        switch (w.it.rows - r) {
            case 3: narrow_values_rows<T, 3>(w, rows, n, r, h); break;
            case 2: narrow_values_rows<T, 2>(w, rows, n, r, h); break;
        }
    }
    if (w.it.rows - r == 1) {
        narrow_values_rows<T, 1>(w, rows, n, r, h);
    }
}

#if INTACTKV_X86 >= 2
// V of the tile as pairs of cells [pair][dim_v][2], 16 bits each; scale, low: [block][cell, cells_max]. Behind an odd
// last cell comes itself once more.
template <ggml_type T> inline void pack_v(const work & w, int n, int32_t * pairs, float * scale, float * low) {
    const row_list rows(w.mem.v_rows, 0, round_up(n, 2));
    for (int c = 0; c < n; c += 2) {
        for (int b = 0; b < w.dim_v / QK; b++) {
            const size_t offset = (size_t) (b * block<T>::bytes);
            vs v[2][BLOCK_S];
            for (int i = 0; i < 2; i++) {
                const uint8_t * p = rows.here[c + i] + offset;
                unpack_s16<T>(p, v[i]);
                scale[b * w.cells_max + c + i] = f16(p);
                if constexpr (block<T>::min) {
                    low[b * w.cells_max + c + i] = f16(p + 2);
                }
                if (new_line<T>(b)) {
                    rows.prefetch(c + i, offset);
                }
            }
            int32_t * out = pairs + c / 2 * w.dim_v + b * QK;
            for (int i = 0; i < BLOCK_S; i++) {
                const cell_pair pair = make_pair(v[0][i], v[1][i]);
                vi lo = (vi) pair.a, hi = (vi) pair.b;
                in_order(lo, hi);
                store(out + 2 * i * W, lo);
                store(out + (2 * i + 1) * W, hi);
            }
        }
    }
}

// The weights times one block's scales, by row in units of the largest / 32767: [pair of cells][row][2], 16 bits
// each. lows: the sum of the weights times the block's lows. n: even.
template <ggml_type T>
inline void pack_weights(
        const work & w, int n, const float * scale, const float * low, int32_t * products, float * unit, float * lows) {
    for (int r = 0; r < w.it.rows_pad; r += W) {
        vf largest = {}, total = {};
        for (int c = 0; c < n; c++) {
            const vf p = load(w.mem.s + c * w.it.rows_pad + r);
            largest = max(largest, as_float(as_int(p * scale[c]) & 0x7fffffff));
            if constexpr (block<T>::min) {
                total = fma(p, set1(low[c]), total);
            }
        }
        largest = max(largest, set1(WEIGHT_TINY));
        const vf inv = WEIGHT_MAX / largest;
        for (int c = 0; c < n; c += 2) {
            const vf p0 = load(w.mem.s + c * w.it.rows_pad + r) * scale[c];
            const vf p1 = load(w.mem.s + (c + 1) * w.it.rows_pad + r) * scale[c + 1];
            store(products + c / 2 * w.it.rows_pad + r, (nearest(p0 * inv) & 0xffff) | (nearest(p1 * inv) << 16));
        }
        store(unit + r, largest * (1.0f / WEIGHT_MAX));
        store(lows + r, total);
    }
}

// Quantized V as narrow_values_quant() does it, a block of 32 columns of all rows at a time.
template <ggml_type T> inline void wide_values_quant(const work & w, int n) {
    int32_t * pairs = (int32_t *) w.mem.v;
    alignas(64) float scale[TILE / QK], low[TILE / QK];
    alignas(64) int32_t products[FUSED_TILE / 2 * FUSED_ROWS_MAX];
    alignas(64) float unit[FUSED_ROWS_MAX], lows[FUSED_ROWS_MAX];
    pack_v<T>(w, n, pairs, scale, low);
    if (n % 2 != 0) { // the cell that came once more
        memset(w.mem.s + n * w.it.rows_pad, 0, sizeof(float) * w.it.rows_pad);
        n++;
    }
    for (int b = 0; b < w.dim_v / QK; b++) {
        pack_weights<T>(w, n, scale + b * w.cells_max, low + b * w.cells_max, products, unit, lows);
        const size_t ld = w.dim_v;
        const pair_args g = { products, (size_t) w.it.rows_pad, pairs + b * QK, ld, w.mem.acc + b * QK, ld, w.mem.beta,
            unit, block<T>::min ? lows : nullptr, n / 2 };
        pair_gemm(g, w.it.rows);
    }
}
#endif

// V in floats [cell][dim_v]. Those of latents that are F16 or BF16 are in mem.k, where the scores had them; others go
// there, as quantized scores have no floats.
template <ggml_type T> inline void wide_values_float(const work & w, int n) {
    const row_list rows(w.mem.v_rows, 0, n);
    const bool there = w.call.latents && !block<T>::quant;
    float * out = w.call.latents ? w.mem.k : w.mem.v;
    for (int c = 0; c < n && !there; c++) {
        if constexpr (block<T>::quant) {
            for (int d = 0; d < w.dim_v; d += QK) {
                const int offset = d / QK * block<T>::bytes;
                const uint8_t * p = rows.here[c] + offset;
                if (new_line<T>(d / QK)) {
                    rows.prefetch(c, offset);
                }
                const vf scale = set1(block_scale<T>(p));
                const vf low = set1(block_low<T>(p));
                for (int v = 0; v < QK / W; v++) {
                    store(out + c * w.dim_v + d + v * W, fma(values<T>(p, v), scale, low));
                }
            }
        } else {
            for (int d = 0; d < w.dim_v; d += W) {
                if (d % 32 == 0) {
                    rows.prefetch(c, d * 2);
                }
                store(out + c * w.dim_v + d, values<T>(rows.here[c] + d * 2, 0));
            }
        }
    }
    const size_t ld = w.dim_v;
    const size_t ld_v = there ? w.dim_k : w.dim_v;
    const gemm_args g = { w.mem.s, 1, (size_t) w.it.rows_pad, out, ld_v, w.mem.acc, ld, w.mem.beta, n };
    gemm(g, w.it.rows, w.dim_v);
}

template <ggml_type T> inline void wide_values(const work & w, int n) {
#if INTACTKV_X86 >= 2
    if constexpr (block<T>::quant) {
        wide_values_quant<T>(w, n);
        return;
    }
#endif
    wide_values_float<T>(w, n);
}

template <ggml_type T> inline void values_of(const work & w, int n, int h) {
    w.it.wide ? wide_values<T>(w, n) : narrow_values<T>(w, n, h);
}

// In V's type, of this tile: F16 if its cells are intact.
inline void accumulate(const work & w, const tile & t, int h) {
    for_type(w.mem.v_rows.f16 ? GGML_TYPE_F16 : w.call.v.type, [&](auto kv) { values_of<kv.type>(w, t.n, h); });
}

} // namespace
} // namespace intactkv
