#include "hooks.h"

#include "intactkv.h"

#include "api/describe.h"
#include "cells/arena.h"
#include "prefix_file/read_bytes.h"

#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <vector>

namespace intactkv {

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

} // namespace intactkv
