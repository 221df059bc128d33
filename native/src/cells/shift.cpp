#include "cells/shift.h"

#include "cells/arena.h"

#include "llama-hparams.h"
#include "llama-impl.h"

#include "ggml-backend.h"

#include <iterator>
#include <map>
#include <utility>
#include <vector>

namespace intactkv {

void before_shift(arena & a) {
    // row -> shift -> cells
    std::map<int32_t, std::map<llama_pos, std::vector<std::pair<uint32_t, uint32_t>>>> by_row;
    a.each_intact([&](uint32_t s, uint32_t i, int32_t row) { by_row[row][a.shift_of(s, i)].emplace_back(s, i); });

    std::vector<uint8_t> buf;
    for (const auto & [row, by_shift] : by_row) {
        // the first group keeps the row
        for (auto it = std::next(by_shift.begin()); it != by_shift.end(); ++it) {
            const uint32_t copy = a.take_rows(1)[0];
            for (const auto & layer : a.all_layers()) {
                for (ggml_tensor * t : { layer.k, layer.v }) {
                    if (t) {
                        buf.resize(t->nb[1]);
                        ggml_backend_tensor_get(t, buf.data(), row * t->nb[1], t->nb[1]);
                        ggml_backend_tensor_set(t, buf.data(), copy * t->nb[1], t->nb[1]);
                    }
                }
            }
            for (const auto & [s, i] : it->second) {
                a.mark(s, i, copy);
            }
        }
    }
}

// row -> by how many positions it moves
static std::map<int32_t, llama_pos> moved_rows(const arena & a) {
    std::map<int32_t, llama_pos> res;
    a.each_intact([&](uint32_t s, uint32_t i, int32_t row) {
        if (const llama_pos shift = a.shift_of(s, i)) {
            res[row] = shift;
        }
    });
    return res;
}

ggml_tensor * build_input_shift(const arena & a, ggml_context * ctx) {
    const int64_t n = moved_rows(a).size();
    if (n == 0) {
        return nullptr;
    }
    ggml_tensor * moves = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n, 2);
    ggml_set_input(moves);
    ggml_set_name(moves, "intact_moves");
    return moves;
}

void set_input_shift(const arena & a, ggml_tensor * moves) {
    GGML_ASSERT(ggml_backend_buffer_is_host(moves->buffer));
    int32_t * row = (int32_t *) moves->data;
    int32_t * shift = row + moves->ne[0];
    for (const auto & [r, by] : moved_rows(a)) {
        *row++ = r;
        *shift++ = by;
    }
}

void build_shift(const arena & a, ggml_cgraph * gf, ggml_context * ctx, int32_t il, ggml_tensor * moves,
        ggml_tensor * rot, const rope_fn & rope) {
    ggml_tensor * k = a.layer(il).k;
    if (k == nullptr) {
        return;
    }
    const int64_t n = moves->ne[0];
    ggml_tensor * rows = ggml_view_1d(ctx, moves, n, 0);
    ggml_tensor * shift = ggml_view_1d(ctx, moves, n, moves->nb[1]);

    ggml_tensor * cur = ggml_get_rows(ctx, k, rows);
    cur = ggml_reshape_3d(ctx, cur, a.hparams().n_embd_head_k(il), a.hparams().n_head_kv(il), n);
    cur = rot ? llama_mul_mat_hadamard(ctx, cur, rot) : cur;
    cur = rope(cur, shift);
    cur = rot ? llama_mul_mat_hadamard(ctx, cur, rot) : cur;
    ggml_build_forward_expand(gf, ggml_set_rows(ctx, k, ggml_reshape_2d(ctx, cur, k->ne[0], n), rows));
}

} // namespace intactkv
