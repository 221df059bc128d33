// How one call is cut into items, the memory of a thread that computes them, and the slopes of heads.

#include "attention/call.h"

#include <algorithm>
#include <cmath>
#include <new>

namespace intactkv {

// Measured as kernel-inl.h says: so many times as fast with another value, one token at a depth, SmolLM2-135M's shape.
//
// CHUNK_MIN   64: x 0.36 (q8_0 at 0), 0.80 (512), 0.94 (2048). 1024: x 1.12 (512), 0.96 (2048), 0.77 (8192), on one thread;
//             but with one chunk at 512, three items are left for all threads.
// FEW_ROWS    0: x 0.88 (q8_0 at 2048), 0.72 (q4_0 at 8192), 0.53 (MHA q4_0 at 2048), 0.99 (4 tokens, q8_0 at 8192)
// ITEMS_WANT  16: x 1.02 (q8_0 at 2048), 1.12 (8192), 1.11 (7B class q8_0 at 8192), on one thread: the price of sharing
// ITEMS_MIN   a choice, not measured
constexpr int CHUNK_MIN = 256; // cells: below, starting and merging a chunk costs more than it spreads
constexpr int FEW_ROWS = 12;   // query rows up to which an item takes several KV heads: whole cache lines of a cell
constexpr int ITEMS_WANT = 64; // enough for every thread of a large machine, and to even out uneven chunks
constexpr int ITEMS_MIN = 16;  // and only if so many items remain

static int div_up(int a, int b) {
    return (a + b - 1) / b;
}

fused_plan fused_make_plan(
        int dim_k, int dim_v, bool latents, int n_kv, int n_tokens, int n_head, int n_head_kv, int n_stream) {
    const int n_group = n_head / n_head_kv;
    const int floats = latents ? FUSED_FLOATS_LATENT : FUSED_FLOATS;
    const int rows_max = std::min(FUSED_ROWS_MAX, floats / std::max(dim_k, dim_v) / 16 * 16);

    fused_plan p;
    p.heads = std::min(n_group, rows_max);
    p.n_head_block = div_up(n_group, p.heads);
    p.tokens = std::min(n_tokens, rows_max / p.heads);
    p.n_token_block = div_up(n_tokens, p.tokens);

    const int n_base = n_stream * p.n_head_block * p.n_token_block;
    const int n_chunk_max = div_up(n_kv, CHUNK_MIN);

    const int rows = p.heads * p.tokens;
    p.kv_heads = rows > FEW_ROWS ? 1 : std::min(n_head_kv, rows_max / rows);
    while (p.kv_heads > 1 && n_base * div_up(n_head_kv, p.kv_heads) * n_chunk_max < ITEMS_MIN) {
        p.kv_heads--;
    }
    p.n_head_group = div_up(n_head_kv, p.kv_heads);
    p.kv_heads = div_up(n_head_kv, p.n_head_group);

    const int n_chunk = std::clamp(ITEMS_WANT / (n_base * p.n_head_group), 1, n_chunk_max);
    p.chunk_cells = div_up(div_up(n_kv, n_chunk), FUSED_TILE) * FUSED_TILE;
    p.n_chunk = div_up(n_kv, p.chunk_cells);
    p.n_item = n_base * p.n_head_group * p.n_chunk;
    return p;
}

namespace {

struct thread_bytes {
    static constexpr auto ALIGN = std::align_val_t(64);

    void * data = nullptr;
    size_t size = 0;

    ~thread_bytes() { ::operator delete(data, ALIGN); }
};

} // namespace

void * fused_scratch(size_t bytes) {
    thread_local thread_bytes own;
    if (own.size < bytes) { // the first time, or another instruction set has been chosen
        ::operator delete(own.data, own.ALIGN);
        own.data = nullptr;
        own.size = 0;
        own.data = ::operator new(bytes, own.ALIGN);
        own.size = bytes;
    }
    return own.data;
}

float fused_slope(float max_bias, int n_head, int head) {
    if (max_bias <= 0.0f) {
        return 1.0f;
    }
    const int log2 = 1 << (int) std::floor(std::log2((float) n_head));
    const float m0 = std::pow(2.0f, -max_bias / log2);
    const float m1 = std::pow(2.0f, -max_bias / 2.0f / log2);
    return head < log2 ? std::pow(m0, (float) (head + 1)) : std::pow(m1, (float) (2 * (head - log2) + 1));
}

} // namespace intactkv
