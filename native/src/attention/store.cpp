// The graph node that stores new K and V, and rows on their way into a cache or out of one.

#include "attention/store.h"
#include "attention/call.h"
#include "attention/targets/dispatch.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace intactkv {

bool fused_head_supported(ggml_type type, int64_t dim, bool latent) {
    return std::find(std::begin(FUSED_TYPES), std::end(FUSED_TYPES), type) != std::end(FUSED_TYPES) && dim % 16 == 0 &&
            dim % ggml_blck_size(type) == 0 && dim <= (latent ? FUSED_LATENT_MAX : FUSED_HEAD_MAX);
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

// What the node keeps at FUSED_PARAMS.
struct node_params {
    fused_rotation rot;
    int32_t has_v;      // the cache of V is a source, V, and its cells
    int32_t has_k_rows; // sources behind these: the tail's K, its V, and the rows
    int32_t has_v_rows;
};

static_assert(FUSED_PARAMS + sizeof(node_params) <= GGML_MAX_OP_PARAMS, "op_params too small");

node_params params_of(const ggml_tensor * node) {
    node_params p;
    memcpy(&p, (const char *) node->op_params + FUSED_PARAMS, sizeof(p));
    return p;
}

// New K or V, and where it goes.
struct store_side {
    const ggml_tensor * cur;
    const ggml_tensor * cache;
    const int64_t * cell;
    const ggml_tensor * rows; // or nullptr
    const int64_t * row;
    int32_t rot;
};

char * head_of(const ggml_tensor * t, int64_t row, int64_t head, int64_t dim) {
    return (char *) t->data + row * t->nb[1] + head * ggml_row_size(t->type, dim);
}

// One new row of one head: rotated, and rounded into the cache and into the tail.
void store_head(const store_side & to, int64_t head, int64_t token) {
    alignas(64) float x[FUSED_LATENT_MAX];
    const ggml_tensor * cur = to.cur;
    const int64_t dim = cur->ne[0];
    memcpy(x, (const char *) cur->data + head * cur->nb[1] + token * cur->nb[2], dim * sizeof(float));
    fused_rotate(x, dim, to.rot);
    fused_narrow(to.cache->type, x, head_of(to.cache, to.cell[token], head, dim), dim);
    if (to.rows) {
        fused_narrow(GGML_TYPE_F16, x, head_of(to.rows, to.row[token], head, dim), dim);
    }
}

// dst is the cache of K itself; the cache of V and the tail are sources that are written to.
void store(ggml_tensor * dst, int ith, int nth, void *) {
    const node_params p = params_of(dst);
    ggml_tensor * const * src = dst->src + 1;
    const ggml_tensor * k = *src++;
    const int64_t * k_cell = (const int64_t *) (*src++)->data;
    const ggml_tensor * v_cache = p.has_v ? *src++ : nullptr;
    const ggml_tensor * v = p.has_v ? *src++ : nullptr;
    const int64_t * v_cell = p.has_v ? (const int64_t *) (*src++)->data : nullptr;
    const ggml_tensor * k_rows = p.has_k_rows ? *src++ : nullptr;
    const ggml_tensor * v_rows = p.has_v_rows ? *src++ : nullptr;
    const int64_t * row = k_rows || v_rows ? (const int64_t *) (*src++)->data : nullptr;

    const store_side sides[] = { { k, dst, k_cell, k_rows, row, p.rot.k },
        { v, v_cache, v_cell, v_rows, row, p.rot.v } };

    // K's heads, then V's; a thread takes neighbours, so that no two of them write to one cache line at a time
    const int64_t n_k = k->ne[1] * k->ne[2];
    const int64_t n = n_k + (v ? v->ne[1] * v->ne[2] : 0);
    for (int64_t i = n * ith / nth; i < n * (ith + 1) / nth; i++) {
        const store_side & to = sides[i < n_k ? 0 : 1];
        const int64_t j = i < n_k ? i : i - n_k;
        store_head(to, j % to.cur->ne[1], j / to.cur->ne[1]);
    }
}

void narrow_rows(ggml_tensor * dst, int ith, int nth, void *) {
    const ggml_tensor * x = dst->src[1];
    const int32_t * row = (const int32_t *) dst->src[2]->data;
    const int64_t n = x->ne[1];
    for (int64_t i = n * ith / nth; i < n * (ith + 1) / nth; i++) {
        const float * from = (const float *) ((const char *) x->data + i * x->nb[1]);
        fused_narrow(dst->type, from, (char *) dst->data + row[i] * dst->nb[1], dst->ne[0]);
    }
}

} // namespace

ggml_tensor * store_rows(ggml_context * ctx, ggml_tensor * to, ggml_tensor * x, ggml_tensor * rows, int64_t head_dim) {
    if (!fused_head_supported(to->type, head_dim, true) || !fused_in_host_memory(to)) {
        return ggml_set_rows(ctx, to, x, rows);
    }
    GGML_ASSERT(x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && rows->type == GGML_TYPE_I32);
    ggml_tensor * others[] = { x, rows };
    return ggml_custom_inplace(ctx, to, others, 2, narrow_rows, GGML_N_TASKS_MAX, nullptr);
}

bool fused_store_supported(const ggml_tensor * cache, const ggml_tensor * cur, bool latent) {
    return fused_head_supported(cache->type, cur->ne[0], latent) && fused_in_host_memory(cache) &&
            cache->ne[0] == cur->ne[0] * cur->ne[1] && cur->type == GGML_TYPE_F32 && cur->nb[0] == sizeof(float) &&
            cur->ne[3] == 1;
}

ggml_tensor * fused_store(ggml_context * ctx, ggml_tensor * k_cache, ggml_tensor * v_cache, ggml_tensor * k,
        ggml_tensor * v, ggml_tensor * k_cells, ggml_tensor * v_cells, fused_rotation rot, const row_target * tail) {
    GGML_ASSERT(fused_store_supported(k_cache, k, v_cache == nullptr) && k_cells->type == GGML_TYPE_I64);
    GGML_ASSERT(!v_cache || (fused_store_supported(v_cache, v) && v_cells->type == GGML_TYPE_I64));

    ggml_tensor * others[GGML_MAX_SRC - 1] = { k, k_cells, v_cache, v, v_cells };
    const int n_always = v_cache ? 5 : 2;
    int n = n_always;
    node_params params = { rot, v_cache != nullptr, tail && tail->k, tail && tail->v };
    for (ggml_tensor * rows : { params.has_k_rows ? tail->k : nullptr, params.has_v_rows ? tail->v : nullptr }) {
        if (rows) {
            GGML_ASSERT(rows->type == GGML_TYPE_F16 && tail->rows->type == GGML_TYPE_I64);
            others[n++] = rows;
        }
    }
    if (n > n_always) {
        others[n++] = tail->rows;
    }
    ggml_tensor * out = ggml_custom_inplace(ctx, k_cache, others, n, store, GGML_N_TASKS_MAX, nullptr);
    memcpy((char *) out->op_params + FUSED_PARAMS, &params, sizeof(params));
    return out;
}

} // namespace intactkv
