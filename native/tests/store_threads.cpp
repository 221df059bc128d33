// Stores new K and V, and their rows of the tail, from several threads, for ThreadSanitizer: the node's function is called
// as ggml's threads would call it, but from threads that the sanitizer sees.

#include "attention/store.h"

#include "ggml.h"

#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

int main() {
    constexpr int64_t DIM = 64, N_HEAD = 3, N_TOKENS = 9, N_CELLS = 16, N_ROWS = 12;
    ggml_context * ctx = ggml_init({ (size_t) 16 << 20, nullptr, false });

    const auto some = [&](ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2) {
        ggml_tensor * t = ggml_new_tensor_3d(ctx, type, ne0, ne1, ne2);
        memset(t->data, 0, ggml_nbytes(t));
        for (int64_t i = 0; type == GGML_TYPE_F32 && i < ggml_nelements(t); i++) {
            ((float *) t->data)[i] = (float) (i % 97) / 10.0f - 4.0f;
        }
        return t;
    };
    const auto indices = [&](int64_t from) { // neighbours, from the last to the first
        ggml_tensor * t = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, N_TOKENS);
        for (int64_t i = 0; i < N_TOKENS; i++) {
            ((int64_t *) t->data)[i] = from + N_TOKENS - 1 - i;
        }
        return t;
    };
    for (const ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_BF16 }) {
        ggml_tensor * k_rows = some(GGML_TYPE_F16, DIM * N_HEAD, N_ROWS, 1);
        ggml_tensor * v_rows = some(GGML_TYPE_F16, DIM * N_HEAD, N_ROWS, 1);
        const intactkv::row_target tail = { k_rows, v_rows, indices(2) };
        ggml_tensor * k = some(GGML_TYPE_F32, DIM, N_HEAD, N_TOKENS);
        ggml_tensor * node = intactkv::fused_store(ctx, some(type, DIM * N_HEAD, N_CELLS, 1),
                some(type, DIM * N_HEAD, N_CELLS, 1), k, k, indices(5), indices(5), { 64, 64 }, &tail);
        ggml_custom_op_t store;
        memcpy(&store, node->op_params, sizeof(store));

        constexpr int N_THREADS = 4;
        std::vector<std::thread> threads;
        for (int i = 0; i < N_THREADS; i++) {
            threads.emplace_back([&, i] { store(node, i, N_THREADS, nullptr); });
        }
        for (std::thread & thread : threads) {
            thread.join();
        }
        if (memcmp(k_rows->data, v_rows->data, ggml_nbytes(k_rows)) != 0) {
            fprintf(stderr, "K and V are the same and their rows differ\n");
            return 1;
        }
    }
    ggml_free(ctx);
    return 0;
}
