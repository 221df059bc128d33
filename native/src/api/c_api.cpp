// The C API.

#include "intactkv.h"

#include "api/check.h"
#include "api/describe.h"
#include "api/state_bytes.h"
#include "automatic/automatic.h"
#include "automatic/enable.h"
#include "cells/arena.h"
#include "cells/sight.h"
#include "prefix_file/parse.h"
#include "prefix_file/read_bytes.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <exception>
#include <string>
#include <utility>
#include <vector>

namespace intactkv {

// the largest f(arena) of the caches, 0 if none can have intact cells
template <typename F> static int32_t most_of(const llama_context * ctx, F f) {
    uint32_t res = 0;
    for (const llama_kv_cache * kv : caches_of(ctx)) {
        res = std::max(res, kv->intact ? f(*kv->intact) : 0);
    }
    return res;
}

} // namespace intactkv

using namespace intactkv;

const char * intactkv_version(void) {
    return INTACTKV_VERSION;
}

const char * intactkv_error(void) {
    return last_error();
}

const char * intactkv_describe(const llama_context * ctx) {
    const std::string why = unsupported(llama_get_memory(ctx), *llama_get_model(ctx));
    if (!why.empty()) {
        fail(why);
        return nullptr;
    }
    static thread_local std::string res;
    res = describe(ctx);
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
        return fail(
                format("sequence %d does not exist: this context has n_seq_max = %u", seq_id, llama_n_seq_max(ctx)));
    }
    llama_synchronize(ctx);
    try {
        state_bytes io(view.state, view.state_size);
        llama_get_memory(ctx)->state_read(io, seq_id, 0);
        keep_in_sight(ctx, seq_id, view.in_sight);
    } catch (const std::exception & err) {
        llama_memory_seq_rm(llama_get_memory(ctx), seq_id, -1, -1);
        return fail(format(
                "the prefix of %u tokens could not be placed in sequence %d: %s", view.n_tokens, seq_id, err.what()));
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
    // a prefix is in all caches or in none; one without a window never drops a cell of it while it is in use
    return most_of(ctx, [&](const arena & a) { return a.n_cells(seq_id); });
}

int32_t intactkv_n_tail_cells(const llama_context * ctx, llama_seq_id seq_id) {
    return most_of(ctx, [&](const arena & a) { return a.n_cells(seq_id, true); });
}

int32_t intactkv_set_tail(llama_context * ctx, int32_t n_cells) {
    const std::string why = without_cells(llama_get_memory(ctx), *llama_get_model(ctx));
    if (!why.empty()) {
        return n_cells <= 0 ? 0
                            : fail(format("a tail of %d intact cells was asked for, and %s: set the tail to 0", n_cells,
                                      why.c_str()));
    }
    llama_synchronize(ctx);
    std::vector<std::pair<arena *, uint32_t>> done; // and the tail that each had
    try {
        for (llama_kv_cache * kv : caches_of(ctx)) {
            if (arena * a = kv->intact.get()) {
                done.emplace_back(a, a->tail());
                a->set_tail(n_cells);
            }
        }
    } catch (const std::exception & err) {
        done.pop_back(); // this one has changed nothing
        for (const auto & [a, before] : done) {
            try {
                a->set_tail(before);
            } catch (const std::exception &) {
                a->give_up_tail(); // there is no memory for what it had either
            }
        }
        return fail(err.what());
    }
    return intactkv_tail(ctx);
}

int32_t intactkv_tail(const llama_context * ctx) {
    return most_of(ctx, [](const arena & a) { return a.tail(); });
}

size_t intactkv_arena_bytes(const llama_context * ctx) {
    size_t res = 0;
    for (const llama_kv_cache * kv : caches_of(ctx)) {
        res += kv->intact ? kv->intact->n_bytes() : 0;
    }
    const automatic * prefixes = automatic::of(ctx);
    return res + (prefixes ? prefixes->n_bytes() : 0);
}

bool intactkv_enable_automatic(bool enabled) {
    return set_enabled(enabled);
}

int32_t intactkv_add_prefix(llama_context * ctx, const void * data, size_t size, const char * name) {
    const std::string error = automatic::add(*ctx, data, size, name ? name : "");
    return error.empty() ? intactkv_n_prefixes(ctx) - 1 : fail(error);
}

int32_t intactkv_load_held(llama_context * ctx, int32_t i, llama_seq_id seq_id) {
    automatic * prefixes = automatic::of(ctx);
    const std::string error =
            prefixes ? prefixes->load(i, seq_id) : format("prefix %d does not exist: this context has none", i);
    return error.empty() ? (int32_t) prefixes->all().all()[i].tokens.size() : fail(error);
}

bool intactkv_set_automatic(llama_context * ctx, bool on) {
    automatic * prefixes = automatic::of(ctx);
    return prefixes ? std::exchange(prefixes->on, on) : false;
}

int32_t intactkv_n_prefixes(const llama_context * ctx) {
    const automatic * prefixes = automatic::of(ctx);
    return prefixes ? prefixes->all().all().size() : 0;
}

const char * intactkv_prefix_name(const llama_context * ctx, int32_t i) {
    if (i < 0 || i >= intactkv_n_prefixes(ctx)) {
        fail(format("prefix %d does not exist: this context has %d", i, intactkv_n_prefixes(ctx)));
        return nullptr;
    }
    return automatic::of(ctx)->all().all()[i].name.c_str();
}

uint64_t intactkv_n_not_computed(const llama_context * ctx) {
    const automatic * prefixes = automatic::of(ctx);
    return prefixes ? prefixes->n_not_computed() : 0;
}

const char * intactkv_attention(const llama_context * ctx) {
    const auto caches = caches_of(ctx);
    const bool fused = !caches.empty() && std::all_of(caches.begin(), caches.end(), [&](const llama_kv_cache * kv) {
        return kv->intact && kv->intact->fused(ctx->get_cparams());
    });
    return fused ? "fused" : intactkv_n_cells(ctx, -1) > 0 || intactkv_tail(ctx) > 0 ? "portable" : "stock";
}
