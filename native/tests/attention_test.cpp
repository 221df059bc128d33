// C entry points around fused attention and upstream's op, for tests/test_fused.py and benchmarks/attention.py:
// both run as nodes of a ggml graph on the same tensors, laid out as in llama.cpp's cache.

#include "attention/attention.h"
#include "attention/targets/dispatch.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace {

ggml_tensor * cache_tensor(ggml_context * ctx, ggml_type type, const float * values, int64_t dim, int64_t n_head_kv,
        int64_t n_kv, int64_t n_stream) {
    ggml_tensor * t = ggml_new_tensor_3d(ctx, type, dim * n_head_kv, n_kv, n_stream);
    const int64_t n = ggml_nelements(t);
    if (type == GGML_TYPE_F32) {
        memcpy(t->data, values, ggml_nbytes(t));
    } else {
        // row by row: rows are whole blocks
        ggml_quantize_chunk(type, values, t->data, 0, n / t->ne[0], t->ne[0], nullptr);
    }
    return t;
}

ggml_tensor * head_view(ggml_context * ctx, ggml_tensor * t, int64_t dim, int64_t n_head_kv) {
    const size_t row = ggml_row_size(t->type, dim);
    ggml_tensor * v = ggml_view_4d(ctx, t, dim, n_head_kv, t->ne[1], t->ne[2], row, t->nb[1], t->nb[2], 0);
    return ggml_permute(ctx, v, 0, 2, 1, 3);
}

} // namespace

extern "C" {

struct fused_case {
    int32_t dim_k, dim_v, n_head, n_head_kv, n_tokens, n_kv, n_stream;
    int32_t type_k, type_v;
    int32_t mask_heads; // 0: no mask
    int32_t mask_streams;
    int32_t mask_tokens; // >= n_tokens
    int32_t n_rows;      // of the arena; 0: no intact cells
    intactkv::fused_rotation rot;
    float scale, max_bias, softcap;
    const float * q;       // [n_stream][n_tokens][n_head][dim_k]
    const float * k;       // [n_stream][n_kv][n_head_kv][dim_k]
    const float * v;       // or NULL: V is the first dim_v values of K's rows, of one KV head; so it is in the arena
    const uint16_t * mask; // F16 [mask_streams][mask_heads][mask_tokens][n_kv]
    const float * sinks;   // [n_head] or NULL
    const float * arena_k; // [n_rows][n_head_kv][dim_k] or NULL
    const float * arena_v;
    const int32_t * row_of_cell; // [n_stream][n_kv]
};

bool fused_test_isa(const char * name) {
    return intactkv::fused_choose(name);
}

const char * fused_test_chosen(void) {
    return intactkv::fused_isa();
}

// What a row of this type holds after quantizing: n values, rows of dim values.
void fused_test_round(int32_t type, const float * in, float * out, int64_t n, int64_t dim) {
    if (type == GGML_TYPE_F32) {
        memcpy(out, in, n * sizeof(float));
        return;
    }
    std::vector<uint8_t> bytes(ggml_row_size((ggml_type) type, n));
    ggml_quantize_chunk((ggml_type) type, in, bytes.data(), 0, n / dim, dim, nullptr);
    ggml_get_type_traits((ggml_type) type)->to_float(bytes.data(), out, n);
}

// The bytes of n values in rows of dim values; returns how many. out NULL: only counts.
int64_t fused_test_quantize(int32_t type, const float * in, void * out, int64_t n, int64_t dim) {
    if (out) {
        ggml_quantize_chunk((ggml_type) type, in, out, 0, n / dim, dim, nullptr);
    }
    return (int64_t) ggml_row_size((ggml_type) type, n);
}

// Runs the case once on n_threads, then n_rep times more, each time with one measurement in seconds.
// n_layer copies of K and V are used in turn, so that timings read memory as a model with n_layer layers does.
// which: 0 ggml_flash_attn_ext; 1 fused attention; 2 both in turn, fused first: seconds has 2*n_rep values and out is
// fused attention's. out F32 [n_stream][n_tokens][n_head][dim_v]. false: not supported.
bool fused_test_run(const fused_case * c, int32_t which, int32_t n_threads, float * out, int32_t n_rep, int32_t n_layer,
        double * seconds) {
    const size_t kv_bytes =
            ggml_row_size((ggml_type) c->type_k, (size_t) c->dim_k * c->n_head_kv * c->n_kv * c->n_stream) +
            ggml_row_size((ggml_type) c->type_v, (size_t) c->dim_v * c->n_head_kv * c->n_kv * c->n_stream);
    const size_t rest = sizeof(float) *
            ((size_t) c->n_stream * c->n_tokens * c->n_head * (c->dim_k + 3 * c->dim_v * (size_t) n_layer) +
                    (size_t) c->mask_heads * c->mask_streams * c->mask_tokens * c->n_kv +
                    (size_t) c->n_rows * c->n_head_kv * (c->dim_k + c->dim_v) + (size_t) c->n_stream * c->n_kv);
    ggml_init_params init = { kv_bytes * n_layer + rest + ((size_t) 64 << 20) + ((size_t) n_layer << 23), nullptr,
        false };
    const std::unique_ptr<ggml_context, decltype(&ggml_free)> owner(ggml_init(init), ggml_free);
    ggml_context * ctx = owner.get();

    ggml_tensor * q = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, c->dim_k, c->n_head, c->n_tokens, c->n_stream);
    memcpy(q->data, c->q, ggml_nbytes(q));
    q = ggml_permute(ctx, q, 0, 2, 1, 3);

    ggml_tensor * mask = nullptr;
    if (c->mask_heads > 0) {
        mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, c->n_kv, c->mask_tokens, c->mask_heads, c->mask_streams);
        memcpy(mask->data, c->mask, ggml_nbytes(mask));
    }
    ggml_tensor * sinks = nullptr;
    if (c->sinks) {
        sinks = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c->n_head);
        memcpy(sinks->data, c->sinks, ggml_nbytes(sinks));
    }
    intactkv::intact_rows intact = {};
    if (c->n_rows > 0) {
        if (c->arena_k) {
            intact.k = cache_tensor(ctx, GGML_TYPE_F16, c->arena_k, c->dim_k, c->n_head_kv, c->n_rows, 1);
        }
        if (c->arena_v) {
            intact.v = cache_tensor(ctx, GGML_TYPE_F16, c->arena_v, c->dim_v, c->n_head_kv, c->n_rows, 1);
        }
        if (!c->v) {
            intact.v = intact.k;
        }
        intact.row_of_cell = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, c->n_kv, c->n_stream);
        memcpy(intact.row_of_cell->data, c->row_of_cell, ggml_nbytes(intact.row_of_cell));
    }

    std::vector<ggml_cgraph *> graphs[2]; // stock, fused
    ggml_tensor * results[2] = {};
    ggml_tensor * k0 = nullptr;
    ggml_tensor * v0 = nullptr;
    for (int i = 0; i < n_layer; i++) {
        ggml_tensor * k;
        ggml_tensor * v;
        if (i == 0) {
            k = k0 = cache_tensor(ctx, (ggml_type) c->type_k, c->k, c->dim_k, c->n_head_kv, c->n_kv, c->n_stream);
            v = v0 = c->v ? cache_tensor(ctx, (ggml_type) c->type_v, c->v, c->dim_v, c->n_head_kv, c->n_kv, c->n_stream)
                          : k;
        } else {
            k = ggml_dup_tensor(ctx, k0);
            v = c->v ? ggml_dup_tensor(ctx, v0) : k;
            memcpy(k->data, k0->data, ggml_nbytes(k0));
            memcpy(v->data, v0->data, ggml_nbytes(v0));
        }
        v = head_view(ctx, v, c->dim_v, c->n_head_kv);
        k = head_view(ctx, k, c->dim_k, c->n_head_kv);
        for (int fused = 0; fused < 2; fused++) {
            if (which != 2 && which != fused) {
                continue;
            }
            ggml_tensor * r;
            if (fused) {
                if (!intactkv::fused_supported(q, k, v, mask, sinks)) {
                    return false;
                }
                r = intactkv::fused_attention(ctx, q, k, v, mask, sinks, c->n_rows > 0 ? &intact : nullptr, c->rot,
                        c->scale, c->max_bias, c->softcap);
            } else {
                r = ggml_flash_attn_ext(ctx, q, k, v, mask, c->scale, c->max_bias, c->softcap);
                ggml_flash_attn_ext_add_sinks(r, sinks);
            }
            if (i == 0) {
                results[fused] = r;
            }
            ggml_cgraph * graph = ggml_new_graph_custom(ctx, 64, false);
            ggml_build_forward_expand(graph, r);
            graphs[fused].push_back(graph);
        }
    }

    ggml_threadpool_params pool_params = ggml_threadpool_params_default(n_threads);
    ggml_threadpool * pool = ggml_threadpool_new(&pool_params);
    std::vector<uint8_t> work;
    const auto compute = [&](ggml_cgraph * graph) {
        ggml_cplan plan = ggml_graph_plan(graph, n_threads, pool);
        work.resize(std::max(work.size(), plan.work_size));
        plan.work_data = work.data();
        const auto start = std::chrono::steady_clock::now();
        ggml_graph_compute(graph, &plan);
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    for (int fused = 0; fused < 2; fused++) {
        if (!graphs[fused].empty()) {
            compute(graphs[fused][0]);
        }
    }
    ggml_tensor * result = results[which == 0 ? 0 : 1];
    memcpy(out, result->data, ggml_nbytes(result));
    for (int i = 0; i < n_rep; i++) {
        const int layer = (i + 1) % n_layer;
        if (which == 2) {
            seconds[2 * i] = compute(graphs[1][layer]);
            seconds[2 * i + 1] = compute(graphs[0][layer]);
        } else {
            seconds[i] = compute(graphs[which][layer]);
        }
    }
    ggml_threadpool_free(pool);
    return true;
}

// Stores K [n_tokens][n_head_kv][dim_k] and V into the cells of a cache of n_cells that is zero. which: 0 upstream's
// nodes, 1 fused_store(). k_out, v_out: the bytes of the whole cache. n_rows > 0: fused_store() writes to F16 rows too,
// to those that rows [n_tokens] says; k_rows, v_rows: all of them, zero before, or NULL for a side that has none. dim_v 0:
// K has latents, there is no V.
void fused_test_store(int32_t which, int32_t n_threads, int32_t type_k, int32_t type_v, int32_t dim_k, int32_t dim_v,
        int32_t n_head_kv, int32_t n_tokens, int32_t n_cells, int32_t rot_k, int32_t rot_v, const float * k,
        const float * v, const int64_t * cells, void * k_out, void * v_out, int32_t n_rows, const int64_t * rows,
        void * k_rows, void * v_rows) {
    ggml_init_params init = { (size_t) 64 << 20, nullptr, false };
    const std::unique_ptr<ggml_context, decltype(&ggml_free)> owner(ggml_init(init), ggml_free);
    ggml_context * ctx = owner.get();

    ggml_tensor * cell = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_tokens);
    memcpy(cell->data, cells, ggml_nbytes(cell));

    struct side {
        int32_t type, dim, rot;
        const float * values;
        void * out;
        void * rows_out;
        ggml_tensor * cache = nullptr;
        ggml_tensor * cur = nullptr;
        ggml_tensor * rows = nullptr;
    } sides[] = { { type_k, dim_k, rot_k, k, k_out, k_rows }, { type_v, dim_v, rot_v, v, v_out, v_rows } };
    for (side & s : sides) {
        if (s.dim == 0) {
            continue;
        }
        s.cache = ggml_new_tensor_2d(ctx, (ggml_type) s.type, (int64_t) s.dim * n_head_kv, n_cells);
        s.cur = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, s.dim, n_head_kv, n_tokens);
        memset(s.cache->data, 0, ggml_nbytes(s.cache));
        memcpy(s.cur->data, s.values, ggml_nbytes(s.cur));
        if (s.rows_out) {
            s.rows = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, (int64_t) s.dim * n_head_kv, n_rows);
            memset(s.rows->data, 0, ggml_nbytes(s.rows));
        }
    }
    intactkv::row_target tail = { sides[0].rows, sides[1].rows, nullptr };
    if (n_rows > 0) {
        tail.rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_tokens);
        memcpy(tail.rows->data, rows, ggml_nbytes(tail.rows));
    }

    ggml_cgraph * graph = ggml_new_graph(ctx);
    if (which == 1) {
        ggml_build_forward_expand(graph,
                intactkv::fused_store(ctx, sides[0].cache, sides[1].cache, sides[0].cur, sides[1].cur, cell,
                        dim_v > 0 ? cell : nullptr, { rot_k, rot_v }, n_rows > 0 ? &tail : nullptr));
    } else {
        for (side & s : sides) {
            if (s.dim == 0) {
                continue;
            }
            ggml_tensor * cur = s.cur;
            if (s.rot > 0) {
                // its values do not matter, only that upstream computes by them what it takes for their product
                ggml_tensor * rot = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, s.rot, s.rot);
                memset(rot->data, 0, ggml_nbytes(rot));
                cur = ggml_mul_mat(ctx, rot, ggml_reshape_2d(ctx, cur, s.rot, ggml_nelements(cur) / s.rot));
                ggml_mul_mat_set_hint(cur, GGML_HINT_SRC0_IS_HADAMARD);
            }
            cur = ggml_reshape_2d(ctx, cur, s.cache->ne[0], n_tokens);
            ggml_build_forward_expand(graph, ggml_set_rows(ctx, s.cache, cur, cell));
        }
    }
    ggml_cplan plan = ggml_graph_plan(graph, n_threads, nullptr);
    std::vector<uint8_t> work(plan.work_size);
    plan.work_data = work.data();
    ggml_graph_compute(graph, &plan);
    for (const side & s : sides) {
        if (s.dim == 0) {
            continue;
        }
        memcpy(s.out, s.cache->data, ggml_nbytes(s.cache));
        if (s.rows) {
            memcpy(s.rows_out, s.rows->data, ggml_nbytes(s.rows));
        }
    }
}

// n F16 values as F32, by the chosen instruction set.
void fused_test_widen(const uint16_t * x, float * out, int64_t n) {
    intactkv::fused_widen(x, out, n);
}

// Bytes per second that n_threads threads read together from n bytes of memory, the best of n_rep times.
double fused_test_read_bandwidth(int32_t n_threads, int64_t n, int32_t n_rep) {
    std::vector<uint64_t> memory(n / sizeof(uint64_t), 1);
    std::vector<uint64_t> sums(n_threads);
    double best = 0.0;
    for (int rep = 0; rep < n_rep; rep++) {
        const auto start = std::chrono::steady_clock::now();
        std::vector<std::thread> threads;
        for (int t = 0; t < n_threads; t++) {
            threads.emplace_back([&, t] {
                const size_t part = memory.size() / n_threads / 32 * 32;
                const uint64_t * p = memory.data() + t * part;
                uint64_t lane[32] = {}; // enough independent loads to keep the memory busy
                for (size_t i = 0; i < part; i += 32) {
                    for (int j = 0; j < 32; j++) {
                        lane[j] ^= p[i + j];
                    }
                }
                for (int j = 0; j < 32; j++) {
                    sums[t] += lane[j];
                }
            });
        }
        for (std::thread & thread : threads) {
            thread.join();
        }
        best = std::max(best, n / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
}

} // extern "C"
