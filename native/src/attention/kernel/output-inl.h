// Results: what the item has found, divided by the sums of its weights; or, of split cells, as it is.
//
//   reads   mem.acc [KV head][row][dim_v], mem.max and mem.sum [KV head][row], call.sinks [head]
//   writes  call.out [stream][token][head][dim_v], rotated back; or, if the plan has several chunks, a partial result
//           [stream][chunk][token][head][maximum, sum, values of dim_v], which merge() (attention.cpp) reads
//
// Compiled once per instruction set, inside its anonymous namespace: see kernel-inl.h.

#pragma once

#include "attention/kernel/item-inl.h"
#include "attention/kernel/softmax-inl.h"
#include "attention/simd/rows-inl.h"
#include "attention/simd/vector-inl.h"

namespace intactkv {
namespace {

inline void write(const work & w) {
    const int n_group = w.call.n_head / w.call.n_head_kv;
    const bool partial = w.call.plan.n_chunk > 1;
    const size_t size = w.dim_v + (partial ? FUSED_PARTIAL : 0);
    for (int h = 0; h < w.it.kv_heads; h++) {
        for (int r = 0; r < w.it.rows; r++) {
            const int row = h * w.it.rows + r;
            const int head = (w.it.kv_head + h) * n_group + w.it.head + r / w.it.tokens;
            const int token = w.it.token + r % w.it.tokens;
            const float * acc = w.mem.acc + row * w.dim_v;
            size_t at = (size_t) w.it.stream * w.call.plan.n_chunk + w.it.cell / w.call.plan.chunk_cells;
            at = (at * w.call.n_tokens + token) * w.call.n_head + head;
            float * out = w.call.out + at * size;
            float scale = 1.0f;
            if (partial) {
                out[0] = w.mem.max[row];
                out[1] = w.mem.sum[row];
                out += FUSED_PARTIAL;
            } else {
                // a sink is one more score, of a cell without a value
                float total = w.mem.sum[row];
                if (w.call.sinks) {
                    const float sink = w.call.sinks[head] * FUSED_LOG2E;
                    const float ref = lowest(sink > w.mem.max[row] ? sink : w.mem.max[row]);
                    scale = exp2_neg(set1(lowest(w.mem.max[row]) - ref))[0];
                    total = total * scale + exp2_neg(set1(lowest(sink) - ref))[0];
                }
                scale = total == 0.0f ? 0.0f : scale / total;
            }
            for (int d = 0; d < w.dim_v; d += W) {
                store(out + d, load(acc + d) * scale);
            }
            if (!partial && w.call.rot_out > 0) {
                rotate(out, w.dim_v, w.call.rot_out);
            }
        }
    }
}

} // namespace
} // namespace intactkv
