// The intact cells in a graph: where they are, as an input, and the attention that reads them.

#pragma once

#include "ggml.h"

#include <cstdint>
#include <vector>

struct llama_cparams;
class llama_kv_cache;

namespace intactkv {

class arena;

// What a graph sees of one cache's intact cells: the streams and cells in view, and which cells its tokens are given.
struct cells_view {
    arena * a = nullptr;
    uint32_t s0 = 0;
    uint32_t s1 = 0;
    uint32_t n_kv = 0;
    const std::vector<int32_t> * strm = nullptr;               // streams of the tokens
    const std::vector<std::vector<uint32_t>> * idxs = nullptr; // their cells, by stream
    const llama_kv_cache * borrower = nullptr;                 // reads the cells of another, whose arena it is
};

class graph_cells;

// One layer's attention while its graph is built. One without a cache leaves all to upstream.
class layer_attention {
public:
    layer_attention() = default;
    layer_attention(const graph_cells & cells, int32_t il, bool fused) :
        cells(&cells),
        il(il),
        is_fused(fused) {}

    // The fused kernel does all of it: store() takes the place of upstream's rotations of K and V and of their copies
    // into the cache, attend() that of upstream's rotations of Q and of the result.
    bool whole() const { return is_whole; }

    // k, v: as in graph_cells::layer(), by now in the basis of the cache unless whole(); v: nullptr for latents. Their
    // rows of the tail are written. Returns whole(): if it is false, upstream stores them in the cache
    bool store(ggml_cgraph * gf, ggml_context * ctx, ggml_tensor * k, ggml_tensor * v) const;

    // In place of what follows in llm_graph_context::build_attn_mha(). q, k, v as there:
    // [head_dim, n_tokens|n_kv, n_head|n_head_kv, n_stream], permuted. Returns the fused kernel's result, F32
    // [head_dim_v, n_head, n_tokens, n_stream], or nullptr: upstream's ops go on with k and v, which have been replaced
    // by F32 copies with the intact rows written over their cells where there are any (portable attention).
    ggml_tensor * attend(ggml_context * ctx, ggml_tensor * q, ggml_tensor *& k, ggml_tensor *& v, ggml_tensor * mask,
            ggml_tensor * sinks, float scale) const;

private:
    friend class graph_cells;

    const graph_cells * cells = nullptr;

    int32_t il = -1;
    bool is_fused = false; // arena::fused(), and upstream's would be flash attention without a bias
    bool is_whole = false;
};

// What attend() has returned, F32, as build_attn_mha() returns it: [head_dim_v*n_head, n_tokens*n_stream].
// v_mla: each head's matrix that makes values of the latents that were averaged, [n_latent, head_dim_v, n_head]; or nullptr
ggml_tensor * merge_heads(ggml_context * ctx, ggml_tensor * attention, ggml_tensor * v_mla);

// Graph input: where the intact cells are; and the attention that reads them. Part of the attention inputs of a
// graph. Where the cache has no tail, no intact cell in view, and the fused kernel is not in use, it adds nothing to the
// graph. With a tail a graph serves the next token too, though other cells are intact then.
class graph_cells {
public:
    // mask, k_cells, v_cells: inputs of the same graph, the mask and where upstream's cpy_k() and cpy_v() write; of latents
    // there is no second
    void build(ggml_context * ctx, const cells_view & view, ggml_tensor * mask, ggml_tensor * k_cells,
            ggml_tensor * v_cells);
    void set_input(const cells_view & view) const;
    bool can_reuse(const cells_view & view) const;

    // The attention of layer il. q, k, v, bias and sinks as build_attn() gets them, the first three F32
    // [head_dim, n_head|n_head_kv, n_tokens]; all but q may be nullptr
    layer_attention layer(int32_t il, const llama_cparams & cparams, const ggml_tensor * bias, const ggml_tensor * q,
            const ggml_tensor * k, const ggml_tensor * v, const ggml_tensor * sinks) const;

private:
    friend class layer_attention;

    const arena * a = nullptr;
    const llama_kv_cache * borrower = nullptr;

    ggml_tensor * mask = nullptr;
    ggml_tensor * k_cells = nullptr;
    ggml_tensor * v_cells = nullptr;

    uint64_t gen = 0;

    // nullptr without intact cells and without a tail. The first two are for portable attention, n_listed is n_intact, or
    // more: then the last is repeated
    ggml_tensor * rows = nullptr;        // I32 [n_listed] arena rows
    ggml_tensor * cells = nullptr;       // I64 [n_listed] the cells they belong to, n_kv*(stream - s0) + cell
    ggml_tensor * row_of_cell = nullptr; // I32 [n_kv, n_stream] arena row, -1: ordinary

    // nullptr without a tail
    ggml_tensor * new_rows = nullptr; // I64 [n_tokens] arena rows of the new cells
};

} // namespace intactkv
