// A new context's automatic prefixes: found, verified, held.

#include "api/check.h"
#include "api/describe.h"
#include "automatic/automatic.h"
#include "automatic/enable.h"
#include "automatic/sources.h"
#include "cells/arena.h"
#include "keeping/keeper.h"
#include "prefix_file/parse.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

namespace intactkv {

static thread_local bool enabled = true;

bool set_enabled(bool value) {
    return std::exchange(enabled, value);
}

// Why this context can use no prefix, "" if it can. Not for one that cannot use this prefix: that is verify()'s
static std::string why_none(const llama_context & ctx) {
    const llama_cparams & cparams = ctx.get_cparams();
    const std::string why = unsupported(llama_get_memory(&ctx), ctx.get_model());
    if (!why.empty()) {
        return why;
    }
    if (cparams.embeddings) {
        return "the context is for embeddings";
    }
    if (!cparams.causal_attn) {
        return "the context's attention is not causal, tokens see those behind them";
    }
    for (const llama_kv_cache * kv : caches_of(&ctx)) {
        if (!kv->intact) {
            return "the context has the cells of another";
        }
        if (kv->intact->v_transposed()) {
            return "flash attention is off in this context, its V cache is transposed";
        }
        if (!kv->intact->reads_intact() && !kv->intact->all_exact()) {
            return "INTACTKV_ATTN=stock reads no intact cell";
        }
    }
    return "";
}

// Extra cells are in sight of every token within the window: beside them it must have room for a ubatch.
static std::string why_no_window(const llama_context & ctx, const prefix_view & view) {
    const uint32_t n_extra = view.n_cells - view.n_tokens;
    const auto caches = caches_of(&ctx);
    for (const llama_kv_cache * kv : caches) {
        const arena & a = *kv->intact;
        if (n_extra == 0 || !a.has_window() || a.n_stream_cells() == caches[0]->get_size()) {
            continue;
        }
        const uint32_t n_swa = ctx.get_model().hparams.n_swa, n_ubatch = ctx.get_cparams().n_ubatch;
        const uint32_t n_seq = a.n_streams() == 1 ? a.n_sequences() : 1;
        if (n_seq * (n_swa - 1 + n_extra) + n_ubatch > a.n_stream_cells()) {
            return format(
                    "its %u extra cells have no room in the cache of the sliding window beside n_ubatch = %u: use a "
                    "smaller n_ubatch, or a cache of full size (swa_full)",
                    n_extra, n_ubatch);
        }
    }
    return "";
}

// A prefix that this context cannot use. Throws if that leaves a file that the user has named without any use.
static void leave_out(const prefix_source & source, const std::string & why) {
    if (source.named && !is_of_use(source)) {
        throw std::runtime_error(why);
    }
    LLAMA_LOG_WARN("%s: the prefix %s is not used%s: %s\n", __func__, source.name().c_str(),
            source.named ? " by this context, another one has it" : "", why.c_str());
}

static void add(llama_context & ctx, automatic & to, const prefix_source & source) {
    std::vector<uint8_t> data;
    std::string error;
    prefix_view view;
    if (!read_prefix(source.path.c_str(), source.where, data, error)) {
        throw std::runtime_error(error);
    }
    error = check_file(&ctx, data.data(), data.size(), view);
    if (!error.empty() && !source.named) {
        throw std::runtime_error(error);
    }
    if (error.empty()) {
        error = check_context(&ctx, view);
    }
    if (error.empty()) {
        error = why_no_window(ctx, view);
    }
    if (!error.empty()) {
        leave_out(source, error);
        return;
    }
    to.hold(view, source.name(), source.named ? of_use(source) : nullptr);
    LLAMA_LOG_INFO("%s: automatic prefix %s: %u tokens%s\n", __func__, source.name().c_str(), view.n_tokens,
            view.calibrated ? ", trained" : "");
}

// One that a server has kept is no reason to have no context.
static void add_or_leave(llama_context & ctx, automatic & to, const prefix_source & source) {
    try {
        add(ctx, to, source);
    } catch (const std::exception & err) {
        if (!keeper::has(source.path)) {
            throw;
        }
        LLAMA_LOG_WARN("%s: the kept prefix %s is not used: %s\n", __func__, source.name().c_str(), err.what());
    }
}

std::shared_ptr<automatic> of_new(llama_context & ctx) {
    if (!enabled || ctx.get_cparams().ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
        return nullptr;
    }
    auto res = std::make_shared<automatic>(ctx);
    std::string now = "LLAMA_INTACTKV";
    try {
        const std::vector<prefix_source> sources = sources_of(ctx.get_model());
        std::unique_ptr<keeper> kept = keeper::of_new(ctx);
        if (sources.empty() && !kept) {
            return nullptr;
        }
        const std::string why = why_none(ctx);
        const auto fill = [&](bool on) {
            for (llama_kv_cache * kv : why.empty() ? caches_of(&ctx) : std::vector<llama_kv_cache *>()) {
                kv->intact->fill(on);
            }
        };
        fill(sources.size() > 1);
        for (const prefix_source & source : sources) {
            now = source.name();
            if (why.empty()) {
                add_or_leave(ctx, *res, source);
            } else if (source.named && !keeper::has(source.path)) {
                leave_out(source, why);
            }
        }
        fill(false);
        if (why.empty()) {
            res->keep(std::move(kept));
        } else {
            if (!sources.empty() && !sources[0].named) {
                LLAMA_LOG_INFO("%s: the model's prefixes are not used: %s\n", __func__, why.c_str());
            }
            if (kept) {
                LLAMA_LOG_WARN("%s: no prompt is kept: %s\n", __func__, why.c_str());
            }
        }
    } catch (const std::exception & err) {
        const std::string error = format(
                "the automatic prefix %s cannot be used: %s (LLAMA_INTACTKV=off: no prefix)", now.c_str(), err.what());
        fail(error);
        throw std::runtime_error(error);
    }
    return res->all().all().empty() && !res->keeps() ? nullptr : res;
}

} // namespace intactkv
