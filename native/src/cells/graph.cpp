#include "cells/graph.h"

#include "cells/arena.h"
#include "attention/attention.h"

#include "llama-cparams.h"
#include "llama-hparams.h"

#include "ggml-backend.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace intactkv {

// With a tail the number of intact cells grows with the first tokens. Lists have room for some more, so that not every one
// of these needs a graph of its own.
static int64_t n_listed(const arena & a, uint32_t n_intact) {
    constexpr int64_t STEP = 64;
    return a.tail() > 0 ? (std::max<int64_t>(n_intact, 1) + STEP - 1) / STEP * STEP : n_intact;
}

void graph_cells::build(
        ggml_context * ctx, const cells_view & view, ggml_tensor * mask, ggml_tensor * k_cells, ggml_tensor * v_cells) {
    a = view.a;
    borrower = view.borrower;
    this->mask = mask;
    this->k_cells = k_cells;
    this->v_cells = v_cells;
    if (a == nullptr) {
        return;
    }
    gen = a->generation();

    const auto input = [&](ggml_type type, int64_t ne0, int64_t ne1, const char * name) {
        ggml_tensor * t = ggml_new_tensor_2d(ctx, type, ne0, ne1);
        ggml_set_input(t);
        ggml_set_name(t, name);
        return t;
    };
    if (const int64_t n = n_listed(*a, a->map_cells(view.s0, view.s1, view.n_kv, nullptr))) {
        rows = input(GGML_TYPE_I32, n, 1, "intact_rows");
        cells = input(GGML_TYPE_I64, n, 1, "intact_cells");
        row_of_cell = input(GGML_TYPE_I32, view.n_kv, view.s1 - view.s0 + 1, "intact_row_of_cell");
    }
    if (a->tail() > 0 && borrower == nullptr) {
        new_rows = input(GGML_TYPE_I64, k_cells->ne[0], 1, "intact_new_rows");
    }
}

// a tensor that no layer of the graph uses is not allocated
static void * data_of(ggml_tensor * t) {
    GGML_ASSERT(t == nullptr || t->buffer == nullptr || ggml_backend_buffer_is_host(t->buffer));
    return t && t->buffer ? t->data : nullptr;
}

void graph_cells::set_input(const cells_view & view) const {
    if (int32_t * map = (int32_t *) data_of(row_of_cell)) {
        view.a->map_cells(view.s0, view.s1, view.n_kv, map);
    }

    if (int32_t * row = (int32_t *) data_of(rows)) {
        int64_t * cell = (int64_t *) data_of(cells);

        std::vector<int32_t> map(ggml_nelements(row_of_cell));
        const uint32_t n_intact = view.a->map_cells(view.s0, view.s1, view.n_kv, map.data());
        GGML_ASSERT(n_intact > 0 && n_intact <= ggml_nelements(rows));

        uint32_t n = 0;
        for (size_t i = 0; i < map.size(); ++i) {
            if (map[i] >= 0) {
                row[n] = map[i];
                cell[n++] = i;
            }
        }
        std::fill(row + n, row + ggml_nelements(rows), row[n - 1]);
        std::fill(cell + n, cell + ggml_nelements(rows), cell[n - 1]);
    }

    if (int64_t * row = (int64_t *) data_of(new_rows)) {
        for (size_t s = 0; s < view.idxs->size(); ++s) {
            for (const uint32_t cell : (*view.idxs)[s]) {
                *row++ = view.a->row_of((*view.strm)[s], cell);
            }
        }
        GGML_ASSERT(row == (int64_t *) new_rows->data + ggml_nelements(new_rows));
    }
}

bool graph_cells::can_reuse(const cells_view & view) const {
    if (a != view.a || a == nullptr) {
        return a == view.a;
    }
    if (gen != a->generation()) {
        return false;
    }
    // only the lists depend on how many cells are intact, and the fused kernel reads none
    if (rows != nullptr && a->tail() > 0 && rows->buffer == nullptr) {
        return true;
    }
    return (rows ? rows->ne[0] : 0) == n_listed(*a, a->map_cells(view.s0, view.s1, view.n_kv, nullptr));
}

// t: [head_dim, n_kv, n_head_kv, n_stream], permuted from how the cache stores it
static ggml_tensor * write_over(
        ggml_context * ctx, ggml_tensor * t, ggml_tensor * arena_rows, ggml_tensor * rows, ggml_tensor * cells) {
    if (arena_rows == nullptr) {
        return t;
    }
    t = ggml_permute(ctx, t, 0, 2, 1, 3);
    // get_rows widens the F16 rows to F32 and build_attn_mha rounds back to F16: exact both ways
    ggml_tensor * res = ggml_cast(ctx, t, GGML_TYPE_F32);
    res = ggml_reshape_2d(ctx, res, t->ne[0] * t->ne[1], t->ne[2] * t->ne[3]);
    res = ggml_set_rows(ctx, res, ggml_get_rows(ctx, arena_rows, rows), cells);
    res = ggml_reshape_4d(ctx, res, t->ne[0], t->ne[1], t->ne[2], t->ne[3]);
    return ggml_permute(ctx, res, 0, 2, 1, 3);
}

// V of latents: the first values of each row
static ggml_tensor * part_of(ggml_context * ctx, ggml_tensor * k, const ggml_tensor & v) {
    return ggml_view_4d(ctx, k, v.ne[0], k->ne[1], k->ne[2], k->ne[3], k->nb[1], k->nb[2], k->nb[3], 0);
}

// as build_attn_mha() has it: [head_dim, n_tokens, n_head, n_stream]
static ggml_tensor permuted(const ggml_tensor & t, int64_t n_stream) {
    ggml_tensor res = t;
    res.ne[1] = t.ne[2] / n_stream;
    res.nb[1] = t.nb[2];
    res.ne[2] = t.ne[1];
    res.nb[2] = t.nb[1];
    res.ne[3] = n_stream;
    res.nb[3] = t.nb[2] * res.ne[1];
    return res;
}

layer_attention graph_cells::layer(int32_t il, const llama_cparams & cparams, const ggml_tensor * bias,
        const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * v, const ggml_tensor * sinks) const {
    if (borrower && a) {
        il = a->own_layer(*borrower, il);
    }
    if (a == nullptr || il < 0 || cparams.training) {
        return {};
    }
    layer_attention res(*this, il, bias == nullptr && a->fused(il, cparams));
    if (!res.is_fused || k == nullptr || v == nullptr) {
        return res;
    }
    ggml_tensor * k_cache = a->cache_k(il);
    ggml_tensor * v_cache = a->cache_v(il);
    const bool latents = a->has_latents();
    if (!fused_store_supported(k_cache, k, latents) || (!latents && !fused_store_supported(v_cache, v))) {
        return res;
    }
    // what build_attn_mha() will be given, and attend() will ask about once more
    const int64_t n_stream = mask->ne[3];
    ggml_tensor q4 = permuted(*q, n_stream);
    ggml_tensor k4 = *k_cache;
    ggml_tensor v4 = latents ? *k_cache : *v_cache;
    if (latents) {
        k4.view_src = v4.view_src = k_cache;
    }
    for (auto [t, cur] : { std::pair(&k4, k), std::pair(&v4, v) }) {
        t->ne[0] = cur->ne[0];
        t->ne[1] = k_cache->ne[1];
        t->ne[2] = cur->ne[1];
        t->ne[3] = n_stream;
    }
    res.is_whole = fused_supported(&q4, &k4, &v4, mask, sinks);
    return res;
}

bool layer_attention::store(ggml_cgraph * gf, ggml_context * ctx, ggml_tensor * k, ggml_tensor * v) const {
    if (cells == nullptr) {
        return false;
    }
    const arena & a = *cells->a;
    ggml_tensor * new_rows = cells->new_rows;
    if (is_whole) {
        const row_target tail = { a.layer(il).k, a.layer(il).v, new_rows };
        ggml_build_forward_expand(gf,
                fused_store(ctx, a.cache_k(il), a.cache_v(il), k, v, cells->k_cells, cells->v_cells, a.rotation(),
                        new_rows ? &tail : nullptr));
        return true;
    }
    for (auto [arena_rows, cur] : { std::pair(a.layer(il).k, k), std::pair(a.layer(il).v, v) }) {
        if (new_rows && arena_rows && cur) {
            cur = ggml_view_2d(ctx, cur, cur->ne[0] * cur->ne[1], cur->ne[2], cur->nb[2], 0);
            ggml_build_forward_expand(gf, ggml_set_rows(ctx, arena_rows, cur, new_rows));
        }
    }
    return false;
}

ggml_tensor * layer_attention::attend(ggml_context * ctx, ggml_tensor * q, ggml_tensor *& k, ggml_tensor *& v,
        ggml_tensor * mask, ggml_tensor * sinks, float scale) const {
    if (cells == nullptr) {
        return nullptr;
    }
    const arena & a = *cells->a;
    const bool has_intact = cells->rows != nullptr;

    const bool fused = is_fused && fused_supported(q, k, v, mask, sinks);
    GGML_ASSERT(fused || !is_whole);
    if (fused) {
        const llama_hparams & hparams = a.hparams();
        const arena_layer & rows = a.layer(il);
        const intact_rows intact = { rows.k, a.has_latents() ? rows.k : rows.v, cells->row_of_cell };

        return fused_attention(ctx, q, k, v, mask, sinks, has_intact ? &intact : nullptr,
                is_whole ? a.rotation() : fused_rotation{}, scale, hparams.f_max_alibi_bias,
                hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f);
    }

    if (has_intact) {
        k = write_over(ctx, k, a.layer(il).k, cells->rows, cells->cells);
        v = a.has_latents() ? part_of(ctx, k, *v) : write_over(ctx, v, a.layer(il).v, cells->rows, cells->cells);
    }
    return nullptr;
}

ggml_tensor * merge_heads(ggml_context * ctx, ggml_tensor * attention, ggml_tensor * v_mla) {
    ggml_tensor * res = attention;
    if (v_mla) { // one matrix a head: heads outermost
        res = ggml_mul_mat(ctx, v_mla, ggml_permute(ctx, res, 0, 2, 1, 3));
        res = ggml_cont(ctx, ggml_permute(ctx, res, 0, 2, 1, 3));
    }
    return ggml_reshape_2d(ctx, res, res->ne[0] * res->ne[1], res->ne[2] * res->ne[3]);
}

} // namespace intactkv
