// Intact cells: which cells of a KV cache attention reads at F16, and where their rows are.
//
// A cell's mark is `llama_kv_cell_ext::intact`, the index of its arena row (-1: ordinary). Upstream resets that
// struct wherever a cell is freed or given to another token and copies it wherever a cell is copied, so the mark
// needs no bookkeeping of its own: a row is free when no cell of any stream names it.
//
// Why a cell is intact is its row's kind: a cell of a prefix, or of a state that was loaded at F16, is kept until it is
// freed; a cell of the tail (tail.h) only while it is among the newest of a sequence.
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
#include <set>
#include <utility>
#include <vector>

struct llama_context;
struct llama_cparams;
struct llama_hparams;
class llama_kv_cache;
class llama_kv_cells;

namespace intactkv {

struct cells_view;
struct fused_rotation;

enum class attention_kind { stock, portable, fused };

enum class row_kind : uint8_t { kept, tail };

// The layers' F16 rows, [n_embd_gqa, n_rows] each. nullptr: that side of the cache is F16 or F32 itself, its
// cells hold the exact values; or it has no such side (arena::has_latents()).
struct arena_layer {
    ggml_tensor * k = nullptr;
    ggml_tensor * v = nullptr;
};

// F16 and F32 cells hold an F16 prefix exactly; every other type needs the arena
bool is_exact(ggml_type type);

class arena {
public:
    // gives a cache its arena; the cache owns it. A cache that borrows another's cells (drafting) gets none: its graphs
    // read that one's
    static void attach(llama_kv_cache & kv, const llama_context & ctx);

    // what a graph sees of a cache
    static cells_view view(const llama_kv_cache & kv, uint32_t s0, uint32_t s1, uint32_t n_kv,
            const std::vector<llama_seq_id> & strm, const std::vector<std::vector<uint32_t>> & idxs);

    // the layer of this cache that layer il of a cache which borrows its cells has; -1: that one has its own
    int32_t own_layer(const llama_kv_cache & borrower, int32_t il) const;

    // Throws std::runtime_error if INTACTKV_ATTN or INTACTKV_TAIL cannot be had
    arena(llama_kv_cache & kv, const llama_context & ctx);

    // number of intact cells of a sequence (-1: of all), or of those that are the tail's
    uint32_t n_cells(int32_t seq_id, bool tail_only = false) const;
    size_t n_bytes() const;
    void add_memory(std::map<ggml_backend_buffer_type_t, size_t> & breakdown) const;

    // changes whenever the rows move in memory: a graph built before must not be reused
    uint64_t generation() const { return gen; }

    // Whether the fused kernel does layer il's attention (every layer's) in the graphs of a context, with and without
    // intact cells. Graphs choose by it, intactkv_attention() reports it. INTACTKV_ATTN=stock keeps upstream's graph to
    // the bit
    bool fused(int32_t il, const llama_cparams & cparams) const;
    bool fused(const llama_cparams & cparams) const;

    // false: no attention of this cache would read an intact cell, so none may be made
    bool reads_intact() const { return kind != attention_kind::stock; }

    // whether new cells are rounded by the kernel, where it can: their blocks have scales that are fitted
    bool stores_fitted() const { return kind == attention_kind::fused; }

    // how many of the newest cells of each sequence are intact; 0: none are for being new
    uint32_t tail() const { return n_tail; }

    // -1: the default of this cache (tail.h). Rows for the tails of all sequences and one ubatch are allocated here: no
    // token has to wait for memory. A cache of exact cells has no tail. Throws std::runtime_error
    void set_tail(int32_t n);

    // in the middle of a batch: no tail from now on
    void give_up_tail();

    //
    // layers: the arena's rows, and the cache's own tensors
    //

    const arena_layer & layer(int32_t il) const;
    const std::vector<arena_layer> & all_layers() const { return layers; }

    const llama_hparams & hparams() const;

    // Whether K's rows are latents (MLA): V of a cell is a part of its row, of which there is no other copy
    bool has_latents() const;

    // [n_embd_gqa, n_cells, n_stream]; of V, here and below, nullptr where the cache has latents
    ggml_tensor * cache_k(int32_t il) const;
    ggml_tensor * cache_v(int32_t il) const;

    // one stream's part of these, [n_embd_gqa, n_cells]
    ggml_tensor * stream_k(int32_t il, uint32_t strm) const;
    ggml_tensor * stream_v(int32_t il, uint32_t strm) const;

    bool v_transposed() const;

    // how upstream rotates K and V of this cache (llama_kv_cache::build_input_k_rot, build_input_v_rot)
    fused_rotation rotation() const;

    //
    // cells
    //

    // arena row of every cell in [0, n_kv) of streams s0..s1, stream after stream, -1: ordinary
    // rows: [n_kv*(s1 - s0 + 1)] or nullptr to only count; returns the number of intact cells
    uint32_t map_cells(uint32_t s0, uint32_t s1, uint32_t n_kv, int32_t * rows) const;

    bool empty() const { return n_rows == 0; }              // then no cell is intact
    int32_t row_of(uint32_t strm, uint32_t cell) const;     // -1: ordinary
    llama_pos shift_of(uint32_t strm, uint32_t cell) const; // by how much seq_add() and seq_div() have moved it

    // f(stream, cell, row) for every intact cell
    using cell_fn = std::function<void(uint32_t strm, uint32_t cell, int32_t row)>;
    void each_intact(const cell_fn & f) const;

    // the cells of a sequence in a stream, by position: (position, cell)
    const std::set<std::pair<llama_pos, uint32_t>> & cells_of(uint32_t strm, int32_t seq_id) const;
    bool in_sequence(uint32_t strm, uint32_t cell, int32_t seq_id) const;
    uint32_t n_sequences() const { return n_seq_max; }
    uint32_t n_streams() const;
    uint32_t n_stream_cells() const; // in use or not

    row_kind kind_of(int32_t row) const { return kinds[row]; }
    bool has_tail_cells() const { return any_tail; } // false: there are none; true: there were some at the last look
    void no_tail_cells() { any_tail = false; }

    // n_kept + n_tail rows that no cell names; the arena grows if it has too few, and leaves room for the whole tail
    // beside what is kept. They stay free until a cell is marked with them
    std::vector<uint32_t> take_rows(uint32_t n_kept, uint32_t n_tail = 0);
    void mark(uint32_t strm, uint32_t cell, int32_t row, row_kind kind);
    void unmark(uint32_t strm, uint32_t cell);

    // These were read from a state, which says no tokens as a rule: upstream's reader leaves token 0 in them
    void forget_tokens(uint32_t strm, const std::vector<uint32_t> & cells);

    //
    // rows that stay (automatic/): whether cells name them or not, and several cells may
    //

    // A row for each of these positions. A cache of exact cells has no rows: these are numbers then, marks by which its
    // cells can be told. Throws std::runtime_error
    std::vector<uint32_t> hold_rows(const std::vector<llama_pos> & positions);
    // true: more are about to come, and rows need not be copied for each time; false: those that none had use for go
    void fill(bool on);
    void release_rows(const std::vector<uint32_t> & rows);
    bool holds_rows() const { return !held.empty(); }
    bool is_held(int32_t row) const { return row >= 0 && (size_t) row < held.size() && held[row]; }
    const std::vector<uint32_t> & held_at(llama_pos pos) const; // those for this position
    void mark_held(uint32_t strm, uint32_t cell, int32_t row) { set_row(strm, cell, row); }

    // Cells of a stream that a state was read into: of exact ones it does not say which have a row that stays, and their
    // data may still be on its way. Whoever holds the rows looks, and takes the list
    using restored = std::map<uint32_t, std::set<uint32_t>>; // by stream
    void note_restored(uint32_t strm, const std::vector<uint32_t> & cells);
    bool has_restored() const { return !unseen.empty(); }
    restored take_restored() { return std::exchange(unseen, {}); }

    // the cache itself, for what places cells in it (sharing.h)
    llama_kv_cache & cache() const { return kv; }
    uint32_t stream_of(int32_t seq_id) const;
    llama_kv_cells & cells_in(uint32_t strm) const;
    std::vector<uint32_t> layer_ids() const;
    bool all_exact() const; // no row of the cache needs the arena

    // Before rows are read or written from outside of a graph: a GPU may still be computing with them. Upstream does this
    // in all that saves and loads states
    void wait() const;

    // whether a token at position pos has lost sight of one at an earlier position: sliding windows
    bool is_out_of_sight(llama_pos earlier, llama_pos pos) const;
    bool has_window() const;

private:
    llama_kv_cache & kv;
    const llama_context & ctx; // it has the cache

    const attention_kind kind;
    const uint32_t n_seq_max;
    const uint32_t n_ubatch;

    uint32_t n_tail = 0;
    uint32_t n_reserved = 0; // rows that the tail may need at once
    bool any_tail = false;

    std::vector<row_kind> kinds; // [n_rows], of rows that are in use
    std::vector<bool> held;      // rows that stay; as many as there are, or fewer
    std::map<llama_pos, std::vector<uint32_t>> held_by_pos;
    restored unseen;

    std::vector<arena_layer> layers; // by index of the layer in the cache
    const bool rotates;              // false: upstream's graphs of this memory leave its rotations out
    const bool fast;                 // the kernel reads them all
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;

    uint32_t n_rows = 0;
    uint64_t gen = 0;
    bool filling = false; // by fill()

    void set_row(uint32_t strm, uint32_t cell, int32_t row);
    void resize(uint32_t n_rows_new);
};

} // namespace intactkv
