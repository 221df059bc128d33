// Queries: scaled, so that scores come out in powers of 2, and laid out as the scores read them.
//
//   reads   call.q [stream][token][head][dim_k], rotated here if the cache is
//   writes  mem.q, where some K is F16 or BF16: narrow [KV head][row][dim_k], wide [dim_k][row]
//           mem.q8, q_scale, q_sum, q_start, where K is quantized: 8 bits per value, by blocks of 32
//
// Compiled once per instruction set, inside its anonymous namespace: see kernel-inl.h.

#pragma once

#include "attention/kernel/item-inl.h"
#include "attention/simd/blocks-inl.h"
#include "attention/simd/rows-inl.h"
#include "attention/simd/vector-inl.h"

namespace intactkv {
namespace {

inline const float * query(const work & w, int kv_head, int row) {
    const int head = kv_head * (w.call.n_head / w.call.n_head_kv) + w.it.head + row / w.it.tokens;
    const int token = w.it.token + row % w.it.tokens;
    return (const float *) (w.call.q + head * w.call.q_nb_head + token * w.call.q_nb_token +
            w.it.stream * w.call.q_nb_stream);
}

// 32 values of a row: rounded to 8 bits of the largest of them.
inline void load_query_block(const work & w, const float * q, float scale, int row, int b, int n_block) {
    const float amax = largest_of(q);
    const float inv = amax > 0.0f ? 127.0f / amax : 0.0f;
    int32_t bits[QK];
    for (int i = 0; i < QK; i += W) {
        store(bits + i, as_int(fma(load(q + i), set1(inv), set1(ROUNDER))) - ROUNDER_BITS);
    }
    int32_t total = 0;
    int8_t n[QK];
    for (int i = 0; i < QK; i++) {
        n[i] = (int8_t) bits[i];
        total += bits[i];
    }
    if (w.it.wide) {
        for (int j = 0; j < QK / 4; j++) {
            memcpy(w.mem.q8 + ((b * (QK / 4) + j) * w.it.rows_pad + row) * 4, n + j * 4, 4);
        }
    } else {
        memcpy(w.mem.q8 + row * w.dim_k + b * QK, n, QK);
    }
    const int at = w.it.wide ? b * w.it.rows_pad + row : row * n_block + b;
    w.mem.q_scale[at] = amax / 127.0f * scale;
    w.mem.q_sum[at] = w.mem.q_scale[at] * total;
    w.mem.q_start[at] = -K_BIAS * total;
}

// All rows of the item, once: for F16 and BF16 in floats, for a quantized K in bytes, for intact cells beside it in both.
inline void load_queries(const work & w) {
    const float scale = w.call.softcap != 0.0f ? w.call.scale / w.call.softcap : w.call.scale * FUSED_LOG2E;
    const int n_block = w.dim_k / QK;
    const bool bytes = w.call.k.type != GGML_TYPE_F16 && w.call.k.type != GGML_TYPE_BF16;
    const bool floats = !bytes || (w.call.row_of_cell && w.call.k.arena);
    const int step = w.it.wide ? w.it.rows_pad : 1;
    if (w.it.wide && w.it.rows_pad > w.it.rows) {
        memset(w.mem.q, 0, sizeof(float) * w.dim_k * w.it.rows_pad);
        memset(w.mem.q8, 0, w.dim_k * w.it.rows_pad);
        memset(w.mem.q_scale, 0, sizeof(float) * n_block * w.it.rows_pad);
        memset(w.mem.q_sum, 0, sizeof(float) * n_block * w.it.rows_pad);
        memset(w.mem.q_start, 0, sizeof(int32_t) * n_block * w.it.rows_pad);
    }
    for (int h = 0; h < w.it.kv_heads; h++) {
        for (int r = 0; r < w.it.rows; r++) {
            const int row = h * w.it.rows + r;
            const float * q = query(w, w.it.kv_head + h, r);
            alignas(64) float rotated[FUSED_LATENT_MAX];
            if (w.call.rot_q > 0) {
                memcpy(rotated, q, sizeof(float) * w.dim_k);
                rotate(rotated, w.dim_k, w.call.rot_q);
                q = rotated;
            }
            float * out = w.mem.q + (w.it.wide ? row : row * w.dim_k);
            for (int d = 0; floats && d < w.dim_k; d++) {
                out[d * step] = q[d] * scale;
            }
            for (int b = 0; bytes && b < n_block; b++) {
                load_query_block(w, q + b * QK, scale, row, b, n_block);
            }
        }
    }
}

} // namespace
} // namespace intactkv
