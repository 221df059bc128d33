// Scores: Q times K of a tile's cells, for all rows of one KV head.
//
//   reads   mem.q, or mem.q8 with q_scale, q_sum, q_start; K of the cells at mem.k_rows
//   writes  mem.s: narrow [row][cell, FUSED_TILE], cells in lanes; wide [cell][row, rows_pad], rows in lanes
//   between mem.k8, k_scale, k_low, or mem.k: K of the tile, expanded once where many rows read it
//
// Quantized K meets Q in integer dot products: narrow, W cells at a time are transposed, so that a lane is a cell.
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

constexpr int SCORE_ROWS = W >= 16 ? 8 : 4; // rows up to which quantized K stays in registers

// K of the tile, transposed: [dim_k/4][cell, cells_max][4]; its scales and lows [block][cell, cells_max].
template <ggml_type T> inline void pack_k(const work & w, int n, int h) {
    const int n_block = w.dim_k / QK;
    const int n_pad = round_up(n, W);
    const row_list rows(w.mem.k_rows, h, n_pad);
    for (int b = 0; b < n_block; b++) {
        const size_t offset = b * block<T>::bytes;
        for (int c = 0; c < n_pad; c += W) {
            store(w.mem.k_scale + b * w.cells_max + c, gather_f16(rows.here + c, offset));
            if constexpr (block<T>::min) {
                store(w.mem.k_low + b * w.cells_max + c, gather_f16(rows.here + c, offset + 2));
            }
            for (int i = 0; new_line<T>(b) && i < W; i++) {
                rows.prefetch(c + i, offset);
            }
            vi dwords[QK / 4];
            transpose<T>(rows.here + c, offset, dwords);
            for (int j = 0; j < QK / 4; j++) {
                store(w.mem.k8 + ((b * (QK / 4) + j) * w.cells_max + c) * 4, dwords[j]);
            }
        }
    }
}

// Scores of R rows with the cells' blocks transposed in registers, W cells at a time.
template <ggml_type T, int R> inline void narrow_scores_quant_rows(const work & w, int n, int h) {
    const int n_block = w.dim_k / QK;
    const row_list rows(w.mem.k_rows, h, round_up(n, W));
    const uint8_t * q = w.mem.q8 + h * R * w.dim_k;
    const float * q_scale = w.mem.q_scale + h * R * n_block;
    const float * q_sum = w.mem.q_sum + h * R * n_block;
    const int32_t * q_start = w.mem.q_start + h * R * n_block;
    for (int c = 0; c < n; c += W) {
        vf s[R] = {};
        for (int b = 0; b < n_block; b++) {
            const size_t offset = b * block<T>::bytes;
            const vf scale = gather_f16(rows.here + c, offset);
            for (int i = 0; new_line<T>(b) && i < W; i++) {
                rows.prefetch(c + i, offset);
            }
            vi dwords[QK / 4], acc[R];
            transpose<T>(rows.here + c, offset, dwords);
            for (int r = 0; r < R; r++) {
                acc[r] = set1(q_start[r * n_block + b]);
            }
            for (int j = 0; j < QK / 4; j++) {
                for (int r = 0; r < R; r++) {
                    acc[r] = dot4(acc[r], dwords[j], set1(load_as<int32_t>(q + r * w.dim_k + b * QK + j * 4)));
                }
            }
            for (int r = 0; r < R; r++) {
                s[r] = fma(to_float(acc[r]), scale * q_scale[r * n_block + b], s[r]);
            }
            if constexpr (block<T>::min) {
                const vf low = gather_f16(rows.here + c, offset + 2);
                for (int r = 0; r < R; r++) {
                    s[r] = fma(low, set1(q_sum[r * n_block + b]), s[r]);
                }
            }
        }
        for (int r = 0; r < R; r++) {
            store(w.mem.s + r * FUSED_TILE + c, s[r]);
        }
    }
}

// Of more rows: the cells are transposed once for all.
template <ggml_type T> inline void narrow_scores_quant_many(const work & w, int n, int h) {
    pack_k<T>(w, n, h);
    const int row0 = h * w.it.rows;
    const int n_block = w.dim_k / QK;
    const idot_args g = {
        w.mem.q8 + row0 * w.dim_k,
        (size_t) w.dim_k,
        w.mem.k8,
        (size_t) w.cells_max,
        w.mem.q_scale + row0 * n_block,
        w.mem.k_scale,
        block<T>::min ? w.mem.q_sum + row0 * n_block : nullptr,
        w.mem.k_low,
        w.mem.q_start + row0 * n_block,
        w.mem.s,
        FUSED_TILE,
        n_block,
    };
    idot<false>(g, w.it.rows, round_up(n, W));
}

// The number of rows as a constant: R, or fewer, or too many.
template <ggml_type T, int R = SCORE_ROWS> inline void narrow_scores_quant(const work & w, int n, int h) {
    if (w.it.rows == R) {
        narrow_scores_quant_rows<T, R>(w, n, h);
    } else if constexpr (R > 1) {
        narrow_scores_quant<T, R - 1>(w, n, h);
    } else {
        narrow_scores_quant_many<T>(w, n, h);
    }
}

// Four cells at a time, for the sums over their lanes. Behind the last cell it comes once more.
template <ggml_type T, int R>
inline void narrow_scores_float_rows(const work & w, const row_list & rows, int n, int h, int r0) {
    const float * q = w.mem.q + (h * w.it.rows + r0) * w.dim_k;
    for (int c = 0; c < n; c += 4) {
        vf acc[R][4] = {};
        for (int d = 0; d < w.dim_k; d += W) {
            vf k[4];
            for (int i = 0; i < 4; i++) {
                if (r0 == 0 && d % 32 == 0) {
                    rows.prefetch(c + i, d * 2);
                }
                k[i] = values<T>(rows.here[c + i] + d * 2, 0);
            }
            for (int r = 0; r < R; r++) {
                const vf qr = load(q + r * w.dim_k + d);
                for (int i = 0; i < 4; i++) {
                    acc[r][i] = fma(k[i], qr, acc[r][i]);
                }
            }
        }
        for (int r = 0; r < R; r++) {
            sum4(acc[r], w.mem.s + (r0 + r) * FUSED_TILE + c);
        }
    }
}

template <ggml_type T> inline void narrow_scores_float(const work & w, int n, int h) {
    const row_list rows(w.mem.k_rows, h, round_up(n, 4));
    int r = 0;
    for (; r + 4 <= w.it.rows; r += 4) {
        narrow_scores_float_rows<T, 4>(w, rows, n, h, r);
    }
    switch (w.it.rows - r) {
        case 3: narrow_scores_float_rows<T, 3>(w, rows, n, h, r); break;
        case 2: narrow_scores_float_rows<T, 2>(w, rows, n, h, r); break;
        case 1: narrow_scores_float_rows<T, 1>(w, rows, n, h, r); break;
    }
}

// K in bytes [cell][dim_k], with Q's rows in lanes.
template <ggml_type T> inline void wide_scores_quant(const work & w, int n) {
    const int n_block = w.dim_k / QK;
    const row_list rows(w.mem.k_rows, 0, n);
    for (int c = 0; c < n; c++) {
        for (int b = 0; b < n_block; b++) {
            const uint8_t * p = rows.here[c] + b * block<T>::bytes;
            if (new_line<T>(b)) {
                rows.prefetch(c, b * block<T>::bytes);
            }
            unpack<T, K_BIAS>(p, w.mem.k8 + c * w.dim_k + b * QK);
            w.mem.k_scale[c * n_block + b] = f16(p);
            if constexpr (block<T>::min) {
                w.mem.k_low[c * n_block + b] = f16(p + 2);
            }
        }
    }
    const idot_args g = {
        w.mem.k8,
        (size_t) w.dim_k,
        w.mem.q8,
        (size_t) w.it.rows_pad,
        w.mem.k_scale,
        w.mem.q_scale,
        block<T>::min ? w.mem.k_low : nullptr,
        w.mem.q_sum,
        w.mem.q_start,
        w.mem.s,
        (size_t) w.it.rows_pad,
        n_block,
    };
    idot<true>(g, n, w.it.rows_pad);
}

// K in floats [cell][dim_k].
template <ggml_type T> inline void wide_scores_float(const work & w, int n) {
    const row_list rows(w.mem.k_rows, 0, n);
    for (int c = 0; c < n; c++) {
        for (int d = 0; d < w.dim_k; d += W) {
            if (d % 32 == 0) {
                rows.prefetch(c, d * 2);
            }
            store(w.mem.k + c * w.dim_k + d, values<T>(rows.here[c] + d * 2, 0));
        }
    }
    const size_t ld = w.it.rows_pad;
    const gemm_args g = { w.mem.k, (size_t) w.dim_k, 1, w.mem.q, ld, w.mem.s, ld, nullptr, w.dim_k };
    gemm(g, n, w.it.rows_pad);
}

template <ggml_type T> inline void scores_of(const work & w, int n, int h) {
    if constexpr (block<T>::quant) {
        w.it.wide ? wide_scores_quant<T>(w, n) : narrow_scores_quant<T>(w, n, h);
    } else {
        w.it.wide ? wide_scores_float<T>(w, n) : narrow_scores_float<T>(w, n, h);
    }
}

// In K's type, of this tile: F16 if its cells are intact.
inline void scores(const work & w, const tile & t, int h) {
    for_type(w.mem.k_rows.f16 ? GGML_TYPE_F16 : w.call.k.type, [&](auto kv) { scores_of<kv.type>(w, t.n, h); });
    if (w.call.softcap != 0.0f) {
        const int n_row = w.it.wide ? t.n : w.it.rows;
        const int n_col = w.it.wide ? w.it.rows_pad : round_up(t.n, W);
        const int ld = w.it.wide ? w.it.rows_pad : FUSED_TILE;
        for (int i = 0; i < n_row; i++) {
            for (int j = 0; j < n_col; j += W) {
                store(w.mem.s + i * ld + j, tanh(load(w.mem.s + i * ld + j)) * (w.call.softcap * FUSED_LOG2E));
            }
        }
    }
}

} // namespace
} // namespace intactkv
