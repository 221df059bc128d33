// The mask: which cells are seen at all, and what is added to the scores of the others (ALiBi: times the head's slope).
//
//   reads   call.mask, F16 [stream][head][token][cell]
//   writes  look(): live [cell]; load_mask(): mem.mask, narrow [token][cell], wide [cell][token]; add_mask(): mem.s
//
// Compiled once per instruction set, inside its anonymous namespace: see kernel-inl.h.

#pragma once

#include "attention/kernel/item-inl.h"
#include "attention/simd/vector-inl.h"

namespace intactkv {
namespace {

constexpr uint16_t F16_NEG_INF = 0xfc00; // a cell that is not seen

inline const uint16_t * mask_row(const work & w, int head, int token) {
    return (const uint16_t *) (w.call.mask + (w.it.token + token) * w.call.mask_nb_token +
            head % w.call.mask_heads * w.call.mask_nb_head + w.it.stream % w.call.mask_streams * w.call.mask_nb_stream);
}

// Which of n cells from c on does any query of the item see? true: some mask value is not 0. live: of those not 0.
inline bool look(const work & w, int c, int n, uint16_t * live) {
    if (!w.call.mask) {
        memset(live, 0xff, FUSED_TILE * sizeof(uint16_t));
        return false;
    }
    const int n_group = w.call.n_head / w.call.n_head_kv;
    const int first = w.call.mask_heads > 1 ? w.it.kv_head * n_group : 0;
    const int last = w.call.mask_heads > 1 ? (w.it.kv_head + w.it.kv_heads) * n_group : 1;
    constexpr int N = FUSED_TILE / (2 * W); // vectors of a row of the mask
    const vs unseen = vs{} + (int16_t) F16_NEG_INF;
    vs seen[N] = {}, any = {};
    for (int head = first; head < last; head++) {
        for (int i = 0; i < w.it.tokens; i++) {
            const uint16_t * m = mask_row(w, head, i) + c;
            // the rows are pages apart: the next tile's part of each would be waited for
            __builtin_prefetch(m + FUSED_TILE);
            __builtin_prefetch(m + FUSED_TILE + 32);
            uint16_t part[FUSED_TILE];
            if (n < FUSED_TILE) {
                memset(part, 0, sizeof(part));
                memcpy(part, m, n * sizeof(uint16_t));
                m = part;
            }
            for (int j = 0; j < N; j++) {
                const vs x = load_as<vs>(m + j * 2 * W);
                seen[j] |= (vs) (x != unseen);
                any |= x;
            }
        }
    }
    memcpy(live, seen, sizeof(seen));
    int16_t some = 0;
    for (int j = 0; j < 2 * W; j++) {
        some |= any[j];
    }
    return some != 0;
}

// From one row of mem.mask to the next.
inline int mask_ld(const work & w) {
    return w.it.wide ? round_up(w.it.tokens, W) : FUSED_TILE;
}

// The tile's mask values of one query head as floats, 0 in the padding.
inline void load_mask(const work & w, const tile & t, int head) {
    const int ld = mask_ld(w);
    memset(w.mem.mask, 0, sizeof(float) * ld * (w.it.wide ? t.n : w.it.tokens));
    for (int i = 0; i < w.it.tokens; i++) {
        const uint16_t * m = mask_row(w, head, i);
        for (int c = 0; c < t.n; c++) {
            w.mem.mask[w.it.wide ? c * ld + i : i * ld + c] = f16(m + t.cell[c]);
        }
    }
}

// To the scores of all rows of a KV head.
inline void add_mask(const work & w, const tile & t, int kv_head) {
    const int n_group = w.call.n_head / w.call.n_head_kv;
    const int ld = mask_ld(w);
    for (int g = 0; g < w.it.heads; g++) {
        const int head = kv_head * n_group + w.it.head + g;
        if (w.call.mask_heads > 1) {
            load_mask(w, t, head);
        }
        const vf slope = set1(fused_slope(w.call.max_bias, w.call.n_head, head) * FUSED_LOG2E);
        if (w.it.wide) {
            // the padding behind the last token adds 0 to rows of the next head
            for (int c = 0; c < t.n; c++) {
                for (int i = 0; i < ld; i += W) {
                    float * s = w.mem.s + c * w.it.rows_pad + g * w.it.tokens + i;
                    store(s, fma(slope, load(w.mem.mask + c * ld + i), load(s)));
                }
            }
        } else {
            for (int i = 0; i < w.it.tokens; i++) {
                for (int c = 0; c < t.n; c += W) {
                    float * s = w.mem.s + (g * w.it.tokens + i) * FUSED_TILE + c;
                    store(s, fma(slope, load(w.mem.mask + i * ld + c), load(s)));
                }
            }
        }
    }
}

} // namespace
} // namespace intactkv
