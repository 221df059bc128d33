// New K and V into the cells of a cache, on the CPU, in one graph node instead of upstream's four; and what goes with it:
// rows that are rotated, widened, rounded, and which caches these nodes can use at all.

#pragma once

#include "ggml.h"

namespace intactkv {

// Upstream keeps K and V of a quantized cache rotated by a Hadamard matrix in blocks of so many values; 0: as they are.
struct fused_rotation {
    int32_t k = 0;
    int32_t v = 0;
};

// Where new rows go besides: F16 rows of intact cells. nullptr instead of K or V: that side of the cache is exact.
struct row_target {
    ggml_tensor * k;    // F16 [head_dim*n_head_kv, n_rows]
    ggml_tensor * v;    // F16 [head_dim*n_head_kv, n_rows]
    ggml_tensor * rows; // I64 [n_tokens]
};

// Can fused_store() store this K or V? The types and head sizes of fused_supported(). latent: it is K, and V a part of it
bool fused_store_supported(const ggml_tensor * cache, const ggml_tensor * cur, bool latent = false);

// New K and V into their cells, rotated and rounded: what upstream does with two Hadamard products and two
// ggml_set_rows(). The node is a view of k_cache; build it into the graph before the attention that reads the cells.
// tail: the same rows, rotated too, at F16; or nullptr
//   k_cache, v_cache  KV  [head_dim*n_head_kv, n_cells, ...], streams one behind the other
//   k, v              F32 [head_dim, n_head_kv, n_tokens], any strides but nb[0]
//   k_cells, v_cells  I64 [n_tokens] the rows of k_cache and v_cache that they go to
// Of latents, which are K, there is no v_cache, v and v_cells: nullptr.
ggml_tensor * fused_store(ggml_context * ctx, ggml_tensor * k_cache, ggml_tensor * v_cache, ggml_tensor * k,
        ggml_tensor * v, ggml_tensor * k_cells, ggml_tensor * v_cells, fused_rotation rot,
        const row_target * tail = nullptr);

// F32 rows, as the cache keeps them, into a cache or an arena, rounded as fused_store() does it. Where that is not possible
// ggml_set_rows() does it.
//   to    F16 or KV [head_dim*n_head_kv, n_cells]
//   x     F32 [head_dim*n_head_kv, n_rows]
//   rows  I32 [n_rows] where they go
ggml_tensor * store_rows(ggml_context * ctx, ggml_tensor * to, ggml_tensor * x, ggml_tensor * rows, int64_t head_dim);

// In place, the rotation of fused_rotation: each block of n_rot of the n values. n_rot 0: nothing happens.
void fused_rotate(float * x, int64_t n, int32_t n_rot);

// n F16 values as F32, and n F32 values in F32 or a KV type, in whole blocks.
void fused_widen(const uint16_t * x, float * out, int64_t n);
void fused_narrow(ggml_type type, const float * x, void * out, int64_t n);

// A row of K or V of one head: is it of a type and size that attention reads and fused_store() stores?
bool fused_head_supported(ggml_type type, int64_t dim, bool latent = false);

// Unknown (not yet allocated) counts as host memory: the scheduler then puts the tensor where the node runs.
bool fused_in_host_memory(const ggml_tensor * t);

// Where a node keeps what it is to do: in op_params, behind what ggml_custom_4d() keeps there (function, n_tasks, user
// data: 24 bytes). So the node owns it, and a graph may outlive whoever built it.
constexpr size_t FUSED_PARAMS = 32;

} // namespace intactkv
