// The graph nodes of fused attention: from tensors to a fused_call, and the exact merge of split cells.

#include "attention/attention.h"
#include "attention/call.h"
#include "attention/store.h"
#include "attention/targets/dispatch.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace intactkv {
namespace {

// What the nodes of attention keep at FUSED_PARAMS.
struct node_params {
    float scale = 1.0f;
    float max_bias = 0.0f;
    float softcap = 0.0f;
    int32_t has = 0; // which optional sources there are, in this order
    fused_rotation rot = {};
};

enum has_source { HAS_MASK = 1, HAS_SINKS = 2, HAS_K_ARENA = 4, HAS_V_ARENA = 8, HAS_ROWS = 16, HAS_COUNTER = 32 };

// Query rows x cells from which on threads take items as they finish, instead of every nth one: cores of different
// speed, or shared with other processes, then wait little for each other. It takes one more node, whose barrier costs
// about a microsecond. Where the border lies is a choice, not measured.
constexpr int64_t SHARE_FROM = 1 << 15;

static_assert(FUSED_PARAMS + sizeof(node_params) <= GGML_MAX_OP_PARAMS, "op_params too small");

// Sources of the attention node, in order, without gaps: ggml stops at none, but other readers may.
struct sources {
    ggml_tensor * list[GGML_MAX_SRC];
    int n = 0;
    int32_t has = 0;

    void add(ggml_tensor * t) { list[n++] = t; }
    void add_if(ggml_tensor * t, has_source bit) {
        if (t) {
            add(t);
            has |= bit;
        }
    }
};

bool side_supported(const ggml_tensor * t, bool latent) {
    return fused_head_supported(t->type, t->ne[0], latent) && t->nb[0] == ggml_type_size(t->type);
}

// Whether V is the first values of K's rows: views of one tensor, from the same byte on.
bool latents(const ggml_tensor * k, const ggml_tensor * v) {
    return k->view_src && v->view_src == k->view_src && v->view_offs == k->view_offs && k->ne[2] == 1 &&
            v->ne[0] <= k->ne[0] && v->nb[1] == k->nb[1] && v->nb[3] == k->nb[3];
}

fused_side make_side(const ggml_tensor * t, const ggml_tensor * arena) {
    fused_side side;
    side.data = (const uint8_t *) t->data;
    side.nb_cell = t->nb[1];
    side.nb_head = t->nb[2];
    side.nb_stream = t->nb[3];
    side.arena = arena ? (const uint16_t *) arena->data : nullptr;
    side.arena_row = arena ? arena->nb[1] / sizeof(uint16_t) : 0;
    side.type = t->type;
    side.dim = (int) t->ne[0];
    return side;
}

fused_plan plan_of(const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * v) {
    return fused_make_plan((int) k->ne[0], (int) v->ne[0], latents(k, v), (int) k->ne[1], (int) q->ne[1],
            (int) q->ne[2], (int) k->ne[2], (int) q->ne[3]);
}

node_params params_of(const ggml_tensor * node) {
    node_params p;
    memcpy(&p, (const char *) node->op_params + FUSED_PARAMS, sizeof(p));
    return p;
}

void set_params(ggml_tensor * node, const node_params & p) {
    memcpy((char *) node->op_params + FUSED_PARAMS, &p, sizeof(p));
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
    const ggml_tensor * mask = p.has & HAS_MASK ? *src++ : nullptr;
    const ggml_tensor * sinks = p.has & HAS_SINKS ? *src++ : nullptr;
    const ggml_tensor * k_arena = p.has & HAS_K_ARENA ? *src++ : nullptr;
    const ggml_tensor * v_arena = p.has & HAS_V_ARENA ? *src++ : nullptr;
    const ggml_tensor * rows = p.has & HAS_ROWS ? *src++ : nullptr;
    const ggml_tensor * counter = p.has & HAS_COUNTER ? *src++ : nullptr;

    fused_call call;
    call.q = (const char *) q->data;
    call.q_nb_token = q->nb[1];
    call.q_nb_head = q->nb[2];
    call.q_nb_stream = q->nb[3];
    call.k = make_side(k, k_arena);
    call.v = make_side(v, v_arena);
    call.latents = latents(k, v);
    call.mask = mask ? (const char *) mask->data : nullptr;
    call.mask_nb_token = mask ? mask->nb[1] : 0;
    call.mask_nb_head = mask ? mask->nb[2] : 0;
    call.mask_nb_stream = mask ? mask->nb[3] : 0;
    call.mask_heads = mask ? (int) mask->ne[2] : 1;
    call.mask_streams = mask ? (int) mask->ne[3] : 1;
    call.sinks = sinks ? (const float *) sinks->data : nullptr;
    call.row_of_cell = rows ? (const int32_t *) rows->data : nullptr;
    call.n_head = (int) q->ne[2];
    call.n_head_kv = (int) k->ne[2];
    call.n_tokens = (int) q->ne[1];
    call.n_stream = (int) q->ne[3];
    call.n_kv = (int) k->ne[1];
    call.scale = p.scale;
    call.max_bias = p.max_bias;
    call.softcap = p.softcap;
    call.rot_q = p.rot.k;
    call.rot_out = p.rot.v;
    call.plan = plan_of(q, k, v);
    call.out = (float *) dst->data;
    call.next_item = counter ? (int32_t *) counter->data : nullptr;

    fused_chosen().run(call, ith, nth);
}

// dst F32 [head_dim_v, n_head, n_tokens, n_stream] from partial results F32
// [FUSED_PARTIAL + head_dim_v, n_head*n_tokens, n_chunk, n_stream] and, maybe, sinks F32 [n_head].
void merge(ggml_tensor * dst, int ith, int nth, void *) {
    const ggml_tensor * part = dst->src[0];
    const ggml_tensor * sinks = dst->src[1];

    const node_params p = params_of(dst);
    const int64_t dim = dst->ne[0];
    const int64_t n_rows = part->ne[1];
    const int64_t n_chunk = part->ne[2];
    const int64_t stride = part->nb[2] / sizeof(float);

    for (int64_t i = ith; i < n_rows * part->ne[3]; i += nth) {
        const int64_t stream = i / n_rows;
        const int64_t row = i % n_rows;
        const float * first = (const float *) ((const char *) part->data + stream * part->nb[3] + row * part->nb[1]);
        float * out = (float *) dst->data + i * dim;

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

} // namespace

bool fused_supported(const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * v, const ggml_tensor * mask,
        const ggml_tensor * sinks) {
    return q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && q->ne[0] == k->ne[0] &&
            side_supported(k, latents(k, v)) && side_supported(v, false) && k->ne[1] == v->ne[1] &&
            k->ne[2] == v->ne[2] && k->ne[3] == q->ne[3] && v->ne[3] == q->ne[3] && q->ne[2] % k->ne[2] == 0 &&
            (!mask ||
                    (mask->type == GGML_TYPE_F16 && mask->nb[0] == sizeof(uint16_t) && mask->ne[1] >= q->ne[1] &&
                            q->ne[2] % mask->ne[2] == 0 && q->ne[3] % mask->ne[3] == 0)) &&
            (!sinks || (sinks->type == GGML_TYPE_F32 && fused_in_host_memory(sinks))) && fused_in_host_memory(k) &&
            fused_in_host_memory(v);
}

ggml_tensor * fused_attention(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * mask,
        ggml_tensor * sinks, const intact_rows * intact, fused_rotation rot, float scale, float max_bias,
        float logit_softcap) {
    GGML_ASSERT(fused_supported(q, k, v, mask, sinks));
    GGML_ASSERT(max_bias <= 0.0f || mask);
    GGML_ASSERT(!intact || !latents(k, v) || intact->k == intact->v);

    const fused_plan plan = plan_of(q, k, v);
    const bool split = plan.n_chunk > 1;

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
        ggml_tensor * out = ggml_custom_4d(ctx, GGML_TYPE_F32, v->ne[0], q->ne[2], q->ne[1], q->ne[3], src.list, src.n,
                attend, GGML_N_TASKS_MAX, nullptr);
        set_params(out, params);
        return out;
    }

    ggml_tensor * part = ggml_custom_4d(ctx, GGML_TYPE_F32, FUSED_PARTIAL + v->ne[0], q->ne[2] * q->ne[1], plan.n_chunk,
            q->ne[3], src.list, src.n, attend, GGML_N_TASKS_MAX, nullptr);
    set_params(part, params);

    ggml_tensor * merge_src[] = { part, sinks };
    ggml_tensor * out = ggml_custom_4d(ctx, GGML_TYPE_F32, v->ne[0], q->ne[2], q->ne[1], q->ne[3], merge_src,
            sinks ? 2 : 1, merge, GGML_N_TASKS_MAX, nullptr);
    set_params(out, params);
    return out;
}

} // namespace intactkv
