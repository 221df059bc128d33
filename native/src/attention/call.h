// One attention call as plain numbers: what the graph node hands to the kernel of an instruction set, and how it is cut
// into items that threads take in turn.

#pragma once

#include <cstddef>
#include <cstdint>

#include "ggml.h"

namespace intactkv {

constexpr int FUSED_HEAD_MAX = 512;   // largest head size
constexpr int FUSED_LATENT_MAX = 576; // largest latent, of which V is a part
constexpr int FUSED_ROWS_MAX = 96;    // query rows of a block
constexpr int FUSED_FLOATS = 12288;   // query rows x head size of a block
constexpr int FUSED_FLOATS_LATENT = 18432;
constexpr int FUSED_TILE = 64;   // cells of a tile
constexpr int FUSED_PARTIAL = 2; // floats before the values of a partial result: maximum, sum

// The types of K and V that are read and stored.
constexpr ggml_type FUSED_TYPES[] = { GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0,
    GGML_TYPE_Q4_1, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL };
constexpr int FUSED_N_TYPES = sizeof(FUSED_TYPES) / sizeof(*FUSED_TYPES);

// Scores, and maxima of them, are kept as exponents of 2: e^x = 2^(x * FUSED_LOG2E)
constexpr float FUSED_LOG2E = 1.44269504f;

// K or V of a cache: row of cell c, KV head h, stream s at data + c*nb_cell + h*nb_head + s*nb_stream.
struct fused_side {
    const uint8_t * data;
    size_t nb_cell;
    size_t nb_head;
    size_t nb_stream;
    const uint16_t * arena; // F16 rows of intact cells, or nullptr: intact cells are read from data
    size_t arena_row;       // F16 values per arena row
    ggml_type type;
    int dim; // head size
};

// How the work is cut: blocks of query rows x groups of KV heads x chunks of cells.
struct fused_plan {
    int heads;       // query heads of a block that share one KV head
    int tokens;      // tokens of a block; a block has heads*tokens query rows per KV head
    int kv_heads;    // KV heads of an item
    int chunk_cells; // cells of a chunk
    int n_head_block;
    int n_token_block;
    int n_head_group;
    int n_chunk; // more than 1: items write partial results, which a second node merges
    int n_item;
};

struct fused_call {
    const char * q;
    size_t q_nb_token, q_nb_head, q_nb_stream;
    fused_side k, v;
    bool latents;      // V is the first values of K's rows, also in the arena
    const char * mask; // or nullptr
    size_t mask_nb_token, mask_nb_head, mask_nb_stream;
    int mask_heads, mask_streams;
    const float * sinks;         // or nullptr
    const int32_t * row_of_cell; // or nullptr
    int n_head, n_head_kv, n_tokens, n_stream, n_kv;
    float scale, max_bias, softcap;
    int rot_q;   // Q is rotated in blocks of so many values first, see simd/rows-inl.h; 0: it is not
    int rot_out; // so is the result; not partial results, they are rotated when they have been merged
    fused_plan plan;
    int32_t * next_item; // shared by the threads, 0 at first; or nullptr: thread i takes items i, i + nth, ...
    float * out;         // result, or partial results [n_stream][n_chunk][n_tokens][n_head][FUSED_PARTIAL + head_dim_v]
};

fused_plan fused_make_plan(
        int dim_k, int dim_v, bool latents, int n_kv, int n_tokens, int n_head, int n_head_kv, int n_stream);

// At least so many bytes of the calling thread's own, aligned to 64, with whatever it left there; it keeps them as long as
// it lives. Not on its stack: a thread of macOS has 512 KiB, one of musl 128.
void * fused_scratch(size_t bytes);

// ALiBi slope of a query head (arXiv 2108.12409, as in ggml_flash_attn_ext); 1 without a bias.
float fused_slope(float max_bias, int n_head, int head);

} // namespace intactkv
