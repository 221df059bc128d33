// The C API.

#include "intactkv.h"

#include "api/describe.h"
#include "cells/arena.h"
#include "prefix_file/compatible.h"
#include "prefix_file/parse.h"
#include "prefix_file/read_bytes.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace intactkv {

static thread_local std::string last_error;

static int32_t fail(const std::string & error) {
    last_error = error;
    return -1;
}

// Hands the bytes of a KV state to llama_kv_cache::state_read(). Bounds are checked though the file was verified:
// the two readers must agree, and this one is next to the cache.
class state_bytes : public llama_io_read_i {
public:
    state_bytes(const uint8_t * data, size_t size) :
        data(data),
        size(size) {}

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
    const size_t size;
    size_t pos = 0;
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
        LLAMA_LOG_WARN("%s: the model has no intactkv.reference.sha256: only its structure could be compared with the "
                       "prefix\n",
                __func__);
    }
    if (view.n_cells >= llama_n_ctx_seq(ctx)) {
        const uint32_t n_extra = view.n_cells - view.n_tokens;
        return format("the prefix has %u tokens%s and the context only n_ctx = %u for a sequence: use a larger n_ctx",
                view.n_tokens, n_extra ? format(", %u extra cells", n_extra).c_str() : "", llama_n_ctx_seq(ctx));
    }
    if (!ctx->get_cparams().flash_attn) {
        return "flash attention is off in this context, its V cache is transposed: turn flash attention on to load a prefix";
    }
    return "";
}

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
    return last_error.c_str();
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
        for (llama_kv_cache * kv : caches_of(ctx)) {
            kv->state_read(io, seq_id, 0);
        }
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
    const std::string why = unsupported(llama_get_memory(ctx), *llama_get_model(ctx));
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
    return res;
}

const char * intactkv_attention(const llama_context * ctx) {
    const auto caches = caches_of(ctx);
    const bool fused = !caches.empty() && std::all_of(caches.begin(), caches.end(), [&](const llama_kv_cache * kv) {
        return kv->intact && kv->intact->fused(ctx->get_cparams());
    });
    return fused ? "fused" : intactkv_n_cells(ctx, -1) > 0 || intactkv_tail(ctx) > 0 ? "portable" : "stock";
}
