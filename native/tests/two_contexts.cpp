// Two contexts of one model, each in a thread of its own and computing with several, do with a prefix all that a context
// does with one: for ThreadSanitizer. ggml's own threads, as OpenMP's barriers are unknown to it:
//   cmake -S native -B build/tsan -DGGML_OPENMP=OFF -DCMAKE_BUILD_TYPE=Release
//     -DCMAKE_C_FLAGS="-fsanitize=thread -g1" -DCMAKE_CXX_FLAGS="-fsanitize=thread -g1"
//   cmake --build build/tsan --target llama
//   g++ -std=c++17 -fsanitize=thread -Inative/include -Ibuild/tsan/source/include -Ibuild/tsan/source/ggml/include
//     native/tests/two_contexts.cpp -Lbuild/tsan/bin -lllama -lggml -lggml-base -o two_contexts
//   two_contexts MODEL PREFIX KV      a GGUF, a prefix file of it, the type of the cache by ggml's number
// Exit code 1 if the threads' logits differ, or a step fails.

#include "ggml.h"
#include "intactkv.h"
#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <thread>
#include <vector>

static void require(bool condition, const char * what) {
    if (!condition) {
        fprintf(stderr, "two_contexts: %s\n", what);
        exit(1);
    }
}

using floats = std::vector<float>;

// Tokens at positions first... of a sequence; the logits of the last.
static floats decode(llama_context * ctx, const std::vector<llama_token> & tokens, int first, llama_seq_id seq_id) {
    llama_batch batch = llama_batch_init((int32_t) tokens.size(), 0, 1);
    for (llama_token token : tokens) {
        const int32_t i = batch.n_tokens++;
        batch.token[i] = token;
        batch.pos[i] = first + i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = seq_id;
        batch.logits[i] = i + 1 == (int32_t) tokens.size() && first > 0;
    }
    const bool wanted = first > 0;
    require(llama_decode(ctx, batch) == 0, "a batch was not decoded");
    const int n = (int) tokens.size();
    llama_batch_free(batch);
    const float * logits = wanted ? llama_get_logits_ith(ctx, n - 1) : nullptr;
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
    return logits ? floats(logits, logits + n_vocab) : floats();
}

static void append(floats & to, const floats & more) {
    to.insert(to.end(), more.begin(), more.end());
}

static floats work(llama_model * model, const std::vector<llama_token> & prefix, const std::vector<uint8_t> & file,
        ggml_type kv, uint32_t tail) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = 256;
    params.n_seq_max = 4;
    params.kv_unified = true;
    params.n_threads = params.n_threads_batch = 3;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.type_k = params.type_v = kv;
    llama_context * ctx = llama_init_from_model(model, params);
    require(ctx, "no context");
    require(intactkv_n_prefixes(ctx) == 1, "the context holds no prefix");
    intactkv_set_tail(ctx, tail);
    llama_memory_t memory = llama_get_memory(ctx);
    const int n = (int) prefix.size(), half = n / 2;
    const std::vector<llama_token> text = { 11, 12, 13, 14, 15, 16, 17, 18, 19 };
    floats res;

    // given, in two batches: a model with states waits between them
    decode(ctx, { prefix.begin(), prefix.begin() + half }, 0, 0);
    std::vector<llama_token> rest(prefix.begin() + half, prefix.end());
    rest.insert(rest.end(), text.begin(), text.end());
    append(res, decode(ctx, rest, half, 0));
    // by hand, and left in the middle
    require(intactkv_load(ctx, file.data(), file.size(), 1) == n, "the prefix was not loaded");
    append(res, decode(ctx, text, n, 1));
    decode(ctx, { prefix.begin(), prefix.begin() + half }, 0, 2);
    append(res, decode(ctx, text, half, 2));
    // copied, saved and restored, token by token
    llama_memory_seq_cp(memory, 0, 3, -1, -1);
    std::vector<uint8_t> state(llama_state_seq_get_size(ctx, 0));
    require(llama_state_seq_get_data(ctx, state.data(), state.size(), 0) == state.size(), "not saved");
    llama_memory_seq_rm(memory, 1, -1, -1);
    require(llama_state_seq_set_data(ctx, state.data(), state.size(), 1) == state.size(), "not restored");
    int at = n + (int) text.size();
    for (llama_token token : { 21, 22, 23, 24 }) {
        for (llama_seq_id seq_id : { 0, 1, 3 }) {
            append(res, decode(ctx, { token }, at, seq_id));
        }
        at++;
    }
    if (llama_memory_can_shift(memory)) {
        llama_memory_seq_add(memory, 3, 0, -1, 3);
        append(res, decode(ctx, { 25 }, at + 3, 3));
    }
    llama_free(ctx);
    return res;
}

int main(int argc, char ** argv) {
    require(argc == 4, "usage: two_contexts MODEL PREFIX KV");
    setenv("LLAMA_INTACTKV", argv[2], 1);
    std::ifstream in(argv[2], std::ios::binary);
    const std::vector<uint8_t> file{ std::istreambuf_iterator<char>(in), {} };
    require(file.size() > 12, "no prefix file");
    uint32_t n = 0;
    memcpy(&n, &file[8], sizeof(n));
    require(n > 1 && n < 200 && file.size() > 12 + 4 * n, "no prefix of 2 to 199 tokens");
    std::vector<llama_token> prefix(n);
    memcpy(prefix.data(), &file[12], 4 * n);

    llama_log_set(
            [](ggml_log_level level, const char * text, void *) {
                if (level == GGML_LOG_LEVEL_ERROR) {
                    fputs(text, stderr);
                }
            },
            nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    require(model, "no model");
    for (const uint32_t tail : { 0, 8 }) {
        floats results[2];
        std::vector<std::thread> threads;
        for (floats & result : results) {
            threads.emplace_back([&] { result = work(model, prefix, file, (ggml_type) atoi(argv[3]), tail); });
        }
        for (std::thread & thread : threads) {
            thread.join();
        }
        require(!results[0].empty() && results[0] == results[1], "the threads' logits differ");
    }
    llama_model_free(model);
    printf("the same logits\n");
    return 0;
}
