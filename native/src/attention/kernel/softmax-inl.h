// The online softmax: scores become weights, mem.beta what earlier results are scaled by.
//
//   reads   mem.s, narrow [row][cell] or wide [cell][row], as exponents of 2
//   writes  mem.s: 2^(score - the row's maximum so far); mem.max and mem.sum [KV head][row], brought along;
//           mem.beta [row]: 2^(old maximum - new maximum)
//
// A row that has seen no cell keeps the maximum -inf.
//
// Compiled once per instruction set, inside its anonymous namespace: see kernel-inl.h.

#pragma once

#include "attention/kernel/item-inl.h"
#include "attention/simd/vector-inl.h"

namespace intactkv {
namespace {

// In the place of -inf, where something is subtracted from it or it from something: -inf - LOWEST is not NaN.
constexpr float LOWEST = -3.0e38f;

inline float lowest(float m) {
    return m > LOWEST ? m : LOWEST;
}

inline void narrow_softmax(const work & w, int n, int row0) {
    const int n_pad = round_up(n, W);
    for (int r = 0; r < w.it.rows; r++) {
        float * s = w.mem.s + r * FUSED_TILE;
        for (int c = n; c < n_pad; c++) {
            s[c] = -__builtin_inff();
        }
        vf m = load(s);
        for (int c = W; c < n_pad; c += W) {
            m = max(m, load(s + c));
        }
        const float here = max_of(m), before = w.mem.max[row0 + r];
        const float now = here > before ? here : before;
        const float ref = lowest(now);
        vf total = {};
        for (int c = 0; c < n_pad; c += W) {
            const vf p = exp2_neg(load(s + c) - ref);
            total += p;
            store(s + c, p);
        }
        w.mem.beta[r] = here > before ? exp2_neg(set1(lowest(before) - ref))[0] : 1.0f;
        w.mem.max[row0 + r] = now;
        w.mem.sum[row0 + r] = w.mem.sum[row0 + r] * w.mem.beta[r] + sum(total);
    }
}

inline void wide_softmax(const work & w, int n) {
    for (int r = 0; r < w.it.rows_pad; r += W) {
        float * s = w.mem.s + r;
        const vf old = load(w.mem.max + r);
        vf m = old;
        for (int c = 0; c < n; c++) {
            m = max(m, load(s + c * w.it.rows_pad));
        }
        const vf ref = max(set1(LOWEST), m);
        const vf beta = exp2_neg(max(set1(LOWEST), old) - ref);
        vf total = {};
        for (int c = 0; c < n; c++) {
            const vf p = exp2_neg(load(s + c * w.it.rows_pad) - ref);
            total += p;
            store(s + c * w.it.rows_pad, p);
        }
        store(w.mem.beta + r, beta);
        store(w.mem.max + r, m);
        store(w.mem.sum + r, fma(load(w.mem.sum + r), beta, total));
    }
}

} // namespace
} // namespace intactkv
