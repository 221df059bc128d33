// Fused attention on the CPU: what ggml_flash_attn_ext() computes, for a cache of which some cells are intact.
//
// One pass over K and V for all query heads that share a KV head, an online softmax (Milakov and Gimelshein,
// arXiv 1805.02867) over tiles of cells, cells split over threads and merged exactly (flash-decoding,
// https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Quantized K meets Q in integer dot products, as in
// upstream's op; V is expanded in registers (few queries) or once per tile (many).

#pragma once

#include "ggml.h"

#include "attention/store.h"

namespace intactkv {

// Where the F16 rows of intact cells are. nullptr instead of one of these: no cell of the cache is intact.
struct intact_rows {
    ggml_tensor * k; // arena K, F16 [n_embd_k_gqa, n_rows]; nullptr: K of the cache is F16 itself
    ggml_tensor * v; // arena V, F16 [n_embd_v_gqa, n_rows]; nullptr: V of the cache is F16 itself; of latents K's
    ggml_tensor * row_of_cell; // I32 [n_kv, n_stream]: arena row, -1 = ordinary
};

// Can fused_attention() compute this call? Types F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, IQ4_NL for K and for V,
// head sizes that are multiples of 16 up to 512, K, V and sinks in host memory where their buffers are known. Or latents, of
// one KV head: V is a view of K's rows, their first values, and K has up to 576.
bool fused_supported(const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * v, const ggml_tensor * mask,
        const ggml_tensor * sinks);

// Shapes, strides and meaning as ggml_flash_attn_ext() followed by ggml_flash_attn_ext_add_sinks():
//   q     F32 [head_dim_k, n_tokens, n_head,    n_stream], any strides but nb[0]
//   k     KV  [head_dim_k, n_kv,     n_head_kv, n_stream]
//   v     KV  [head_dim_v, n_kv,     n_head_kv, n_stream]
//   mask  F16 [n_kv, >= n_tokens, 1 or n_head, 1 or n_stream] or nullptr
//   sinks F32 [n_head] or nullptr
// rot: K and V of the cache are rotated so, Q is not yet, and the result is wanted as it was: both are rotated here.
// Returns F32 [head_dim_v, n_head, n_tokens, n_stream], contiguous. The result does not depend on the number of
// threads. Nothing is allocated when the graph runs: partial results of the split over cells are a tensor of the
// graph, everything else is on the stack.
ggml_tensor * fused_attention(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * mask,
        ggml_tensor * sinks, const intact_rows * intact, fused_rotation rot, float scale, float max_bias,
        float logit_softcap);

} // namespace intactkv
