#include "api/describe.h"

#include "hooks.h"

#include "llama-arch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include "hash/hash.h"
#include "nlohmann/json.hpp"

#include <cstdint>
#include <cstring>
#include <typeinfo>
#include <utility>

namespace intactkv {

using json = nlohmann::ordered_json;

// Whether it is of a class derived from this one, which keeps more beside the KV cache and the states
static bool keeps_more(const llama_memory_hybrid & memory) {
    return typeid(memory) != typeid(llama_memory_hybrid);
}

std::vector<llama_kv_cache *> caches_of(llama_memory_i * memory) {
    if (auto * kv = dynamic_cast<llama_kv_cache *>(memory)) {
        return { kv };
    }
    if (auto * kv = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        return { kv->get_base(), kv->get_swa() };
    }
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory); hybrid && !keeps_more(*hybrid)) {
        return { hybrid->get_mem_attn() };
    }
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        return { hybrid->get_mem_attn()->get_base(), hybrid->get_mem_attn()->get_swa() };
    }
    return {};
}

std::vector<llama_kv_cache *> caches_of(const llama_context * ctx) {
    return caches_of(llama_get_memory(ctx));
}

llama_memory_recurrent * states_of(llama_memory_i * memory) {
    auto * res = dynamic_cast<llama_memory_recurrent *>(memory);
    if (const auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory)) {
        res = hybrid->get_mem_recr();
    }
    if (const auto * hybrid = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        res = hybrid->get_mem_recr();
    }
    return res && !keeps_nothing(*res) ? res : nullptr;
}

llama_memory_recurrent * states_of(const llama_context * ctx) {
    return states_of(llama_get_memory(ctx));
}

static std::string refusal(const llama_model & model, const char * why) {
    return format("a model of architecture '%s' cannot carry a prefix: %s", llm_arch_name(model.arch), why);
}

std::string without_cells(const llama_memory_i * memory, const llama_model & model) {
    const auto refuse = [&](const char * why) {
        return refusal(model, why);
    };
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid *>(memory); hybrid && keeps_more(*hybrid)) {
        return refuse("beside its KV cache and its recurrent states it has an indexer's cache");
    }
    if (llama_model_has_encoder(&model)) {
        return refuse("its encoder sees the whole prompt, so no part of it can be computed ahead");
    }
    if (model.arch == LLM_ARCH_GROK) { // llama_init_from_model() turns it off, whatever is asked for
        return refuse("llama.cpp computes it without flash attention only, which a prefix needs");
    }
    auto * kept = const_cast<llama_memory_i *>(memory);
    const bool keeps = !caches_of(kept).empty() || states_of(kept) != nullptr;
    if (!keeps && model.hparams.indexer_top_k > 0) {
        return refuse("an indexer with a cache of its own chooses the tokens that are attended (sparse attention)");
    }
    if (!keeps) {
        return refuse("it has no plain KV cache");
    }
    if (!model.hparams.causal_attn || model.arch == LLM_ARCH_LLAMA_EMBED) { // made for embeddings of whole texts
        return refuse("its tokens attend to those that follow them, so no part of a text can be computed ahead");
    }
    return "";
}

std::string unsupported(const llama_memory_i * memory, const llama_model & model) {
    const std::string why = without_cells(memory, model);
    if (why.empty() && llama_vocab_type(llama_model_get_vocab(&model)) == LLAMA_VOCAB_TYPE_NONE) {
        return refusal(model, "it has no vocabulary by which a prefix could be told to be its own");
    }
    return why;
}

// SHA-256 over all token texts, each after its length (u32 LE)
static std::string vocab_sha256(const llama_vocab * vocab) {
    std::string all;
    for (int32_t i = 0; i < llama_vocab_n_tokens(vocab); ++i) {
        const char * text = llama_vocab_get_text(vocab, i);
        const uint32_t n = strlen(text);
        for (int b = 0; b < 4; ++b) {
            all += (char) (n >> 8 * b);
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
        case LLAMA_ROPE_TYPE_MROPE: return "mrope";
        case LLAMA_ROPE_TYPE_IMROPE: return "imrope";
        default: return "other";
    }
}

static const char * rope_scaling_name(llama_rope_scaling_type type) {
    switch (type) {
        case LLAMA_ROPE_SCALING_TYPE_LINEAR: return "linear";
        case LLAMA_ROPE_SCALING_TYPE_YARN: return "yarn";
        case LLAMA_ROPE_SCALING_TYPE_LONGROPE: return "longrope";
        default: return "none";
    }
}

// As upstream writes the states of a sequence: n_layer of the model, and the layers that have any
static json describe_states(const llama_memory_recurrent & states) {
    json layers = json::array();
    for (size_t il = 0; il < states.r_l.size(); ++il) {
        if (states.r_l[il] != nullptr) {
            layers.push_back({ { "il", il }, { "n_r", states.r_l[il]->ne[0] }, { "n_s", states.s_l[il]->ne[0] } });
        }
    }
    return { { "n_layer", states.r_l.size() }, { "layers", std::move(layers) } };
}

std::string describe(const llama_context * ctx) {
    const llama_model & model = *llama_get_model(ctx);
    const llama_hparams & hparams = model.hparams;
    const llama_cparams & cparams = ctx->get_cparams();
    const llama_vocab * vocab = llama_model_get_vocab(&model);

    json caches = json::array();
    for (const llama_kv_cache * kv : caches_of(ctx)) {
        const bool is_swa = caches.size() == 1; // base, then swa
        json layers = json::array();
        for (const uint32_t il : kv->get_layer_ids()) {
            layers.push_back({
                    { "il", il },
                    { "n_head_kv", hparams.n_head_kv(il) },
                    { "head_dim_k", hparams.n_embd_head_k(il) },
                    { "head_dim_v", hparams.is_mla() ? 0 : hparams.n_embd_head_v(il) }, // V is a part of K's row
                    { "rope_base", hparams.has_rope(il) ? (double) model.get_rope_freq_base(cparams, il) : 0.0 },
            });
        }
        caches.push_back({
                { "n_swa", is_swa ? hparams.n_swa : 0 },
                { "swa_type", is_swa ? (int) hparams.swa_type : 0 },
                { "layers", std::move(layers) },
        });
    }

    json res = {
        { "arch", llm_arch_name(model.arch) },
        { "n_ctx_train", hparams.n_ctx_train },
        { "n_vocab", llama_vocab_n_tokens(vocab) },
        { "vocab_sha256", vocab_sha256(vocab) },
        { "caches", std::move(caches) },
        { "rope",
                {
                        { "type", rope_type_name(hparams.rope_type) },
                        { "n_rot", hparams.n_rot() },
                        { "scale", (double) cparams.rope_freq_scale },
                        { "scale_swa", (double) hparams.rope_freq_scale_train_swa },
                        { "scaling", rope_scaling_name(cparams.rope_scaling_type) },
                        { "n_ctx_orig", cparams.n_ctx_orig_yarn },
                        { "ext_factor", (double) cparams.yarn_ext_factor },
                        { "attn_factor", (double) cparams.yarn_attn_factor },
                        { "beta_fast", (double) cparams.yarn_beta_fast },
                        { "beta_slow", (double) cparams.yarn_beta_slow },
                        { "factors", factors_sha256(model.get_rope_factors(cparams, 0)) },
                } },
    };
    if (hparams.n_pos_per_embd() > 1) {
        res["rope"]["sections"] = hparams.rope_sections;
    }
    if (const llama_memory_recurrent * states = states_of(ctx)) {
        res["recurrent"] = describe_states(*states);
    }
    return res.dump();
}

} // namespace intactkv
