// Runs one attention call, read from a file, on one instruction set, without ggml: for machines that are emulated.
//
//     attention_file ISA IN OUT      OUT: F32 [n_stream][n_tokens][n_head][dim_v]; if the plan splits the cells, partial
//                                results [n_stream][n_chunk][n_tokens][n_head][maximum, sum, values of dim_v]
//     attention_file best IN OUT     the same on the best this machine has
//     attention_file ISA IN OUT TYPE N   N F32 values rounded to blocks of a ggml_type, as the store does
//     attention_file ISA             exit code 0 if this machine has ISA, else 3
//
// IN is what benchmarks/kernel.py writes: struct header, then q, K bytes, V bytes, mask, sinks, arenas, rows.

#include "attention/call.h"
#include "attention/targets/dispatch.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

namespace {

struct header {
    int32_t dim_k, dim_v, n_head, n_head_kv, n_tokens, n_kv, n_stream;
    int32_t type_k, type_v, mask_heads, mask_streams, mask_tokens, n_rows, rot_q, rot_out;
    float scale, max_bias, softcap;
    int32_t row_bytes_k, row_bytes_v; // of one cell, all KV heads; of V 0: it is the first values of K's rows
    int32_t has_sinks, has_arena_k, has_arena_v;
};

template <typename T> std::vector<T> read(FILE * file, size_t n) {
    std::vector<T> values(n);
    if (fread(values.data(), sizeof(T), n, file) != n) {
        fprintf(stderr, "attention_file: the input ends early\n");
        exit(1);
    }
    return values;
}

} // namespace

int main(int argc, char ** argv) {
    if (argc != 2 && argc != 4 && argc != 6) {
        fprintf(stderr, "usage: attention_file ISA [IN OUT [TYPE N]]\n");
        return 2;
    }
    const bool best = strcmp(argv[1], "best") == 0; // chosen by the first call, from several threads at once
    if (!best && !intactkv::fused_choose(argv[1])) {
        return 3;
    }
    if (argc == 2) {
        return 0;
    }
    FILE * in = fopen(argv[2], "rb");
    if (!in) {
        perror(argv[2]);
        return 1;
    }
    if (argc == 6) {
        const auto x = read<float>(in, (size_t) atoll(argv[5]));
        fclose(in);
        std::vector<uint8_t> blocks(x.size() / 32 * 24); // Q5_1's are the largest of those that are fitted
        const auto type = (ggml_type) atoi(argv[4]);
        FILE * out = fopen(argv[3], "wb");
        const bool done = out && intactkv::fused_chosen().narrow(type, x.data(), blocks.data(), (int64_t) x.size()) &&
                fwrite(blocks.data(), 1, blocks.size(), out) == blocks.size();
        return out && fclose(out) == 0 && done ? 0 : 1;
    }
    const header h = read<header>(in, 1)[0];
    const size_t cells = (size_t) h.n_stream * h.n_kv;
    const auto q = read<float>(in, (size_t) h.n_stream * h.n_tokens * h.n_head * h.dim_k);
    const auto k = read<uint8_t>(in, cells * h.row_bytes_k);
    const auto v = read<uint8_t>(in, cells * h.row_bytes_v);
    const auto mask = read<uint16_t>(in, (size_t) h.mask_heads * h.mask_streams * h.mask_tokens * h.n_kv);
    const auto sinks = read<float>(in, h.has_sinks ? h.n_head : 0);
    const auto arena_k = read<uint16_t>(in, h.has_arena_k ? (size_t) h.n_rows * h.n_head_kv * h.dim_k : 0);
    const auto arena_v = read<uint16_t>(in, h.has_arena_v ? (size_t) h.n_rows * h.n_head_kv * h.dim_v : 0);
    const auto rows = read<int32_t>(in, h.n_rows > 0 ? cells : 0);
    fclose(in);

    intactkv::fused_call call = {};
    call.q = (const char *) q.data();
    call.q_nb_head = sizeof(float) * h.dim_k;
    call.q_nb_token = call.q_nb_head * h.n_head;
    call.q_nb_stream = call.q_nb_token * h.n_tokens;
    call.k = { k.data(), (size_t) h.row_bytes_k, (size_t) h.row_bytes_k / h.n_head_kv, (size_t) h.row_bytes_k * h.n_kv,
        h.has_arena_k ? arena_k.data() : nullptr, (size_t) h.n_head_kv * h.dim_k, (ggml_type) h.type_k, h.dim_k };
    call.v = { v.data(), (size_t) h.row_bytes_v, (size_t) h.row_bytes_v / h.n_head_kv, (size_t) h.row_bytes_v * h.n_kv,
        h.has_arena_v ? arena_v.data() : nullptr, (size_t) h.n_head_kv * h.dim_v, (ggml_type) h.type_v, h.dim_v };
    call.latents = h.row_bytes_v == 0;
    if (call.latents) {
        call.v = call.k;
        call.v.dim = h.dim_v;
        call.v.type = (ggml_type) h.type_v;
    }
    call.mask = mask.empty() ? nullptr : (const char *) mask.data();
    call.mask_nb_token = sizeof(uint16_t) * h.n_kv;
    call.mask_nb_head = call.mask_nb_token * h.mask_tokens;
    call.mask_nb_stream = call.mask_nb_head * h.mask_heads;
    call.mask_heads = h.mask_heads;
    call.mask_streams = h.mask_streams;
    call.row_of_cell = rows.empty() ? nullptr : rows.data();
    call.n_head = h.n_head;
    call.n_head_kv = h.n_head_kv;
    call.n_tokens = h.n_tokens;
    call.n_stream = h.n_stream;
    call.n_kv = h.n_kv;
    call.scale = h.scale;
    call.max_bias = h.max_bias;
    call.softcap = h.softcap;
    call.rot_q = h.rot_q;
    call.rot_out = h.rot_out;
    call.plan = intactkv::fused_make_plan(
            h.dim_k, h.dim_v, call.latents, h.n_kv, h.n_tokens, h.n_head, h.n_head_kv, h.n_stream);

    const bool whole = call.plan.n_chunk == 1;
    const size_t n = (size_t) h.n_stream * call.plan.n_chunk * h.n_tokens * h.n_head;
    const size_t size = h.dim_v + (whole ? 0 : intactkv::FUSED_PARTIAL);
    call.sinks = whole && h.has_sinks ? sinks.data() : nullptr;
    // Twice at the same time, as by two contexts, with different numbers of threads.
    std::vector<float> result(n * size);
    std::vector<float> other(n * size);
    std::vector<std::thread> threads;
    int32_t next_item = 0;
    for (const auto & [out, n_threads] : { std::pair(&result, 3), std::pair(&other, 2) }) {
        call.out = out->data();
        call.next_item = n_threads == 3 ? &next_item : nullptr;
        for (int i = 0; i < n_threads; i++) {
            threads.emplace_back(
                    [call, i, n_threads = n_threads] { intactkv::fused_chosen().run(call, i, n_threads); });
        }
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
    if (memcmp(result.data(), other.data(), result.size() * sizeof(float)) != 0) {
        fprintf(stderr, "attention_file: 2 threads and 3 threads give different bits\n");
        return 1;
    }

    FILE * out = fopen(argv[3], "wb");
    const bool ok = out && fwrite(result.data(), sizeof(float), result.size(), out) == result.size();
    if (!ok || fclose(out) != 0) {
        perror(argv[3]);
        return 1;
    }
    return 0;
}
