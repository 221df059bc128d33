// The graph nodes of fused attention: from tensors to a fused_call, and the exact merge of split cells.

#include "attention/attention.h"
#include "attention/call.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace intactkv {

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

// Travels in op_params, behind what ggml_custom_4d() keeps there (function, n_tasks, user data: 24 bytes): the node
// owns it, so a graph may outlive whoever built it.
struct node_params {
    float          scale    = 1.0f;
    float          max_bias = 0.0f;
    float          softcap  = 0.0f;
    int32_t        has      = 0; // which optional sources there are, in this order
    fused_rotation rot      = {};
};

enum has_source { HAS_MASK = 1, HAS_SINKS = 2, HAS_K_ARENA = 4, HAS_V_ARENA = 8, HAS_ROWS = 16, HAS_COUNTER = 32 };

// Query rows x cells from which on threads take items as they finish, instead of every nth one: cores of different
// speed, or shared with other processes, then wait little for each other. It takes one more node, whose barrier costs
// about a microsecond.
constexpr int64_t SHARE_FROM = 1 << 15;

constexpr size_t PARAMS_OFFSET = 32;
static_assert(PARAMS_OFFSET + sizeof(node_params) <= GGML_MAX_OP_PARAMS, "op_params too small");

// Sources of the attention node, in order, without gaps: ggml stops at none, but other readers may.
struct sources {
    ggml_tensor * list[GGML_MAX_SRC];
    int           n   = 0;
    int32_t       has = 0;

    void add(ggml_tensor * t) {
        list[n++] = t;
    }
    void add_if(ggml_tensor * t, has_source bit) {
        if (t) {
            add(t);
            has |= bit;
        }
    }
};

bool type_supported(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_IQ4_NL:
            return true;
        default:
            return false;
    }
}

bool head_supported(ggml_type type, int64_t dim) {
    return type_supported(type) && dim % 16 == 0 && dim % ggml_blck_size(type) == 0 && dim <= FUSED_HEAD_MAX;
}

bool side_supported(const ggml_tensor * t) {
    return head_supported(t->type, t->ne[0]) && t->nb[0] == ggml_type_size(t->type);
}

// Unknown (not yet allocated) counts as host memory: the scheduler then puts the tensor where the node runs.
bool in_host_memory(const ggml_tensor * t) {
    const ggml_tensor * owner = t->view_src ? t->view_src : t;
    return owner->buffer == nullptr || ggml_backend_buffer_is_host(owner->buffer);
}

fused_side make_side(const ggml_tensor * t, const ggml_tensor * arena) {
    fused_side side;
    side.data      = (const uint8_t *) t->data;
    side.nb_cell   = t->nb[1];
    side.nb_head   = t->nb[2];
    side.nb_stream = t->nb[3];
    side.arena     = arena ? (const uint16_t *) arena->data : nullptr;
    side.arena_row = arena ? arena->nb[1] / sizeof(uint16_t) : 0;
    side.type      = t->type;
    side.dim       = (int) t->ne[0];
    return side;
}

fused_plan plan_of(const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * v) {
    return fused_make_plan((int) k->ne[0], (int) v->ne[0], (int) k->ne[1], (int) q->ne[1], (int) q->ne[2],
            (int) k->ne[2], (int) q->ne[3]);
}

node_params params_of(const ggml_tensor * node) {
    node_params p;
    memcpy(&p, (const char *) node->op_params + PARAMS_OFFSET, sizeof(p));
    return p;
}

void set_params(ggml_tensor * node, const node_params & p) {
    memcpy((char *) node->op_params + PARAMS_OFFSET, &p, sizeof(p));
}

// dst I32 [1]: the next item that nobody has taken.
void reset_counter(ggml_tensor * dst, int, int, void *) {
    *(int32_t *) dst->data = 0;
}

void attend(ggml_tensor * dst, int ith, int nth, void *) {
    const node_params p = params_of(dst);

    ggml_tensor * const * src = dst->src;
    const ggml_tensor * q = *src++;
    const ggml_tensor * k = *src++;
    const ggml_tensor * v = *src++;
    const ggml_tensor * mask    = p.has & HAS_MASK    ? *src++ : nullptr;
    const ggml_tensor * sinks   = p.has & HAS_SINKS   ? *src++ : nullptr;
    const ggml_tensor * k_arena = p.has & HAS_K_ARENA ? *src++ : nullptr;
    const ggml_tensor * v_arena = p.has & HAS_V_ARENA ? *src++ : nullptr;
    const ggml_tensor * rows    = p.has & HAS_ROWS    ? *src++ : nullptr;
    const ggml_tensor * counter = p.has & HAS_COUNTER ? *src++ : nullptr;

    fused_call call;
    call.q              = (const char *) q->data;
    call.q_nb_token     = q->nb[1];
    call.q_nb_head      = q->nb[2];
    call.q_nb_stream    = q->nb[3];
    call.k              = make_side(k, k_arena);
    call.v              = make_side(v, v_arena);
    call.mask           = mask ? (const char *) mask->data : nullptr;
    call.mask_nb_token  = mask ? mask->nb[1] : 0;
    call.mask_nb_head   = mask ? mask->nb[2] : 0;
    call.mask_nb_stream = mask ? mask->nb[3] : 0;
    call.mask_heads     = mask ? (int) mask->ne[2] : 1;
    call.mask_streams   = mask ? (int) mask->ne[3] : 1;
    call.sinks          = sinks ? (const float *) sinks->data : nullptr;
    call.row_of_cell    = rows ? (const int32_t *) rows->data : nullptr;
    call.n_head         = (int) q->ne[2];
    call.n_head_kv      = (int) k->ne[2];
    call.n_tokens       = (int) q->ne[1];
    call.n_stream       = (int) q->ne[3];
    call.n_kv           = (int) k->ne[1];
    call.scale          = p.scale;
    call.max_bias       = p.max_bias;
    call.softcap        = p.softcap;
    call.rot_q          = p.rot.k;
    call.rot_out        = p.rot.v;
    call.plan           = plan_of(q, k, v);
    call.out            = (float *) dst->data;

    call.next_item      = counter ? (int32_t *) counter->data : nullptr;

    fused_chosen().run(call, ith, nth);
}

// dst F32 [head_dim_v, n_head, n_tokens, n_stream] from partial results F32
// [FUSED_PARTIAL + head_dim_v, n_head*n_tokens, n_chunk, n_stream] and, maybe, sinks F32 [n_head].
void merge(ggml_tensor * dst, int ith, int nth, void *) {
    const ggml_tensor * part  = dst->src[0];
    const ggml_tensor * sinks = dst->src[1];

    const node_params p   = params_of(dst);
    const int64_t dim     = dst->ne[0];
    const int64_t n_rows  = part->ne[1];
    const int64_t n_chunk = part->ne[2];
    const int64_t stride  = part->nb[2] / sizeof(float);

    for (int64_t i = ith; i < n_rows * part->ne[3]; i += nth) {
        const int64_t stream = i / n_rows;
        const int64_t row    = i % n_rows;
        const float * first  = (const float *) ((const char *) part->data + stream * part->nb[3] + row * part->nb[1]);
        float       * out    = (float *) dst->data + i * dim;

        const float sink = sinks ? ((const float *) sinks->data)[row % dst->ne[1]] * FUSED_LOG2E : -INFINITY;
        float max = sink;
        for (int64_t c = 0; c < n_chunk; c++) {
            max = std::max(max, first[c * stride]);
        }
        float sum = sinks ? std::exp2(sink - max) : 0.0f;
        std::fill(out, out + dim, 0.0f);
        for (int64_t c = 0; c < n_chunk; c++) {
            const float * chunk = first + c * stride;
            if (chunk[1] == 0.0f) {
                continue; // no cell of this chunk was visible
            }
            const float w = std::exp2(chunk[0] - max);
            sum += w * chunk[1];
            for (int64_t d = 0; d < dim; d++) {
                out[d] += w * chunk[FUSED_PARTIAL + d];
            }
        }
        const float inv = sum == 0.0f ? 0.0f : 1.0f / sum;
        for (int64_t d = 0; d < dim; d++) {
            out[d] *= inv;
        }
        fused_rotate(out, dim, p.rot.v);
    }
}

// One new row of one head: rotated and rounded into the cache.
void store_head(const ggml_tensor * cache, const ggml_tensor * cur, int64_t cell, int64_t head, int64_t token, int rot) {
    alignas(64) float x[FUSED_HEAD_MAX];
    const int64_t dim = cur->ne[0];
    memcpy(x, (const char *) cur->data + head * cur->nb[1] + token * cur->nb[2], dim * sizeof(float));
    fused_rotate(x, dim, rot);
    fused_narrow(cache->type, x, (char *) cache->data + cell * cache->nb[1] + head * ggml_row_size(cache->type, dim), dim);
}

// dst is the cache of K itself, and the cache of V a source that is written to.
void store(ggml_tensor * dst, int ith, int nth, void *) {
    const node_params p = params_of(dst);
    const ggml_tensor * v_cache = dst->src[1];
    const ggml_tensor * k = dst->src[2];
    const ggml_tensor * v = dst->src[3];
    const int64_t     * k_cell = (const int64_t *) dst->src[4]->data;
    const int64_t     * v_cell = (const int64_t *) dst->src[5]->data;

    // K's heads, then V's; a thread takes neighbours, so that no two of them write to one cache line at a time
    const int64_t n_k = k->ne[1] * k->ne[2];
    const int64_t n   = n_k + v->ne[1] * v->ne[2];
    for (int64_t i = n * ith / nth; i < n * (ith + 1) / nth; i++) {
        const bool    is_k  = i < n_k;
        const int64_t j     = is_k ? i : i - n_k;
        const int64_t heads = is_k ? k->ne[1] : v->ne[1];
        const int64_t token = j / heads;
        is_k ? store_head(dst, k, k_cell[token], j % heads, token, p.rot.k)
             : store_head(v_cache, v, v_cell[token], j % heads, token, p.rot.v);
    }
}

} // namespace

bool fused_supported(
        const ggml_tensor * q,
        const ggml_tensor * k,
        const ggml_tensor * v,
        const ggml_tensor * mask,
        const ggml_tensor * sinks) {
    return q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && q->ne[0] == k->ne[0] &&
           side_supported(k) && side_supported(v) &&
           k->ne[1] == v->ne[1] && k->ne[2] == v->ne[2] && k->ne[3] == q->ne[3] && v->ne[3] == q->ne[3] &&
           q->ne[2] % k->ne[2] == 0 &&
           (!mask || (mask->type == GGML_TYPE_F16 && mask->nb[0] == sizeof(uint16_t) && mask->ne[1] >= q->ne[1] &&
                      q->ne[2] % mask->ne[2] == 0 && q->ne[3] % mask->ne[3] == 0)) &&
           (!sinks || (sinks->type == GGML_TYPE_F32 && in_host_memory(sinks))) &&
           in_host_memory(k) && in_host_memory(v);
}

ggml_tensor * fused_attention(
        ggml_context      * ctx,
        ggml_tensor       * q,
        ggml_tensor       * k,
        ggml_tensor       * v,
        ggml_tensor       * mask,
        ggml_tensor       * sinks,
        const intact_rows * intact,
        fused_rotation      rot,
        float               scale,
        float               max_bias,
        float               logit_softcap) {
    GGML_ASSERT(fused_supported(q, k, v, mask, sinks));
    GGML_ASSERT(max_bias <= 0.0f || mask);

    const fused_plan plan  = plan_of(q, k, v);
    const bool       split = plan.n_chunk > 1;

    sources src;
    src.add(q);
    src.add(k);
    src.add(v);
    src.add_if(mask, HAS_MASK);
    src.add_if(split ? nullptr : sinks, HAS_SINKS); // of split cells they belong to the merge
    if (intact && (intact->k || intact->v)) {
        src.add_if(intact->k, HAS_K_ARENA);
        src.add_if(intact->v, HAS_V_ARENA);
        src.add_if(intact->row_of_cell, HAS_ROWS);
    }
    if (plan.n_item > 1 && q->ne[1] * q->ne[2] * q->ne[3] * k->ne[1] >= SHARE_FROM) {
        ggml_tensor * first[] = { q }; // so that it is computed before attention, not with the inputs
        src.add_if(ggml_custom_4d(ctx, GGML_TYPE_I32, 1, 1, 1, 1, first, 1, reset_counter, 1, nullptr), HAS_COUNTER);
    }
    const node_params params = { scale, max_bias, logit_softcap, src.has, rot };

    if (!split) {
        ggml_tensor * out = ggml_custom_4d(ctx, GGML_TYPE_F32, v->ne[0], q->ne[2], q->ne[1], q->ne[3],
                src.list, src.n, attend, GGML_N_TASKS_MAX, nullptr);
        set_params(out, params);
        return out;
    }

    ggml_tensor * part = ggml_custom_4d(ctx, GGML_TYPE_F32, FUSED_PARTIAL + v->ne[0], q->ne[2] * q->ne[1],
            plan.n_chunk, q->ne[3], src.list, src.n, attend, GGML_N_TASKS_MAX, nullptr);
    set_params(part, params);

    ggml_tensor * merge_src[] = { part, sinks };
    ggml_tensor * out = ggml_custom_4d(ctx, GGML_TYPE_F32, v->ne[0], q->ne[2], q->ne[1], q->ne[3],
            merge_src, sinks ? 2 : 1, merge, GGML_N_TASKS_MAX, nullptr);
    set_params(out, params);
    return out;
}

bool fused_store_supported(const ggml_tensor * cache, const ggml_tensor * cur) {
    return head_supported(cache->type, cur->ne[0]) && in_host_memory(cache) && cache->ne[0] == cur->ne[0] * cur->ne[1] &&
           cur->type == GGML_TYPE_F32 && cur->nb[0] == sizeof(float) && cur->ne[3] == 1;
}

ggml_tensor * fused_store(
        ggml_context * ctx,
        ggml_tensor  * k_cache,
        ggml_tensor  * v_cache,
        ggml_tensor  * k,
        ggml_tensor  * v,
        ggml_tensor  * k_cells,
        ggml_tensor  * v_cells,
        fused_rotation rot) {
    GGML_ASSERT(fused_store_supported(k_cache, k) && fused_store_supported(v_cache, v));
    GGML_ASSERT(k_cells->type == GGML_TYPE_I64 && v_cells->type == GGML_TYPE_I64);

    ggml_tensor * others[] = { v_cache, k, v, k_cells, v_cells };
    ggml_tensor * out = ggml_custom_inplace(ctx, k_cache, others, 5, store, GGML_N_TASKS_MAX, nullptr);
    node_params params;
    params.rot = rot;
    set_params(out, params);
    return out;
}

const char * fused_isa() {
    return fused_chosen().isa;
}

} // namespace intactkv
