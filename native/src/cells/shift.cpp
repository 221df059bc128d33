#include "cells/shift.h"

#include "attention/rows.h"
#include "attention/store.h"
#include "cells/arena.h"

#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-kv-cells.h"

#include "ggml-backend.h"

#include <cmath>
#include <map>
#include <utility>
#include <vector>

namespace intactkv {

void before_shift(arena * a) {
    if (a == nullptr || a->empty()) {
        return;
    }
    // row -> shift -> cells
    std::map<int32_t, std::map<llama_pos, std::vector<std::pair<uint32_t, uint32_t>>>> by_row;
    a->each_intact([&](uint32_t s, uint32_t i, int32_t row) { by_row[row][a->shift_of(s, i)].emplace_back(s, i); });

    // what goes on with a row of its own, by kind: the row and its cells
    std::vector<std::pair<int32_t, std::vector<std::pair<uint32_t, uint32_t>>>> parting[2];
    for (const auto & [row, by_shift] : by_row) {
        // the first group keeps the row; one that stays (is_held) is nobody's, only cells that do not move keep it
        for (auto it = by_shift.begin(); it != by_shift.end(); ++it) {
            if (a->is_held(row) ? it->first != 0 : it != by_shift.begin()) {
                parting[(int) a->kind_of(row)].emplace_back(row, it->second);
            }
        }
    }

    a->wait();
    std::vector<uint8_t> buf;
    for (const row_kind kind : { row_kind::kept, row_kind::tail }) {
        const auto & groups = parting[(int) kind];
        const std::vector<uint32_t> copies =
                kind == row_kind::tail ? a->take_rows(0, groups.size()) : a->take_rows(groups.size());
        std::vector<uint32_t> rows;
        for (size_t g = 0; g < groups.size(); ++g) {
            rows.push_back(groups[g].first);
            for (const auto & [s, i] : groups[g].second) {
                a->mark(s, i, copies[g], kind);
            }
        }
        for (const auto & layer : a->all_layers()) {
            for (ggml_tensor * t : { layer.k, layer.v }) {
                if (t) {
                    copy_rows(t, rows, copies, buf);
                }
            }
        }
    }
}

// row or cell -> by how many positions it moves
using moved = std::map<int32_t, llama_pos>;

static moved moved_rows(const arena & a) {
    moved res;
    a.each_intact([&](uint32_t s, uint32_t i, int32_t row) {
        if (const llama_pos shift = a.shift_of(s, i)) {
            res[row] = shift;
        }
    });
    return res;
}

static moved moved_cells(const arena & a) {
    moved res;
    for (uint32_t s = 0; s < a.n_streams(); ++s) {
        const llama_kv_cells & cells = a.cells_in(s);
        for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
            if (!cells.is_empty(i) && cells.get_shift(i) != 0) {
                res[s * a.n_stream_cells() + i] = cells.get_shift(i);
            }
        }
    }
    if (res.empty()) { // those that moved are gone, and a graph without a node cannot be computed
        res[a.n_streams() * a.n_stream_cells() - 1] = 0;
    }
    return res;
}

static ggml_tensor * build_moves(ggml_context * ctx, size_t n, const char * name) {
    if (n == 0) {
        return nullptr;
    }
    ggml_tensor * moves = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n, 2);
    ggml_set_input(moves);
    ggml_set_name(moves, name);
    return moves;
}

static void set_moves(ggml_tensor * moves, const moved & what) {
    GGML_ASSERT(ggml_backend_buffer_is_host(moves->buffer));
    int32_t * index = (int32_t *) moves->data;
    int32_t * shift = index + moves->ne[0];
    for (const auto & [i, by] : what) {
        *index++ = i;
        *shift++ = by;
    }
}

static bool has_rounded_k(const arena & a) {
    const std::vector<uint32_t> layers = a.layer_ids();
    return !layers.empty() && !is_exact(a.cache_k(layers[0])->type);
}

shift_inputs build_input_shift(const arena * a, ggml_context * ctx) {
    if (a == nullptr) {
        return {};
    }
    return { build_moves(ctx, moved_rows(*a).size(), "intact_moves"),
        build_moves(ctx, has_rounded_k(*a) ? moved_cells(*a).size() : 0, "intact_moved_cells") };
}

void set_input_shift(const arena * a, const shift_inputs & moves) {
    if (moves.rows && moves.rows->buffer) {
        set_moves(moves.rows, moved_rows(*a));
    }
    if (moves.cells && moves.cells->buffer) {
        set_moves(moves.cells, moved_cells(*a));
    }
}

// rows: F32 [n_embd_gqa, n] in the basis of the cache; returns them shifted, in this basis
static ggml_tensor * shifted(ggml_context * ctx, ggml_tensor * rows, const k_layer & layer, ggml_tensor * shift,
        ggml_tensor * rot, const rope_fn & rope) {
    ggml_tensor * k = ggml_reshape_3d(ctx, rows, layer.head_dim, layer.n_head, rows->ne[1]);
    k = rot ? llama_mul_mat_hadamard(ctx, k, rot) : k;
    if (layer.n_nope > 0) {
        const auto part = [&](int64_t from, int64_t n) {
            return ggml_view_3d(ctx, k, n, k->ne[1], k->ne[2], k->nb[1], k->nb[2], from * k->nb[0]);
        };
        k = ggml_concat(ctx, part(0, layer.n_nope), rope(part(layer.n_nope, layer.n_rot), shift), 0);
    } else {
        k = rope(k, shift);
    }
    k = rot ? llama_mul_mat_hadamard(ctx, k, rot) : k;
    return ggml_reshape_2d(ctx, k, rows->ne[0], rows->ne[1]);
}

// k: [n_embd_gqa, n]: rows of the arena, or cells; fitted: they are rounded as the kernel does it
static void build_row_shift(ggml_cgraph * gf, ggml_context * ctx, ggml_tensor * k, const k_layer & layer,
        ggml_tensor * moves, ggml_tensor * rot, const rope_fn & rope, bool fitted) {
    const int64_t n = moves->ne[0];
    ggml_tensor * rows = ggml_view_1d(ctx, moves, n, 0);
    ggml_tensor * shift = ggml_view_1d(ctx, moves, n, moves->nb[1]);

    ggml_tensor * cur = ggml_get_rows(ctx, k, rows);
    cur = shifted(ctx, cur, layer, shift, rot, rope);
    cur = fitted ? store_rows(ctx, k, cur, rows, layer.head_dim) : ggml_set_rows(ctx, k, cur, rows);
    ggml_build_forward_expand(gf, cur);
}

static bool upstream_shifts(const k_layer & layer, const ggml_tensor * rot) {
    if (!ggml_is_quantized(layer.cells->type)) {
        return is_exact(layer.cells->type);
    }
    return rot != nullptr && layer.n_rot == layer.head_dim;
}

static void build_cell_shift(ggml_cgraph * gf, ggml_context * ctx, const k_layer & layer, ggml_tensor * shift,
        ggml_tensor * rot, const rope_fn & rope) {
    ggml_tensor * cells = ggml_reshape_2d(ctx, layer.cells, layer.cells->ne[0], ggml_nrows(layer.cells));
    ggml_tensor * cur = ggml_cast(ctx, cells, GGML_TYPE_F32);
    cur = shifted(ctx, cur, layer, shift, rot, rope);
    ggml_build_forward_expand(gf, ggml_cpy(ctx, cur, cells));
}

bool build_shift(const arena * a, ggml_cgraph * gf, ggml_context * ctx, const k_layer & k, ggml_tensor * shift,
        const shift_inputs & moves, ggml_tensor * rot, const rope_fn & rope) {
    if (a && a->rotation().k == 0) { // upstream makes the matrix for every quantized cache, and does not use it for all
        rot = nullptr;
    }
    if (ggml_tensor * rows = moves.rows ? a->layer(k.il).k : nullptr) {
        build_row_shift(gf, ctx, rows, k, moves.rows, rot, rope, false);
    }
    if (moves.cells) {
        ggml_tensor * cells = ggml_reshape_2d(ctx, k.cells, k.cells->ne[0], ggml_nrows(k.cells));
        build_row_shift(gf, ctx, cells, k, moves.cells, rot, rope, a->stores_fitted());
        return true;
    }
    if (upstream_shifts(k, rot)) {
        return false;
    }
    build_cell_shift(gf, ctx, k, shift, rot, rope);
    return true;
}

float shift_attn_factor(float yarn_ext_factor, float freq_scale) {
    // what ggml multiplies it by (rope_yarn)
    return yarn_ext_factor == 0.0f ? 1.0f : 1.0f / (1.0f + 0.1f * logf(1.0f / freq_scale));
}

} // namespace intactkv
