#include "cells/arena.h"

#include "cells/graph.h"
#include "cells/tail.h"
#include "attention/store.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace intactkv {

bool is_exact(ggml_type type) {
    return type == GGML_TYPE_F16 || type == GGML_TYPE_F32;
}

// INTACTKV_ATTN, else the fastest that can read this cache: the fused kernel works on memory of the CPU only
// on_cpu: some layer's K and V are there. Those of the others are left to portable attention (arena::fused)
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
        throw std::runtime_error("INTACTKV_ATTN is fused, but no layer of the KV cache is in CPU memory: unset it, or "
                                 "keep the cache there (offload_kqv = false)");
    }
    return attention_kind::fused;
}

void arena::attach(llama_kv_cache & kv, const llama_context & ctx) {
    if (kv.other == nullptr) {
        kv.intact = std::make_shared<arena>(kv, ctx);
    }
}

cells_view arena::view(const llama_kv_cache & kv, uint32_t s0, uint32_t s1, uint32_t n_kv,
        const std::vector<llama_seq_id> & strm, const std::vector<std::vector<uint32_t>> & idxs) {
    arena * a = kv.other ? kv.other->intact.get() : kv.intact.get();
    return { a, s0, s1, n_kv, &strm, &idxs, kv.other ? &kv : nullptr };
}

int32_t arena::own_layer(const llama_kv_cache & borrower, int32_t il) const {
    const ggml_tensor * k = borrower.layers[borrower.map_layer_ids.at(il)].k;
    const auto found = std::find_if(kv.layers.begin(), kv.layers.end(), [&](const auto & own) { return own.k == k; });
    return found == kv.layers.end() ? -1 : (int32_t) found->il;
}

arena::arena(llama_kv_cache & kv, const llama_context & ctx) :
    kv(kv),
    ctx(ctx),
    kind(choose_attention(kv.layers.empty() ||
            std::any_of(kv.layers.begin(), kv.layers.end(),
                    [](const auto & layer) {
                        return ggml_backend_buffer_get_type(layer.k->buffer) == ggml_backend_cpu_buffer_type();
                    }))),
    n_seq_max(ctx.get_cparams().n_seq_max),
    n_ubatch(ctx.get_cparams().n_ubatch),
    layers(kv.layers.size()),
    rotates(dynamic_cast<const llama_memory_hybrid_iswa *>(llama_get_memory(&ctx)) == nullptr),
    fast(fused(ctx.get_cparams())) {
    set_tail(tail_asked());
}

// whether the kernel takes a cache of this type with heads of this size, asked as if a token were to be stored
static bool kernel_knows(const ggml_tensor * cache, int64_t head_dim, int64_t n_head_kv, bool latent = false) {
    ggml_tensor cur = {};
    cur.type = GGML_TYPE_F32;
    cur.nb[0] = sizeof(float);
    cur.ne[0] = head_dim;
    cur.ne[1] = n_head_kv;
    cur.ne[2] = 1;
    cur.ne[3] = 1;
    return fused_store_supported(cache, &cur, latent);
}

bool arena::fused(int32_t il, const llama_cparams & cparams) const {
    if (kind != attention_kind::fused || !cparams.flash_attn) {
        return false;
    }
    const uint32_t n_head_kv = kv.hparams.n_head_kv(il);
    const uint32_t dim_k = kv.hparams.n_embd_head_k(il);
    const uint32_t dim_v = kv.hparams.n_embd_head_v(il);
    if (has_latents()) {
        return n_head_kv == 1 && kernel_knows(cache_k(il), dim_k, 1, true) &&
                fused_head_supported(cache_k(il)->type, dim_v);
    }
    return kernel_knows(cache_k(il), dim_k, n_head_kv) && kernel_knows(cache_v(il), dim_v, n_head_kv);
}

bool arena::fused(const llama_cparams & cparams) const {
    return std::all_of(
            kv.layers.begin(), kv.layers.end(), [&](const auto & layer) { return fused(layer.il, cparams); });
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

ggml_tensor * arena::stream_k(int32_t il, uint32_t strm) const {
    return kv.layers[kv.map_layer_ids.at(il)].k_stream[strm];
}

ggml_tensor * arena::stream_v(int32_t il, uint32_t strm) const {
    return kv.layers[kv.map_layer_ids.at(il)].v_stream[strm];
}

bool arena::v_transposed() const {
    return kv.v_trans;
}

const llama_hparams & arena::hparams() const {
    return kv.hparams;
}

bool arena::has_latents() const {
    return !kv.layers.empty() && kv.layers[0].v == nullptr;
}

fused_rotation arena::rotation() const {
    fused_rotation res;
    if (!rotates || has_latents()) { // of latents upstream makes the matrix, and multiplies nothing by it
        return res;
    }
    if (kv.attn_rot_k) {
        for (res.k = 64; kv.n_embd_head_k_all % (2 * res.k) == 0;) {
            res.k *= 2;
        }
    }
    if (kv.attn_rot_v) {
        res.v = 64;
    }
    return res;
}

void arena::each_intact(const cell_fn & f) const {
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

uint32_t arena::n_cells(int32_t seq_id, bool tail_only) const {
    uint32_t res = 0;
    each_intact([&](uint32_t s, uint32_t i, int32_t row) {
        res += (!tail_only || kinds[row] == row_kind::tail) && (seq_id < 0 || kv.v_cells[s].seq_has(i, seq_id));
    });
    return res;
}

void arena::set_tail(int32_t n) {
    // layers of one cache have the same types
    const ggml_type type_k = kv.layers.empty() ? GGML_TYPE_F16 : kv.type_k();
    const ggml_type type_v = kv.layers.empty() ? GGML_TYPE_F16 : has_latents() ? type_k : kv.type_v();
    if (n < 0) {
        n = reads_intact() && fast ? default_tail(type_k, type_v) : 0;
    }
    if (is_exact(type_k) && is_exact(type_v)) {
        n = 0;
    }
    if (n > 0 && !reads_intact()) {
        throw std::runtime_error(format("a tail of %d intact cells was asked for, and INTACTKV_ATTN=stock reads no "
                                        "intact cell: unset INTACTKV_ATTN, or set the tail to 0",
                n));
    }
    if (n > 0 && v_transposed() && !is_exact(type_v)) {
        throw std::runtime_error(
                format("a tail of %d intact cells was asked for, and flash attention is off in this "
                       "context, its %s V cache is transposed: turn flash attention on, use F16 for V, "
                       "or set the tail to 0",
                        n, ggml_type_name(type_v)));
    }
    const uint64_t n_cells = (uint64_t) n_stream_cells() * n_streams();
    const uint64_t n_new = n_ubatch + (n_seq_max > n_ubatch ? n_seq_max : 0); // each has one token at least
    const uint64_t n_rows_tail = n > 0 ? std::min<uint64_t>((uint64_t) n * n_seq_max + n_new, n_cells) : 0;
    if (n_rows_tail < n_reserved && this->n_cells(-1) == 0) { // nothing is lost, and the memory is
        resize(held.size());
    }
    const uint32_t n_reserved_old = std::exchange(n_reserved, (uint32_t) n_rows_tail);
    try {
        take_rows(0);
    } catch (...) {
        n_reserved = n_reserved_old;
        throw;
    }
    n_tail = n;
    gen++; // graphs store new cells in another way now
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
        std::fill(rows, rows + (size_t) n_kv * (s1 - s0 + 1), -1);
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
                rows[(size_t) n_kv * (s - s0) + i] = cells.ext_get(i).intact;
            }
            res++;
        }
    }
    return res;
}

int32_t arena::row_of(uint32_t strm, uint32_t cell) const {
    return kv.v_cells[strm].ext_get(cell).intact;
}

llama_pos arena::shift_of(uint32_t strm, uint32_t cell) const {
    return kv.v_cells[strm].get_shift(cell);
}

const std::set<std::pair<llama_pos, uint32_t>> & arena::cells_of(uint32_t strm, int32_t seq_id) const {
    return kv.v_cells[strm].seq_pos_get(seq_id);
}

bool arena::in_sequence(uint32_t strm, uint32_t cell, int32_t seq_id) const {
    return kv.v_cells[strm].seq_has(cell, seq_id);
}

uint32_t arena::n_streams() const {
    return kv.n_stream;
}

uint32_t arena::n_stream_cells() const {
    return kv.get_size();
}

void arena::set_row(uint32_t strm, uint32_t cell, int32_t row) {
    auto & cells = kv.v_cells[strm];
    llama_kv_cell_ext ext = cells.ext_get(cell);
    ext.intact = row;
    cells.ext_set(cell, ext);
}

void arena::give_up_tail() {
    n_tail = n_reserved = 0;
    gen++;
}

void arena::mark(uint32_t strm, uint32_t cell, int32_t row, row_kind kind) {
    set_row(strm, cell, row);
    kinds[row] = kind;
    any_tail |= kind == row_kind::tail;
}

void arena::unmark(uint32_t strm, uint32_t cell) {
    set_row(strm, cell, -1);
}

void arena::forget_tokens(uint32_t strm, const std::vector<uint32_t> & cells) {
    if (kv.has_cell_ext()) {
        return;
    }
    auto & of = kv.v_cells[strm];
    for (const uint32_t cell : cells) {
        llama_kv_cell_ext ext = of.ext_get(cell);
        ext.tok = LLAMA_TOKEN_NULL;
        of.ext_set(cell, ext);
    }
}

bool arena::all_exact() const {
    return std::all_of(kv.layers.begin(), kv.layers.end(),
            [](const auto & layer) { return is_exact(layer.k->type) && (!layer.v || is_exact(layer.v->type)); });
}

std::vector<uint32_t> arena::hold_rows(const std::vector<llama_pos> & positions) {
    const size_t n = positions.size();
    std::vector<uint32_t> res;
    if (all_exact()) {
        res.resize(n);
        std::iota(res.begin(), res.end(), held.size());
    } else {
        res = take_rows(n);
    }
    for (const uint32_t row : res) {
        held.resize(std::max<size_t>(held.size(), row + 1), false);
        held[row] = true;
        if (row < kinds.size()) {
            kinds[row] = row_kind::kept;
        }
    }
    for (size_t i = 0; i < n; ++i) {
        held_by_pos[positions[i]].push_back(res[i]);
    }
    return res;
}

void arena::fill(bool on) {
    if (std::exchange(filling, on) && !on && n_rows > 0) { // no cell has a row yet
        const uint32_t n_wanted = std::count(held.begin(), held.end(), true) + n_reserved;
        if (n_wanted < n_rows) {
            resize(std::max<uint32_t>(n_wanted, held.size()));
        }
    }
}

const std::vector<uint32_t> & arena::held_at(llama_pos pos) const {
    static const std::vector<uint32_t> none;
    const auto found = held_by_pos.find(pos);
    return found == held_by_pos.end() ? none : found->second;
}

void arena::note_restored(uint32_t strm, const std::vector<uint32_t> & cells) {
    if (all_exact()) {
        unseen[strm].insert(cells.begin(), cells.end());
    }
}

void arena::release_rows(const std::vector<uint32_t> & rows) {
    for (const uint32_t row : rows) {
        held[row] = false;
    }
    for (auto & [pos, at] : held_by_pos) {
        at.erase(std::remove_if(at.begin(), at.end(), [&](uint32_t row) { return !held[row]; }), at.end());
    }
}

uint32_t arena::stream_of(int32_t seq_id) const {
    return kv.seq_to_stream[seq_id];
}

llama_kv_cells & arena::cells_in(uint32_t strm) const {
    return kv.v_cells[strm];
}

void arena::wait() const {
    if (ggml_backend_sched_t sched = ctx.get_sched()) { // a context that is being made has none
        ggml_backend_sched_synchronize(sched);
    }
}

std::vector<uint32_t> arena::layer_ids() const {
    return kv.get_layer_ids();
}

bool arena::is_out_of_sight(llama_pos earlier, llama_pos pos) const {
    return llama_hparams::is_masked_swa(kv.n_swa, kv.swa_type, earlier, pos);
}

bool arena::has_window() const {
    return kv.swa_type != LLAMA_SWA_TYPE_NONE;
}

std::vector<uint32_t> arena::take_rows(uint32_t n_kept, uint32_t n_tail) {
    std::vector<bool> used = all_exact() ? std::vector<bool>() : held;
    used.resize(n_rows, false);
    uint32_t n_used[2] = { 0, 0 };
    n_used[(int) row_kind::kept] = std::count(used.begin(), used.end(), true);
    each_intact([&](uint32_t, uint32_t, int32_t row) {
        n_used[(int) kinds[row]] += !used[row];
        used[row] = true;
    });

    const uint32_t n = n_kept + n_tail;
    const uint32_t n_wanted =
            n_used[(int) row_kind::kept] + n_kept + std::max(n_reserved, n_used[(int) row_kind::tail] + n_tail);
    if (n_wanted > n_rows) {
        resize(filling ? n_wanted + n_wanted / 2 : n_wanted);
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

void arena::resize(uint32_t n_rows_new) {
    std::vector<arena_layer> layers_new(layers.size());
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctxs;

    auto new_rows = [&](const ggml_tensor * t, const char * name, uint32_t il) -> ggml_tensor * {
        if (t == nullptr || is_exact(t->type) || n_rows_new == 0) {
            return nullptr;
        }
        auto & ctx = ctxs[ggml_backend_buffer_get_type(t->buffer)];
        if (!ctx) {
            ctx.reset(ggml_init({ 2 * layers.size() * ggml_tensor_overhead(), nullptr, true }));
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
        ggml_backend_buffer_ptr buf{ ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft) };
        if (!buf) {
            throw std::runtime_error(format("failed to allocate the F16 rows of %u intact cells on %s", n_rows_new,
                    ggml_backend_buft_name(buft)));
        }
        ggml_backend_buffer_clear(buf.get(), 0);
        ctxs_bufs_new.emplace_back(std::move(ctx), std::move(buf));
    }

    wait();
    std::vector<uint8_t> rows;
    auto copy = [&](ggml_tensor * src, ggml_tensor * dst) {
        if (src && dst) {
            rows.resize(std::min(ggml_nbytes(src), ggml_nbytes(dst)));
            ggml_backend_tensor_get(src, rows.data(), 0, rows.size());
            ggml_backend_tensor_set(dst, rows.data(), 0, rows.size());
        }
    };
    for (size_t i = 0; i < layers.size(); ++i) {
        copy(layers[i].k, layers_new[i].k);
        copy(layers[i].v, layers_new[i].v);
    }

    layers = std::move(layers_new);
    ctxs_bufs = std::move(ctxs_bufs_new);
    kinds.resize(n_rows_new, row_kind::kept);
    n_rows = n_rows_new;
    gen++;
}

} // namespace intactkv
