#include "cells.h"
#include "attention/attention.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>

namespace intactkv {

// F16 and F32 cells hold an F16 prefix exactly; every other type needs the arena
static bool is_exact(ggml_type type) {
    return type == GGML_TYPE_F16 || type == GGML_TYPE_F32;
}

// INTACTKV_ATTN, else the fastest that can read this cache: the fused kernel works on memory of the CPU only
static attention_kind choose_attention(bool on_cpu) {
    const char * env = getenv("INTACTKV_ATTN");
    if (env == nullptr || *env == 0) {
        return on_cpu ? attention_kind::fused : attention_kind::portable;
    }
    if (strcmp(env, "portable") == 0) {
        return attention_kind::portable;
    }
    if (strcmp(env, "stock") == 0) {
        return attention_kind::stock;
    }
    if (strcmp(env, "fused") != 0) {
        throw std::runtime_error(format("INTACTKV_ATTN is '%s': use fused, portable or stock, or unset it", env));
    }
    if (!on_cpu) {
        throw std::runtime_error("INTACTKV_ATTN is fused, but the KV cache is not in CPU memory: unset it, or keep the cache there (offload_kqv = false)");
    }
    return attention_kind::fused;
}

// none with all exponent bits set: an infinity, or not a number
static bool all_finite(const std::vector<ggml_fp16_t> & f16) {
    return std::none_of(f16.begin(), f16.end(), [](ggml_fp16_t x) { return (x & 0x7c00) == 0x7c00; });
}

//
// arena
//

void arena::attach(llama_kv_cache & kv) {
    if (kv.other == nullptr) {
        kv.intact = std::make_shared<arena>(kv);
    }
}

arena::arena(llama_kv_cache & kv) :
    kv(kv),
    kind(choose_attention(std::all_of(kv.layers.begin(), kv.layers.end(), [](const auto & layer) {
        return ggml_backend_buffer_get_type(layer.k->buffer) == ggml_backend_cpu_buffer_type();
    }))),
    layers(kv.layers.size()) {
}

const char * arena::attention_now() const {
    const bool f32 = std::any_of(kv.layers.begin(), kv.layers.end(), [](const auto & layer) {
        return layer.k->type == GGML_TYPE_F32 || layer.v->type == GGML_TYPE_F32;
    });
    return fused() && !f32 ? "fused" : n_cells(-1) > 0 ? "portable" : "stock";
}

const arena_layer & arena::layer(int32_t il) const {
    return layers[kv.map_layer_ids.at(il)];
}

ggml_tensor * arena::cache_k(int32_t il) const {
    return kv.layers[kv.map_layer_ids.at(il)].k;
}

ggml_tensor * arena::cache_v(int32_t il) const {
    return kv.layers[kv.map_layer_ids.at(il)].v;
}

const llama_hparams & arena::hparams() const {
    return kv.hparams;
}

fused_rotation arena::rotation() const {
    fused_rotation res;
    if (kv.attn_rot_k) {
        for (res.k = 64; kv.n_embd_head_k_all % (2*res.k) == 0;) {
            res.k *= 2;
        }
    }
    if (kv.attn_rot_v) {
        res.v = 64;
    }
    return res;
}

template <typename F> void arena::each_intact(F && f) const {
    for (uint32_t s = 0; n_rows > 0 && s < kv.v_cells.size(); ++s) {
        const auto & cells = kv.v_cells[s];
        const uint32_t n = cells.used_max_p1();
        for (uint32_t i = 0; i < n; ++i) {
            if (!cells.is_empty(i) && cells.ext_get(i).intact >= 0) {
                f(s, i, cells.ext_get(i).intact);
            }
        }
    }
}

uint32_t arena::n_cells(int32_t seq_id) const {
    uint32_t res = 0;
    each_intact([&](uint32_t s, uint32_t i, int32_t) {
        res += seq_id < 0 || kv.v_cells[s].seq_has(i, seq_id);
    });
    return res;
}

size_t arena::n_bytes() const {
    size_t res = 0;
    for (const auto & cb : ctxs_bufs) {
        res += ggml_backend_buffer_get_size(cb.second.get());
    }
    return res;
}

void arena::add_memory(std::map<ggml_backend_buffer_type_t, size_t> & breakdown) const {
    for (const auto & cb : ctxs_bufs) {
        breakdown[ggml_backend_buffer_get_type(cb.second.get())] += ggml_backend_buffer_get_size(cb.second.get());
    }
}

uint32_t arena::map_cells(uint32_t s0, uint32_t s1, uint32_t n_kv, int32_t * rows) const {
    if (rows) {
        std::fill(rows, rows + (size_t) n_kv*(s1 - s0 + 1), -1);
    }
    uint32_t res = 0;
    for (uint32_t s = s0; n_rows > 0 && s <= s1; ++s) {
        const auto & cells = kv.v_cells[s];
        const uint32_t n = std::min(n_kv, cells.used_max_p1());
        for (uint32_t i = 0; i < n; ++i) {
            if (cells.is_empty(i) || cells.ext_get(i).intact < 0) {
                continue;
            }
            if (rows) {
                rows[(size_t) n_kv*(s - s0) + i] = cells.ext_get(i).intact;
            }
            res++;
        }
    }
    return res;
}

void arena::mark(uint32_t strm, uint32_t cell, int32_t row) {
    auto & cells = kv.v_cells[strm];
    llama_kv_cell_ext ext = cells.ext_get(cell);
    ext.intact = row;
    cells.ext_set(cell, ext);
}

std::vector<uint32_t> arena::take_rows(uint32_t n) {
    std::vector<bool> used(n_rows, false);
    uint32_t n_used = 0;
    each_intact([&](uint32_t, uint32_t, int32_t row) {
        n_used += !used[row];
        used[row] = true;
    });

    if (n_used + n > n_rows) {
        grow(n_used + n);
        used.resize(n_rows, false);
    }

    std::vector<uint32_t> res;
    for (uint32_t row = 0; res.size() < n; ++row) {
        if (!used[row]) {
            res.push_back(row);
        }
    }
    return res;
}

void arena::grow(uint32_t n_rows_new) {
    std::vector<arena_layer> layers_new(layers.size());
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctxs;

    auto new_rows = [&](const ggml_tensor * t, const char * name, uint32_t il) -> ggml_tensor * {
        if (t == nullptr || is_exact(t->type)) {
            return nullptr;
        }
        auto & ctx = ctxs[ggml_backend_buffer_get_type(t->buffer)];
        if (!ctx) {
            ctx.reset(ggml_init({ 2*layers.size()*ggml_tensor_overhead(), nullptr, true }));
        }
        ggml_tensor * rows = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, t->ne[0], n_rows_new);
        ggml_format_name(rows, "intact_%s_l%u", name, il);
        return rows;
    };

    for (size_t i = 0; i < layers.size(); ++i) {
        layers_new[i].k = new_rows(kv.layers[i].k, "k", kv.layers[i].il);
        layers_new[i].v = new_rows(kv.layers[i].v, "v", kv.layers[i].il);
    }

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs_new;
    for (auto & [buft, ctx] : ctxs) {
        ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft) };
        if (!buf) {
            throw std::runtime_error(format("failed to allocate the F16 rows of %u intact cells on %s", n_rows_new, ggml_backend_buft_name(buft)));
        }
        ggml_backend_buffer_clear(buf.get(), 0);
        ctxs_bufs_new.emplace_back(std::move(ctx), std::move(buf));
    }

    std::vector<uint8_t> rows;
    auto copy = [&](ggml_tensor * src, ggml_tensor * dst) {
        if (src && dst) {
            rows.resize(ggml_nbytes(src));
            ggml_backend_tensor_get(src, rows.data(), 0, rows.size());
            ggml_backend_tensor_set(dst, rows.data(), 0, rows.size());
        }
    };
    for (size_t i = 0; i < layers.size(); ++i) {
        copy(layers[i].k, layers_new[i].k);
        copy(layers[i].v, layers_new[i].v);
    }

    layers    = std::move(layers_new);
    ctxs_bufs = std::move(ctxs_bufs_new);
    n_rows    = n_rows_new;
    gen++;
}

//
// saving
//

arena::saved_cells arena::intact_in(uint32_t strm, const ranges_t & ranges) const {
    const auto & cells = kv.v_cells[strm];
    saved_cells res;
    uint32_t n = 0;
    for (const auto & range : ranges) {
        for (uint32_t i = range.first; i < range.second; ++i, ++n) {
            if (cells.ext_get(i).intact >= 0) {
                res.which.push_back(n);
                res.rows .push_back(cells.ext_get(i).intact);
            }
        }
    }
    return res;
}

bool arena::has_intact(uint32_t strm, const ranges_t & ranges) const {
    return n_rows > 0 && !intact_in(strm, ranges).rows.empty();
}

// u32 n, u32 position[n] (in the state's list of cells), then per layer K and V: u64 row size, n rows
// (row size 0: that side of the cache is exact)
void arena::write_state(llama_io_write_i & io, uint32_t strm, const ranges_t & ranges) const {
    const auto [which, rows] = intact_in(strm, ranges);

    const uint32_t n = which.size();
    io.write(&n, sizeof(n));
    io.write(which.data(), n*sizeof(uint32_t));

    std::vector<uint8_t> buf;
    for (const auto & layer : layers) {
        for (const ggml_tensor * t : { layer.k, layer.v }) {
            const uint64_t row_size = t ? t->nb[1] : 0;
            io.write(&row_size, sizeof(row_size));
            buf.resize(row_size);
            for (const int32_t row : rows) {
                if (t) {
                    ggml_backend_tensor_get(t, buf.data(), row*row_size, row_size);
                    io.write(buf.data(), row_size);
                }
            }
        }
    }
}

//
// position shift
//

void arena::before_shift() {
    std::map<int32_t, std::map<llama_pos, std::vector<std::pair<uint32_t, uint32_t>>>> by_row; // row -> shift -> cells
    each_intact([&](uint32_t s, uint32_t i, int32_t row) {
        by_row[row][kv.v_cells[s].get_shift(i)].emplace_back(s, i);
    });

    std::vector<uint8_t> buf;
    for (const auto & [row, by_shift] : by_row) {
        // the first group keeps the row
        for (auto it = std::next(by_shift.begin()); it != by_shift.end(); ++it) {
            const uint32_t copy = take_rows(1)[0];
            for (const auto & layer : layers) {
                for (ggml_tensor * t : { layer.k, layer.v }) {
                    if (t) {
                        buf.resize(t->nb[1]);
                        ggml_backend_tensor_get(t, buf.data(), row *t->nb[1], t->nb[1]);
                        ggml_backend_tensor_set(t, buf.data(), copy*t->nb[1], t->nb[1]);
                    }
                }
            }
            for (const auto & [s, i] : it->second) {
                mark(s, i, copy);
            }
        }
    }
}

std::map<int32_t, llama_pos> arena::moved_rows() const {
    std::map<int32_t, llama_pos> res;
    each_intact([&](uint32_t s, uint32_t i, int32_t row) {
        if (const llama_pos shift = kv.v_cells[s].get_shift(i)) {
            res[row] = shift;
        }
    });
    return res;
}

ggml_tensor * arena::build_input_shift(ggml_context * ctx) const {
    const int64_t n = moved_rows().size();
    if (n == 0) {
        return nullptr;
    }
    ggml_tensor * moves = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n, 2);
    ggml_set_input(moves);
    ggml_set_name(moves, "intact_moves");
    return moves;
}

void arena::set_input_shift(ggml_tensor * moves) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(moves->buffer));
    int32_t * row   = (int32_t *) moves->data;
    int32_t * shift = row + moves->ne[0];
    for (const auto & [r, by] : moved_rows()) {
        *row ++  = r;
        *shift++ = by;
    }
}

void arena::build_shift(ggml_cgraph * gf, ggml_context * ctx, int32_t il, ggml_tensor * moves, ggml_tensor * rot, const rope_fn & rope) const {
    ggml_tensor * k = layer(il).k;
    if (k == nullptr) {
        return;
    }
    const int64_t n = moves->ne[0];
    ggml_tensor * rows  = ggml_view_1d(ctx, moves, n, 0);
    ggml_tensor * shift = ggml_view_1d(ctx, moves, n, moves->nb[1]);

    ggml_tensor * cur = ggml_get_rows(ctx, k, rows);
    cur = ggml_reshape_3d(ctx, cur, kv.hparams.n_embd_head_k(il), kv.hparams.n_head_kv(il), n);
    cur = rot ? llama_mul_mat_hadamard(ctx, cur, rot) : cur;
    cur = rope(cur, shift);
    cur = rot ? llama_mul_mat_hadamard(ctx, cur, rot) : cur;
    ggml_build_forward_expand(gf, ggml_set_rows(ctx, k, ggml_reshape_2d(ctx, cur, k->ne[0], n), rows));
}

//
// state_reader
//

state_reader::state_reader(arena * a, uint32_t strm, const std::vector<uint32_t> & cells, uint32_t & n_layer) :
    a(a), strm(strm), cells(cells), mixed(a && (n_layer & arena::STATE_FLAG)) {
    if (mixed) {
        n_layer &= ~arena::STATE_FLAG;
    }
}

bool state_reader::takes(int32_t type, const ggml_tensor * t) const {
    return a && !a->kv.v_trans && type == GGML_TYPE_F16 && t->type != GGML_TYPE_F16;
}

void state_reader::read_rows(llama_io_read_i & io, int32_t il, bool is_v) {
    const size_t    ikv = a->kv.map_layer_ids.at(il);
    ggml_tensor *   dst = is_v ? a->kv.layers[ikv].v_stream[strm] : a->kv.layers[ikv].k_stream[strm];
    const int64_t   ne0 = dst->ne[0];

    uint64_t row_size;
    io.read(&row_size, sizeof(row_size));
    if (row_size != ne0*sizeof(ggml_fp16_t)) {
        throw std::runtime_error(format("F16 %s rows of layer %d have %zu bytes, this cache needs %zu", is_v ? "V" : "K", il,
                (size_t) row_size, (size_t) ne0*sizeof(ggml_fp16_t)));
    }

    if (!is_exact(dst->type)) {
        if (a->kind == attention_kind::stock) {
            throw std::runtime_error(format("INTACTKV_ATTN=stock cannot read F16 cells in a %s cache: unset it, or use an F16 cache",
                    ggml_type_name(dst->type)));
        }
        if (rows.empty()) {
            rows = a->take_rows(cells.size());
        }
    }

    const int32_t n_rot = is_v ? a->rotation().v : a->rotation().k;

    ggml_tensor * arena_rows = is_v ? a->layers[ikv].v : a->layers[ikv].k;

    std::vector<ggml_fp16_t> f16(ne0);
    std::vector<float>       f32(ne0);
    std::vector<uint8_t>     out(ggml_row_size(dst->type, ne0));

    for (size_t i = 0; i < cells.size(); ++i) {
        io.read(f16.data(), row_size);
        fused_widen(f16.data(), f32.data(), ne0);
        fused_rotate(f32.data(), ne0, n_rot);
        if (arena_rows) {
            fused_narrow(GGML_TYPE_F16, f32.data(), f16.data(), ne0);
            // a rotated pivot could leave the range of F16 (65504), an infinity would poison every later token
            if (!all_finite(f16)) {
                throw std::runtime_error(format("%s row %zu of layer %d is not finite in the basis of this cache: use an F16 cache", is_v ? "V" : "K", i, il));
            }
            ggml_backend_tensor_set(arena_rows, f16.data(), rows[i]*row_size, row_size);
        }
        // a copy in the cache's own type, for whatever reads the tensors directly
        fused_narrow(dst->type, f32.data(), out.data(), ne0);
        ggml_backend_tensor_set(dst, out.data(), cells[i]*out.size(), out.size());
    }
}

void state_reader::finish(llama_io_read_i & io) {
    if (!mixed) {
        for (size_t i = 0; i < rows.size(); ++i) {
            a->mark(strm, cells[i], rows[i]);
        }
        return;
    }

    uint32_t n;
    io.read(&n, sizeof(n));
    if (n == 0 || n > cells.size()) {
        throw std::runtime_error(format("the state has %u intact cells of %zu", n, cells.size()));
    }
    std::vector<uint32_t> which(n);
    io.read(which.data(), n*sizeof(uint32_t));
    for (uint32_t i = 0; i < n; ++i) {
        if (which[i] >= cells.size() || (i > 0 && which[i] <= which[i - 1])) {
            throw std::runtime_error(format("intact cell %u of the state is number %u of %zu", i, which[i], cells.size()));
        }
    }
    if (a->kind == attention_kind::stock) {
        throw std::runtime_error("INTACTKV_ATTN=stock cannot read a state with intact cells: unset it");
    }

    rows = a->take_rows(n);

    std::vector<uint8_t> buf;
    for (const auto & layer : a->layers) {
        for (ggml_tensor * t : { layer.k, layer.v }) {
            uint64_t row_size;
            io.read(&row_size, sizeof(row_size));
            if (row_size != (t ? t->nb[1] : 0)) {
                throw std::runtime_error(format("intact rows of the state have %zu bytes, this cache needs %zu", (size_t) row_size, t ? t->nb[1] : 0));
            }
            buf.resize(row_size);
            for (uint32_t i = 0; t && i < n; ++i) {
                io.read(buf.data(), row_size);
                ggml_backend_tensor_set(t, buf.data(), rows[i]*row_size, row_size);
            }
        }
    }

    for (uint32_t i = 0; i < n; ++i) {
        a->mark(strm, cells[which[i]], rows[i]);
    }
}

//
// graph_cells
//

void graph_cells::build(ggml_context * ctx, const cells_view & view, ggml_tensor * mask, ggml_tensor * k_cells, ggml_tensor * v_cells) {
    a = view.a;
    this->mask    = mask;
    this->k_cells = k_cells;
    this->v_cells = v_cells;
    if (a == nullptr) {
        return;
    }
    gen      = a->generation();
    n_intact = a->map_cells(view.s0, view.s1, view.n_kv, nullptr);
    if (n_intact == 0) {
        return;
    }
    rows        = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_intact);
    cells       = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_intact);
    row_of_cell = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, view.n_kv, view.s1 - view.s0 + 1);
    ggml_set_input(rows);
    ggml_set_input(cells);
    ggml_set_input(row_of_cell);
    ggml_set_name(rows,        "intact_rows");
    ggml_set_name(cells,       "intact_cells");
    ggml_set_name(row_of_cell, "intact_row_of_cell");
}

void graph_cells::set_input(const cells_view & view) const {
    if (n_intact == 0) {
        return;
    }
    // a tensor that no layer of the graph uses is not allocated
    const auto data = [](ggml_tensor * t) -> void * {
        GGML_ASSERT(t->buffer == nullptr || ggml_backend_buffer_is_host(t->buffer));
        return t->buffer ? t->data : nullptr;
    };

    if (int32_t * map = (int32_t *) data(row_of_cell)) {
        view.a->map_cells(view.s0, view.s1, view.n_kv, map);
    }

    if (int32_t * row = (int32_t *) data(rows)) {
        int64_t * cell = (int64_t *) data(cells);

        std::vector<int32_t> map(ggml_nelements(row_of_cell));
        view.a->map_cells(view.s0, view.s1, view.n_kv, map.data());

        for (size_t i = 0; i < map.size(); ++i) {
            if (map[i] >= 0) {
                *row ++ = map[i];
                *cell++ = i;
            }
        }
        GGML_ASSERT(row == (int32_t *) rows->data + n_intact);
    }
}

bool graph_cells::can_reuse(const cells_view & view) const {
    return a == view.a && (a == nullptr ||
        (gen == a->generation() && n_intact == a->map_cells(view.s0, view.s1, view.n_kv, nullptr)));
}

// t: [head_dim, n_kv, n_head_kv, n_stream], permuted from how the cache stores it
static ggml_tensor * write_over(ggml_context * ctx, ggml_tensor * t, ggml_tensor * arena_rows, ggml_tensor * rows, ggml_tensor * cells) {
    if (arena_rows == nullptr) {
        return t;
    }
    t = ggml_permute(ctx, t, 0, 2, 1, 3);
    // get_rows widens the F16 rows to F32 and build_attn_mha rounds back to F16: exact both ways
    ggml_tensor * res = ggml_cast(ctx, t, GGML_TYPE_F32);
    res = ggml_reshape_2d(ctx, res, t->ne[0]*t->ne[1], t->ne[2]*t->ne[3]);
    res = ggml_set_rows(ctx, res, ggml_get_rows(ctx, arena_rows, rows), cells);
    res = ggml_reshape_4d(ctx, res, t->ne[0], t->ne[1], t->ne[2], t->ne[3]);
    return ggml_permute(ctx, res, 0, 2, 1, 3);
}

// as build_attn_mha() has it: [head_dim, n_tokens, n_head, n_stream]
static ggml_tensor permuted(const ggml_tensor & t, int64_t n_stream) {
    ggml_tensor res = t;
    res.ne[1] = t.ne[2]/n_stream;
    res.nb[1] = t.nb[2];
    res.ne[2] = t.ne[1];
    res.nb[2] = t.nb[1];
    res.ne[3] = n_stream;
    res.nb[3] = t.nb[2]*res.ne[1];
    return res;
}

layer_attention graph_cells::layer(
        int32_t il, const llama_cparams & cparams, const ggml_tensor * bias,
        const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * v, const ggml_tensor * sinks) const {
    if (a == nullptr || cparams.training) {
        return {};
    }
    layer_attention res(*this, il, cparams.flash_attn && bias == nullptr);
    if (!a->fused() || !res.flash || k == nullptr || v == nullptr) {
        return res;
    }
    ggml_tensor * k_cache = a->cache_k(il);
    ggml_tensor * v_cache = a->cache_v(il);
    if (!fused_store_supported(k_cache, k) || !fused_store_supported(v_cache, v)) {
        return res;
    }
    // what build_attn_mha() will be given, and attend() will ask about once more
    const int64_t n_stream = mask->ne[3];
    ggml_tensor q4 = permuted(*q, n_stream);
    ggml_tensor k4 = *k_cache;
    ggml_tensor v4 = *v_cache;
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
    if (is_whole) {
        const arena & a = *cells->a;
        ggml_build_forward_expand(gf, fused_store(ctx, a.cache_k(il), a.cache_v(il), k, v, cells->k_cells, cells->v_cells, a.rotation()));
    }
    return is_whole;
}

ggml_tensor * layer_attention::attend(
        ggml_context * ctx,
        ggml_tensor * q, ggml_tensor *& k, ggml_tensor *& v, ggml_tensor * mask, ggml_tensor * sinks,
        float scale) const {
    if (cells == nullptr) {
        return nullptr;
    }
    const arena & a = *cells->a;
    const bool has_intact = cells->n_intact > 0;

    const bool fused = a.fused() && flash && fused_supported(q, k, v, mask, sinks);
    GGML_ASSERT(fused || !is_whole);
    if (fused) {
        const llama_hparams & hparams = a.hparams();
        const intact_rows     intact  = { a.layer(il).k, a.layer(il).v, cells->row_of_cell };

        ggml_tensor * res = fused_attention(ctx, q, k, v, mask, sinks, has_intact ? &intact : nullptr,
                is_whole ? a.rotation() : fused_rotation{}, scale, hparams.f_max_alibi_bias,
                hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f);
        return ggml_reshape_2d(ctx, res, res->ne[0]*res->ne[1], res->ne[2]*res->ne[3]);
    }

    if (has_intact) {
        k = write_over(ctx, k, a.layer(il).k, cells->rows, cells->cells);
        v = write_over(ctx, v, a.layer(il).v, cells->rows, cells->cells);
    }
    return nullptr;
}

} // namespace intactkv
