// Position shift (seq_add, seq_div): the rotation that upstream applies to the cells, on the arena rows and on the rounded
// cells that move. The others stay as they are, to the bit: upstream's graph turns all cells of all sequences, most of them
// by nothing, and rounds them anew. Blocks whose scale was fitted (attention/simd/fit-inl.h) lose that.

#pragma once

#include "ggml.h"

#include <cstdint>
#include <functional>

namespace intactkv {

class arena;

// a: nullptr, here and below, for a cache that can have no intact cells

// cells that share a row but are shifted differently get rows of their own
void before_shift(arena * a);

// I32 [n, 2] each: what moves, and by how many positions
struct shift_inputs {
    ggml_tensor * rows = nullptr;  // of the arena; nullptr: none does
    ggml_tensor * cells = nullptr; // of K, counted through the streams; nullptr: they are upstream's to turn
};

shift_inputs build_input_shift(const arena * a, ggml_context * ctx);
void set_input_shift(const arena * a, const shift_inputs & moves);

// One layer's K: its cells, [n_embd_gqa, n_cells, n_stream], and how a row is laid out: n_head heads of head_dim, of
// which n_rot elements carry the position, the first ones or, behind n_nope others, the last.
struct k_layer {
    uint32_t il;
    ggml_tensor * cells;
    int64_t head_dim;
    int64_t n_head;
    int64_t n_rot;
    int64_t n_nope;
};

// k: F32 [n_rot or head_dim, n_head, n]; rotates the first n_rot elements of each head, in place
using rope_fn = std::function<ggml_tensor *(ggml_tensor * k, ggml_tensor * shift)>;

// Shifts one layer's K in place, its arena rows and its cells by moves (build_input_shift()); the cells of a cache that can
// have no intact ones by shift: I32 [n_cells*n_stream]. rot: the cache's Hadamard matrix or nullptr. false: the cells are
// left to upstream's graph, which does them right. Upstream takes the rotated part of every head out of the quantized rows
// and undoes the Hadamard matrix on that part. It crashes where that is not the whole head (partial rotary), and where there is no matrix (head
// size not a multiple of 64); and ggml rotates no BF16. Here whole rows are widened to F32 first.
bool build_shift(const arena * a, ggml_cgraph * gf, ggml_context * ctx, const k_layer & k, ggml_tensor * shift,
        const shift_inputs & moves, ggml_tensor * rot, const rope_fn & rope);

// The attention factor with which a rotation keeps lengths. YaRN and LongRoPE scale K as they rotate it: a K that is
// rotated once more, by a shift, must not be scaled once more.
float shift_attn_factor(float yarn_ext_factor, float freq_scale);

} // namespace intactkv
