// The graph node that stores new K and V, and rows on their way into a cache or out of one.

#include "attention/store.h"
#include "attention/call.h"
#include "attention/targets/dispatch.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace intactkv {

bool fused_head_supported(ggml_type type, int64_t dim) {
    return std::find(std::begin(FUSED_TYPES), std::end(FUSED_TYPES), type) != std::end(FUSED_TYPES) && dim % 16 == 0 &&
            dim % ggml_blck_size(type) == 0 && dim <= FUSED_HEAD_MAX;
}

bool fused_in_host_memory(const ggml_tensor * t) {
    const ggml_tensor * owner = t->view_src ? t->view_src : t;
    return owner->buffer == nullptr || ggml_backend_buffer_is_host(owner->buffer);
}

void fused_rotate(float * x, int64_t n, int32_t n_rot) {
    if (n_rot > 0) {
        fused_chosen().rotate(x, n, n_rot);
    }
}

// The kernel's vectors are up to 16 values; rows that end within one go the slow way.
void fused_widen(const uint16_t * x, float * out, int64_t n) {
    n % 16 == 0 ? fused_chosen().widen(x, out, n) : ggml_fp16_to_fp32_row(x, out, n);
}

void fused_narrow(ggml_type type, const float * x, void * out, int64_t n) {
    if (type == GGML_TYPE_F32) {
        memcpy(out, x, n * sizeof(float));
    } else if (n % 16 != 0 || !fused_chosen().narrow(type, x, out, n)) {
        ggml_get_type_traits(type)->from_float_ref(x, out, n);
    }
}

namespace {

static_assert(FUSED_PARAMS + sizeof(fused_rotation) <= GGML_MAX_OP_PARAMS, "op_params too small");

fused_rotation rotation_of(const ggml_tensor * node) {
    fused_rotation rot;
    memcpy(&rot, (const char *) node->op_params + FUSED_PARAMS, sizeof(rot));
    return rot;
}

// One new row of one head: rotated and rounded into the cache.
void store_head(
        const ggml_tensor * cache, const ggml_tensor * cur, int64_t cell, int64_t head, int64_t token, int rot) {
    alignas(64) float x[FUSED_HEAD_MAX];
    const int64_t dim = cur->ne[0];
    memcpy(x, (const char *) cur->data + head * cur->nb[1] + token * cur->nb[2], dim * sizeof(float));
    fused_rotate(x, dim, rot);
    fused_narrow(
            cache->type, x, (char *) cache->data + cell * cache->nb[1] + head * ggml_row_size(cache->type, dim), dim);
}

// dst is the cache of K itself, and the cache of V a source that is written to.
void store(ggml_tensor * dst, int ith, int nth, void *) {
    const fused_rotation rot = rotation_of(dst);
    const ggml_tensor * v_cache = dst->src[1];
    const ggml_tensor * k = dst->src[2];
    const ggml_tensor * v = dst->src[3];
    const int64_t * k_cell = (const int64_t *) dst->src[4]->data;
    const int64_t * v_cell = (const int64_t *) dst->src[5]->data;

    // K's heads, then V's; a thread takes neighbours, so that no two of them write to one cache line at a time
    const int64_t n_k = k->ne[1] * k->ne[2];
    const int64_t n = n_k + v->ne[1] * v->ne[2];
    for (int64_t i = n * ith / nth; i < n * (ith + 1) / nth; i++) {
        const bool is_k = i < n_k;
        const int64_t j = is_k ? i : i - n_k;
        const int64_t heads = is_k ? k->ne[1] : v->ne[1];
        const int64_t token = j / heads;
        is_k ? store_head(dst, k, k_cell[token], j % heads, token, rot.k)
             : store_head(v_cache, v, v_cell[token], j % heads, token, rot.v);
    }
}

} // namespace

bool fused_store_supported(const ggml_tensor * cache, const ggml_tensor * cur) {
    return fused_head_supported(cache->type, cur->ne[0]) && fused_in_host_memory(cache) &&
            cache->ne[0] == cur->ne[0] * cur->ne[1] && cur->type == GGML_TYPE_F32 && cur->nb[0] == sizeof(float) &&
            cur->ne[3] == 1;
}

ggml_tensor * fused_store(ggml_context * ctx, ggml_tensor * k_cache, ggml_tensor * v_cache, ggml_tensor * k,
        ggml_tensor * v, ggml_tensor * k_cells, ggml_tensor * v_cells, fused_rotation rot) {
    GGML_ASSERT(fused_store_supported(k_cache, k) && fused_store_supported(v_cache, v));
    GGML_ASSERT(k_cells->type == GGML_TYPE_I64 && v_cells->type == GGML_TYPE_I64);

    ggml_tensor * others[] = { v_cache, k, v, k_cells, v_cells };
    ggml_tensor * out = ggml_custom_inplace(ctx, k_cache, others, 5, store, GGML_N_TASKS_MAX, nullptr);
    memcpy((char *) out->op_params + FUSED_PARAMS, &rot, sizeof(rot));
    return out;
}

} // namespace intactkv
