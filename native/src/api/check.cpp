#include "api/check.h"

#include "api/describe.h"
#include "cells/sight.h"
#include "prefix_file/compatible.h"
#include "prefix_file/parse.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

namespace intactkv {

static thread_local std::string error_of_thread;

int32_t fail(const std::string & error) {
    error_of_thread = error;
    return -1;
}

const char * last_error() {
    return error_of_thread.c_str();
}

std::string check_file(const llama_context * ctx, const void * data, size_t size, prefix_view & view) {
    std::string manifest;
    std::string error;
    if (!parse(data, size, view, manifest, error) || ctx == nullptr) {
        return error;
    }
    const std::string why = unsupported(llama_get_memory(ctx), *llama_get_model(ctx));
    if (!why.empty()) {
        return why;
    }
    char reference[128] = "";
    llama_model_meta_val_str(llama_get_model(ctx), "intactkv.reference.sha256", reference, sizeof(reference));
    if (!compatible(manifest, describe(ctx), reference, error)) {
        return error;
    }
    if (*reference == 0) {
        LLAMA_LOG_WARN("%s: the model has no intactkv.reference.sha256: only its structure could be compared with the "
                       "prefix\n",
                __func__);
    }
    return "";
}

std::string check_context(const llama_context * ctx, const prefix_view & view) {
    if (view.n_cells >= llama_n_ctx_seq(ctx)) {
        const uint32_t n_extra = view.n_cells - view.n_tokens;
        return format("the prefix has %u tokens%s and the context only n_ctx = %u for a sequence: use a larger n_ctx",
                view.n_tokens, n_extra ? format(", %u extra cells", n_extra).c_str() : "", llama_n_ctx_seq(ctx));
    }
    if (!ctx->get_cparams().flash_attn && !caches_of(ctx).empty()) {
        return "flash attention is off in this context, its V cache is transposed: turn flash attention on to load a prefix";
    }
    return no_room_in_sight(ctx, view);
}

std::string check(const llama_context * ctx, const void * data, size_t size, prefix_view & view) {
    const std::string error = check_file(ctx, data, size, view);
    return error.empty() && ctx ? check_context(ctx, view) : error;
}

} // namespace intactkv
