// Intact cells: which cells of a KV cache attention reads at F16, and where their rows are.
//
// A cell's mark is `llama_kv_cell_ext::intact`, the index of its arena row (-1: ordinary). Upstream resets that
// struct wherever a cell is freed or given to another token and copies it wherever a cell is copied, so the mark
// needs no bookkeeping of its own: a row is free when no cell of any stream names it.
//
// The arena holds one F16 row per intact cell and layer, in the basis of the cache: where upstream rotates K or V
// by a Hadamard matrix before quantizing (attn_rot_k, attn_rot_v), the rows are rotated the same way.

#pragma once

#include "ggml-cpp.h"
#include "llama.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <utility>
#include <vector>

struct llama_cparams;
struct llama_hparams;
class llama_kv_cache;
class llama_io_read_i;
class llama_io_write_i;

namespace intactkv {

struct fused_rotation;

enum class attention_kind { stock, portable, fused };

// The layers' F16 rows, [n_embd_gqa, n_rows] each. nullptr: that side of the cache is F16 or F32 itself, its
// cells hold the exact values.
struct arena_layer {
    ggml_tensor * k = nullptr;
    ggml_tensor * v = nullptr;
};

// Asks the system for huge pages under a new cache in CPU memory: attention reads all of it for every token, and with
// small pages the look-ups of their addresses bound it before the memory does. Linux only, elsewhere nothing happens.
void prefer_huge_pages(ggml_backend_buffer * buf);

class arena {
public:
    // gives a cache its arena; the cache owns it. A cache that borrows another's cells (drafting) gets none
    static void attach(llama_kv_cache & kv);

    explicit arena(llama_kv_cache & kv);

    // number of intact cells of a sequence (-1: of all)
    uint32_t n_cells(int32_t seq_id) const;
    size_t   n_bytes() const;
    void     add_memory(std::map<ggml_backend_buffer_type_t, size_t> & breakdown) const;

    // changes whenever the rows move in memory: a graph built before must not be reused
    uint64_t generation() const { return gen; }

    // whether graphs use the fused kernel, with and without intact cells; INTACTKV_ATTN=stock keeps upstream's graph
    // to the bit
    bool fused() const { return kind == attention_kind::fused; }

    // "stock", "portable" or "fused": what the next batch will use
    const char * attention_now() const;

    const arena_layer & layer(int32_t il) const;

    const llama_hparams & hparams() const;

    // the cache's own tensors of a layer, [n_embd_gqa, n_cells, n_stream]
    ggml_tensor * cache_k(int32_t il) const;
    ggml_tensor * cache_v(int32_t il) const;

    // how upstream rotates K and V of this cache (llama_kv_cache::build_input_k_rot, build_input_v_rot)
    fused_rotation rotation() const;

    // arena row of every cell in [0, n_kv) of streams s0..s1, stream after stream, -1: ordinary
    // rows: [n_kv*(s1 - s0 + 1)] or nullptr to only count; returns the number of intact cells
    uint32_t map_cells(uint32_t s0, uint32_t s1, uint32_t n_kv, int32_t * rows) const;

    //
    // saving: a sequence with intact cells is written as upstream writes it, its n_layer marked by
    // STATE_FLAG (so that stock llama.cpp refuses it), followed by the intact rows
    //

    static constexpr uint32_t STATE_FLAG = 0x80000000u;

    using ranges_t = std::vector<std::pair<uint32_t, uint32_t>>; // cells, from inclusive, to exclusive

    bool has_intact(uint32_t strm, const ranges_t & ranges) const;
    void write_state(llama_io_write_i & io, uint32_t strm, const ranges_t & ranges) const;

    //
    // position shift (seq_add, seq_div): the rotation that upstream applies to the cells, on the rows that move; the
    // others stay as they are, to the bit
    //

    // cells that share a row but are shifted differently get rows of their own
    void before_shift();

    // I32 [n, 2]: the rows that move, and by how many positions; nullptr if none does
    ggml_tensor * build_input_shift(ggml_context * ctx) const;
    void            set_input_shift(ggml_tensor * moves) const;

    using rope_fn = std::function<ggml_tensor * (ggml_tensor * k, ggml_tensor * shift)>; // k: F32 [head_dim, n_head_kv, n]

    // shifts layer il's K rows in place; rot: the cache's Hadamard matrix or nullptr
    void build_shift(ggml_cgraph * gf, ggml_context * ctx, int32_t il, ggml_tensor * moves, ggml_tensor * rot, const rope_fn & rope) const;

private:
    friend class state_reader;

    llama_kv_cache & kv;

    const attention_kind kind;

    std::vector<arena_layer> layers; // by index of the layer in the cache
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;

    uint32_t n_rows = 0;
    uint64_t gen    = 0;

    std::vector<uint32_t>        take_rows(uint32_t n);
    std::map<int32_t, llama_pos> moved_rows() const;
    void grow(uint32_t n_rows_new);
    void mark(uint32_t strm, uint32_t cell, int32_t row);

    // f(stream, cell, row) for every intact cell
    template <typename F> void each_intact(F && f) const;

    // the intact cells among those of a state: their positions in its list of cells, and their rows
    struct saved_cells {
        std::vector<uint32_t> which;
        std::vector<int32_t>  rows;
    };

    saved_cells intact_in(uint32_t strm, const ranges_t & ranges) const;
};

// Reads a KV state into one stream: F16 rows into a quantized cache, and the section write_state() appended.
// All failures throw std::runtime_error; nothing is marked before finish().
class state_reader {
public:
    // a: nullptr for a cache that has no intact cells; cells: where the i-th cell of the state goes
    // n_layer: as read from the state; the flag is taken off
    state_reader(arena * a, uint32_t strm, const std::vector<uint32_t> & cells, uint32_t & n_layer);

    // true if rows of this type, for this tensor of the cache, are read by read_rows() instead of by upstream
    bool takes(int32_t type, const ggml_tensor * t) const;

    // one layer's K (or V) rows; io stands before the row size
    void read_rows(llama_io_read_i & io, int32_t il, bool is_v);

    void finish(llama_io_read_i & io);

private:
    arena * a;
    const uint32_t strm;
    const std::vector<uint32_t> & cells;
    const bool mixed; // written by write_state()

    std::vector<uint32_t> rows; // [cells.size()], taken by the first read_rows() that needs them
};

// What a graph sees of one cache's intact cells: the streams and cells in view.
struct cells_view {
    const arena * a = nullptr;
    uint32_t s0   = 0;
    uint32_t s1   = 0;
    uint32_t n_kv = 0;
};

class graph_cells;

// One layer's attention while its graph is built. One without a cache leaves all to upstream.
class layer_attention {
public:
    layer_attention() = default;
    layer_attention(const graph_cells & cells, int32_t il, bool flash) : cells(&cells), il(il), flash(flash) {}

    // The fused kernel does all of it: store() takes the place of upstream's rotations of K and V and of their copies
    // into the cache, attend() that of upstream's rotations of Q and of the result.
    bool whole() const { return is_whole; }

    // k, v: as in graph_cells::layer(). Returns whole(): if it is false, upstream stores them
    bool store(ggml_cgraph * gf, ggml_context * ctx, ggml_tensor * k, ggml_tensor * v) const;

    // In place of what follows in llm_graph_context::build_attn_mha(). q, k, v as there:
    // [head_dim, n_tokens|n_kv, n_head|n_head_kv, n_stream], permuted. Returns the fused kernel's result, F32
    // [head_dim_v*n_head, n_tokens*n_stream], or nullptr: upstream's ops go on with k and v, which have been replaced
    // by F32 copies with the intact rows written over their cells where there are any (portable attention).
    ggml_tensor * attend(
            ggml_context * ctx,
            ggml_tensor * q, ggml_tensor *& k, ggml_tensor *& v, ggml_tensor * mask, ggml_tensor * sinks,
            float scale) const;

private:
    friend class graph_cells;

    const graph_cells * cells = nullptr;

    int32_t il       = -1;
    bool    flash    = false; // upstream's would be flash attention
    bool    is_whole = false;
};

// Graph input: where the intact cells are; and the attention that reads them. Part of the attention inputs of a
// graph. Where the cache has no intact cell in view and the fused kernel is not in use, it adds nothing to the graph.
class graph_cells {
public:
    // mask, k_cells, v_cells: inputs of the same graph, the mask and where upstream's cpy_k() and cpy_v() write
    void build    (ggml_context * ctx, const cells_view & view, ggml_tensor * mask, ggml_tensor * k_cells, ggml_tensor * v_cells);
    void set_input(const cells_view & view) const;
    bool can_reuse(const cells_view & view) const;

    // The attention of layer il. q, k, v, bias and sinks as build_attn() gets them, the first three F32
    // [head_dim, n_head|n_head_kv, n_tokens]; all but q may be nullptr
    layer_attention layer(
            int32_t il, const llama_cparams & cparams, const ggml_tensor * bias,
            const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * v, const ggml_tensor * sinks) const;

private:
    friend class layer_attention;

    const arena * a = nullptr;

    ggml_tensor * mask    = nullptr;
    ggml_tensor * k_cells = nullptr;
    ggml_tensor * v_cells = nullptr;

    uint64_t gen      = 0;
    uint32_t n_intact = 0;

    // nullptr without intact cells
    ggml_tensor * rows        = nullptr; // I32 [n_intact] arena rows
    ggml_tensor * cells       = nullptr; // I64 [n_intact] the cells they belong to, n_kv*(stream - s0) + cell
    ggml_tensor * row_of_cell = nullptr; // I32 [n_kv, n_stream] arena row, -1: ordinary
};

} // namespace intactkv
