// The C API of intactkv.h, and the calls of api.h.

#include "intactkv.h"
#include "api.h"

#include "cells/arena.h"
#include "prefix_file/compatible.h"
#include "prefix_file/parse.h"
#include "prefix_file/read_bytes.h"

#include "llama-arch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "hash/hash.h"
#include "nlohmann/json.hpp"

#include <cstring>
#include <exception>

namespace intactkv {

using json = nlohmann::ordered_json;

static thread_local std::string last_error;

static int32_t fail(const std::string & error) {
    last_error = error;
    return -1;
}

// the caches of a memory that can have intact cells, in the order of a saved state; empty: none can
static std::vector<llama_kv_cache *> caches_of(llama_memory_i * memory) {
    if (auto * kv = dynamic_cast<llama_kv_cache *>(memory)) {
        return { kv };
    }
    if (auto * kv = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        return { kv->get_base(), kv->get_swa() };
    }
    return {};
}

static std::vector<llama_kv_cache *> caches_of(const llama_context * ctx) {
    return caches_of(llama_get_memory(ctx));
}

// why a model cannot carry a prefix, "" if it can
static std::string unsupported(const llama_memory_i * memory, const llama_model & model) {
    const char * arch = llm_arch_name(model.arch);
    const auto refuse = [&](const char * why) {
        return format("a model of architecture '%s' cannot carry a prefix: %s", arch, why);
    };
    if (llm_arch_is_recurrent(model.arch)) {
        return refuse("it is recurrent, it has a state instead of a KV cache");
    }
    if (llm_arch_is_hybrid(model.arch)) {
        return refuse("it is a hybrid, part of its memory is a recurrent state");
    }
    if (llama_model_has_encoder(&model)) {
        return refuse("its encoder sees the whole prompt, so no part of it can be computed ahead");
    }
    if (model.hparams.is_mla()) {
        return refuse("it caches compressed latents (MLA) instead of K and V");
    }
    if (model.hparams.n_pos_per_embd() > 1) {
        return refuse("its positions have several dimensions (M-RoPE)");
    }
    if (caches_of(const_cast<llama_memory_i *>(memory)).empty()) {
        return refuse("it has no plain KV cache");
    }
    return "";
}

void enable(llama_memory_i * memory, const llama_model & model) {
    if (memory == nullptr || model.hparams.no_alloc || !unsupported(memory, model).empty()) {
        return;
    }
    for (llama_kv_cache * kv : caches_of(memory)) {
        arena::attach(*kv);
    }
}

uint32_t state_version(const llama_context * ctx, int32_t seq_id) {
    return intactkv_n_cells(ctx, seq_id) > 0 ? STATE_VERSION_INTACT : 0;
}

bool verify_file(const llama_context * ctx, const char * path) {
    if (!has_trailer(path)) {
        return true;
    }
    std::vector<uint8_t> data;
    std::string error;
    if (!read_bytes(path, data, error)) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, error.c_str());
        return false;
    }
    if (intactkv_verify(ctx, data.data(), data.size()) < 0) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, intactkv_error());
        return false;
    }
    return true;
}

// SHA-256 over all token texts, each after its length (u32 LE)
static std::string vocab_sha256(const llama_vocab * vocab) {
    std::string all;
    for (int32_t i = 0; i < llama_vocab_n_tokens(vocab); ++i) {
        const char * text = llama_vocab_get_text(vocab, i);
        const uint32_t n = strlen(text);
        for (int b = 0; b < 4; ++b) {
            all += (char) (n >> 8*b);
        }
        all.append(text, n);
    }
    return hash_sha256_hex(all.data(), all.size());
}

static std::string factors_sha256(ggml_tensor * factors) {
    if (factors == nullptr) {
        return "none";
    }
    std::vector<uint8_t> data(ggml_nbytes(factors));
    ggml_backend_tensor_get(factors, data.data(), 0, data.size());
    return hash_sha256_hex(data.data(), data.size());
}

static const char * rope_type_name(llama_rope_type type) {
    switch (type) {
        case LLAMA_ROPE_TYPE_NONE: return "none";
        case LLAMA_ROPE_TYPE_NORM: return "norm";
        case LLAMA_ROPE_TYPE_NEOX: return "neox";
        default:                   return "other";
    }
}

static const char * rope_scaling_name(llama_rope_scaling_type type) {
    switch (type) {
        case LLAMA_ROPE_SCALING_TYPE_LINEAR:   return "linear";
        case LLAMA_ROPE_SCALING_TYPE_YARN:     return "yarn";
        case LLAMA_ROPE_SCALING_TYPE_LONGROPE: return "longrope";
        default:                               return "none";
    }
}

static json describe(const llama_context * ctx) {
    const llama_model   & model   = *llama_get_model(ctx);
    const llama_hparams & hparams = model.hparams;
    const llama_cparams & cparams = ctx->get_cparams();
    const llama_vocab   * vocab   = llama_model_get_vocab(&model);

    json caches = json::array();
    for (const llama_kv_cache * kv : caches_of(ctx)) {
        const bool is_swa = caches.size() == 1; // base, then swa
        json layers = json::array();
        for (const uint32_t il : kv->get_layer_ids()) {
            layers.push_back({
                { "il",         il },
                { "n_head_kv",  hparams.n_head_kv(il) },
                { "head_dim_k", hparams.n_embd_head_k(il) },
                { "head_dim_v", hparams.n_embd_head_v(il) },
                { "rope_base",  hparams.has_rope(il) ? (double) model.get_rope_freq_base(cparams, il) : 0.0 },
            });
        }
        caches.push_back({
            { "n_swa",    is_swa ? hparams.n_swa : 0 },
            { "swa_type", is_swa ? (int) hparams.swa_type : 0 },
            { "layers",   std::move(layers) },
        });
    }

    return {
        { "arch",         llm_arch_name(model.arch) },
        { "n_ctx_train",  hparams.n_ctx_train },
        { "n_vocab",      llama_vocab_n_tokens(vocab) },
        { "vocab_sha256", vocab_sha256(vocab) },
        { "caches",       std::move(caches) },
        { "rope", {
            { "type",        rope_type_name(hparams.rope_type) },
            { "n_rot",       hparams.n_rot() },
            { "scale",       (double) cparams.rope_freq_scale },
            { "scale_swa",   (double) hparams.rope_freq_scale_train_swa },
            { "scaling",     rope_scaling_name(cparams.rope_scaling_type) },
            { "n_ctx_orig",  cparams.n_ctx_orig_yarn },
            { "ext_factor",  (double) cparams.yarn_ext_factor },
            { "attn_factor", (double) cparams.yarn_attn_factor },
            { "beta_fast",   (double) cparams.yarn_beta_fast },
            { "beta_slow",   (double) cparams.yarn_beta_slow },
            { "factors",     factors_sha256(model.get_rope_factors(cparams, 0)) },
        } },
    };
}

// Hands the bytes of a KV state to llama_kv_cache::state_read(). Bounds are checked though the file was verified:
// the two readers must agree, and this one is next to the cache.
class state_bytes : public llama_io_read_i {
public:
    state_bytes(const uint8_t * data, size_t size) : data(data), size(size) {}

    void read(void * dst, size_t n) override {
        if (n > size - pos) {
            throw std::runtime_error("the KV state ends too early");
        }
        memcpy(dst, data + pos, n);
        pos += n;
    }

    void read_tensor(ggml_tensor * tensor, size_t offset, size_t n) override {
        if (n > size - pos) {
            throw std::runtime_error("the KV state ends too early");
        }
        ggml_backend_tensor_set(tensor, data + pos, offset, n);
        pos += n;
    }

    size_t n_bytes() override { return pos; }

private:
    const uint8_t * data;
    const size_t    size;
    size_t          pos = 0;
};

// the checks of intactkv_load(); empty on success
static std::string check(const llama_context * ctx, const void * data, size_t size, prefix_view & view) {
    std::string manifest;
    std::string error;
    if (!parse(data, size, view, manifest, error) || ctx == nullptr) {
        return error;
    }
    const char * ours = intactkv_describe(ctx);
    if (ours == nullptr) {
        return last_error;
    }
    char reference[128] = "";
    llama_model_meta_val_str(llama_get_model(ctx), "intactkv.reference.sha256", reference, sizeof(reference));
    if (!compatible(manifest, ours, reference, error)) {
        return error;
    }
    if (*reference == 0) {
        LLAMA_LOG_WARN("%s: the model has no intactkv.reference.sha256: only its structure could be compared with the prefix\n", __func__);
    }
    if (view.n_tokens >= llama_n_ctx_seq(ctx)) {
        return format("the prefix has %u tokens and the context only n_ctx = %u for a sequence: use a larger n_ctx", view.n_tokens, llama_n_ctx_seq(ctx));
    }
    if (!ctx->get_cparams().flash_attn) {
        return "flash attention is off in this context, its V cache is transposed: turn flash attention on to load a prefix";
    }
    return "";
}

} // namespace intactkv

using namespace intactkv;

const char * intactkv_version(void) {
    return INTACTKV_VERSION;
}

const char * intactkv_error(void) {
    return last_error.c_str();
}

const char * intactkv_describe(const llama_context * ctx) {
    const std::string why = unsupported(llama_get_memory(ctx), *llama_get_model(ctx));
    if (!why.empty()) {
        fail(why);
        return nullptr;
    }
    static thread_local std::string res;
    res = describe(ctx).dump();
    return res.c_str();
}

int32_t intactkv_verify(const llama_context * ctx, const void * data, size_t size) {
    prefix_view view;
    const std::string error = check(ctx, data, size, view);
    return error.empty() ? (int32_t) view.n_tokens : fail(error);
}

int32_t intactkv_load(llama_context * ctx, const void * data, size_t size, llama_seq_id seq_id) {
    prefix_view view;
    const std::string error = check(ctx, data, size, view);
    if (!error.empty()) {
        return fail(error);
    }
    if (seq_id < 0 || (uint32_t) seq_id >= llama_n_seq_max(ctx)) {
        return fail(format("sequence %d does not exist: this context has n_seq_max = %u", seq_id, llama_n_seq_max(ctx)));
    }
    llama_synchronize(ctx);
    try {
        state_bytes io(view.state, view.state_size);
        for (llama_kv_cache * kv : caches_of(ctx)) {
            kv->state_read(io, seq_id, 0);
        }
    } catch (const std::exception & err) {
        llama_memory_seq_rm(llama_get_memory(ctx), seq_id, -1, -1);
        return fail(format("the prefix of %u tokens could not be placed in sequence %d: %s", view.n_tokens, seq_id, err.what()));
    }
    return view.n_tokens;
}

int32_t intactkv_load_file(llama_context * ctx, const char * path, llama_seq_id seq_id) {
    std::vector<uint8_t> data;
    std::string error;
    if (!read_bytes(path, data, error)) {
        return fail(error);
    }
    return intactkv_load(ctx, data.data(), data.size(), seq_id);
}

int32_t intactkv_n_cells(const llama_context * ctx, llama_seq_id seq_id) {
    // a prefix is in all caches or in none; the base cache never drops a cell of it while it is in use
    const auto caches = caches_of(ctx);
    return caches.empty() || !caches[0]->intact ? 0 : caches[0]->intact->n_cells(seq_id);
}

size_t intactkv_arena_bytes(const llama_context * ctx) {
    size_t res = 0;
    for (const llama_kv_cache * kv : caches_of(ctx)) {
        res += kv->intact ? kv->intact->n_bytes() : 0;
    }
    return res;
}

const char * intactkv_attention(const llama_context * ctx) {
    for (const llama_kv_cache * kv : caches_of(ctx)) {
        if (kv->intact) {
            return kv->intact->attention_now();
        }
    }
    return "stock";
}
