// One item of a call, and the memory that it is computed in.
//
// Rows of an item are ordered by query head, then token: row = head*tokens + token. An item of several KV heads has as
// many rows of each, one KV head behind the other.
//
// Compiled once per instruction set, inside its anonymous namespace: see kernel-inl.h.

#pragma once

#include "attention/call.h"
#include "attention/simd/blocks-inl.h"
#include "attention/simd/vector-inl.h"

namespace intactkv {
namespace {

constexpr int TILE_FLOATS = 8192;                                // cells x head size of a tile
constexpr int TILE_FLOATS_LATENT = 18432;                        // of latents, whose K is V too
constexpr int NARROW_MAX = W >= 8 ? 48 : 5;                      // rows up to which an item is narrow
constexpr int NARROW_MAX_QUANT = W >= 16 ? 24 : W >= 8 ? 12 : 5; // the same, if K and V are quantized

// Cells that are processed together: all intact or all ordinary.
struct tile {
    int n = 0;
    bool intact = false;
    bool masked = false; // some mask value may not be 0
    int32_t cell[FUSED_TILE];
    int32_t row[FUSED_TILE]; // of the arena
};

// A block of query rows, a few KV heads, a range of cells.
struct item {
    int stream, head, heads, token, tokens, kv_head, kv_heads, cell, cells;
    int next_cell; // where this thread will read on, most likely; -1: not in this cache
    int rows;      // per KV head
    int rows_pad;  // wide: rows, rounded up to W
    bool wide;
};

// Where the rows of a tile's cells are, for the first KV head of the item.
struct tile_rows {
    bool f16; // rows of the arena
    const uint8_t * base;
    const uint8_t * ahead_base;
    size_t head; // bytes from one KV head to the next
    size_t ahead_head;
    size_t offset[FUSED_TILE];
    size_t ahead[FUSED_TILE]; // rows of the next tile, see find_rows()
};

constexpr int FLOATS = FUSED_FLOATS_LATENT;
constexpr int TILE = TILE_FLOATS_LATENT;

// A thread's own, about 350 KiB. Nothing in it outlives an item.
struct alignas(64) scratch {
    float acc[FLOATS];                             // [KV head][row][dim_v]
    float q[FLOATS];                               // narrow: [KV head][row][dim_k]; wide: [dim_k][row]
    uint8_t q8[FLOATS];                            // narrow: [KV head][row][dim_k]; wide: [dim_k/4][row][4]
    float q_scale[FLOATS / QK];                    // narrow: [KV head][row][block]; wide: [block][row]
    float q_sum[FLOATS / QK];                      // scale times sum of q8 over a block, as q_scale
    int32_t q_start[FLOATS / QK];                  // -K_BIAS times sum of q8 over a block, as q_scale
    float k[TILE];                                 // wide: [cell][dim_k]
    uint8_t k8[TILE];                              // narrow: [dim_k/4][cell, cells_max][4]; wide: [cell][dim_k]
    float k_scale[TILE / QK];                      // narrow: [block][cell, cells_max]; wide: [cell][block]
    float k_low[TILE / QK];                        // as k_scale
    float v[TILE_FLOATS];                          // wide: [cell][dim_v], or pairs of cells; no floats of latents
    float s[FUSED_ROWS_MAX * FUSED_TILE + W];      // W more: see add_mask()
    float mask[(FUSED_ROWS_MAX + W) * FUSED_TILE]; // narrow: [token][cell]; wide: [cell][token, rounded up to W]
    float max[FUSED_ROWS_MAX];
    float sum[FUSED_ROWS_MAX];
    float beta[FUSED_ROWS_MAX];
    tile_rows k_rows, v_rows;    // of the tile in hand
    tile ordinary[2], intact[2]; // [0] being filled, [1] full
};

inline int round_up(int a, int b) {
    return (a + b - 1) / b * b;
}

inline int cells_of_tile(int dim_k, int dim_v, bool latents) {
    int n = TILE_FLOATS / (dim_k > dim_v ? dim_k : dim_v);
    if (latents) { // V of them has no floats of its own, pairs of cells have half the size
        n = TILE_FLOATS_LATENT / dim_k < 2 * TILE_FLOATS / dim_v ? TILE_FLOATS_LATENT / dim_k : 2 * TILE_FLOATS / dim_v;
    }
    n = n / 16 * 16;
    return n < FUSED_TILE ? n : FUSED_TILE;
}

// What every step of an item is given.
struct work {
    const fused_call & call;
    const item & it;
    scratch & mem;

    const int dim_k = call.k.dim;
    const int dim_v = call.v.dim;
    const int cells_max = cells_of_tile(dim_k, dim_v, call.latents);
};

// Item i of the plan, chunks varying fastest.
inline item make_item(const fused_call & call, int i, int nth) {
    const fused_plan & p = call.plan;
    const int n_group = call.n_head / call.n_head_kv;
    item it;
    it.cell = i % p.n_chunk * p.chunk_cells;
    it.next_cell = i % p.n_chunk + nth < p.n_chunk ? it.cell + nth * p.chunk_cells : -1;
    i /= p.n_chunk;
    it.kv_head = i % p.n_head_group * p.kv_heads;
    i /= p.n_head_group;
    it.head = i % p.n_head_block * p.heads;
    i /= p.n_head_block;
    it.token = i % p.n_token_block * p.tokens;
    it.stream = i / p.n_token_block;
    it.cells = call.n_kv - it.cell < p.chunk_cells ? call.n_kv - it.cell : p.chunk_cells;
    it.kv_heads = call.n_head_kv - it.kv_head < p.kv_heads ? call.n_head_kv - it.kv_head : p.kv_heads;
    it.heads = n_group - it.head < p.heads ? n_group - it.head : p.heads;
    it.tokens = call.n_tokens - it.token < p.tokens ? call.n_tokens - it.token : p.tokens;
    it.rows = it.heads * it.tokens;
    it.rows_pad = round_up(it.rows, W);
    const auto is_float = [](ggml_type type) {
        return type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
    };
    const bool quant = !is_float(call.k.type) && !is_float(call.v.type);
    it.wide = it.rows > (quant ? NARROW_MAX_QUANT : NARROW_MAX) && it.kv_heads == 1;
    return it;
}

} // namespace
} // namespace intactkv
