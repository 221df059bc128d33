// Position shift (seq_add, seq_div): the rotation that upstream applies to the cells, on the arena rows that move; the
// others stay as they are, to the bit.

#pragma once

#include "ggml.h"

#include <cstdint>
#include <functional>

namespace intactkv {

class arena;

// cells that share a row but are shifted differently get rows of their own
void before_shift(arena & a);

// I32 [n, 2]: the rows that move, and by how many positions; nullptr if none does
ggml_tensor * build_input_shift(const arena & a, ggml_context * ctx);
void set_input_shift(const arena & a, ggml_tensor * moves);

// k: F32 [head_dim, n_head_kv, n]
using rope_fn = std::function<ggml_tensor *(ggml_tensor * k, ggml_tensor * shift)>;

// shifts layer il's K rows in place; rot: the cache's Hadamard matrix or nullptr
void build_shift(const arena & a, ggml_cgraph * gf, ggml_context * ctx, int32_t il, ggml_tensor * moves,
        ggml_tensor * rot, const rope_fn & rope);

} // namespace intactkv
