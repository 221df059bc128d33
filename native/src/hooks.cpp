#include "hooks.h"

#include "intactkv.h"

#include "api/check.h"
#include "api/describe.h"
#include "automatic/automatic.h"
#include "automatic/deferred.h"
#include "automatic/enable.h"
#include "cells/arena.h"
#include "cells/sight.h"
#include "prefix_file/parse.h"
#include "prefix_file/read_bytes.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include <algorithm>
#include <filesystem>
#include <limits>
#include <stdexcept>
#include <system_error>
#include <vector>

namespace intactkv {

std::shared_ptr<automatic> enable(llama_context & ctx) {
    llama_memory_i * memory = llama_get_memory(&ctx);
    if (memory == nullptr || ctx.get_model().hparams.no_alloc) {
        return nullptr;
    }
    if (without_cells(memory, ctx.get_model()).empty()) {
        for (llama_kv_cache * kv : caches_of(memory)) {
            arena::attach(*kv, ctx);
        }
    }
    return of_new(ctx);
}

void came_from(llama_model & model, const std::string & path) {
    std::error_code error;
    const auto where = std::filesystem::absolute(std::filesystem::u8path(path), error);
    model.intact_path = path.empty() || error ? path : where.u8string();
}

bool decode(automatic & prefixes, const llama_batch_ext & batch, int & status) {
    return prefixes.decode(batch, status);
}

void before_saving(automatic * prefixes, int32_t seq_id, uint32_t flags) {
    if (prefixes && !(flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) && !prefixes->finish(seq_id)) {
        throw std::runtime_error("the tokens of a prefix that were not computed so far cannot be: there is no room, or "
                                 "the batch failed");
    }
}

bool after_restoring(llama_context & ctx, int32_t seq_id, uint32_t flags) {
    llama_memory_i * memory = llama_get_memory(&ctx);
    try {
        const llama_memory_recurrent * states = states_of(memory);
        if (states == nullptr) {
            return true;
        }
        automatic * prefixes = automatic::of(&ctx);
        const bool known = prefixes && prefixes->restored(seq_id, flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);
        if (known || !deferred_of(*states, seq_id).there) {
            return true;
        }
        LLAMA_LOG_ERROR(
                "%s: sequence %d waits for the rest of a prefix, and this context holds none: evaluate its tokens "
                "again\n",
                __func__, seq_id);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
    }
    memory->seq_rm(seq_id, -1, -1);
    return false;
}

void keep_on_cpu(ggml_backend_sched_t sched, ggml_backend_t cpu, ggml_tensor * attention) {
    if (attention->op == GGML_OP_CUSTOM) {
        ggml_backend_sched_set_tensor_backend(sched, attention, cpu);
    }
    for (ggml_tensor * src : attention->src) { // behind a view, or what it merges
        if (src && src->op == GGML_OP_CUSTOM) {
            keep_on_cpu(sched, cpu, src);
        }
    }
}

uint32_t state_version(const llama_context * ctx, int32_t seq_id) {
    return intactkv_n_cells(ctx, seq_id) > 0 || any_in_sight(ctx, seq_id) ? STATE_VERSION_INTACT : 0;
}

bool verify_file(const llama_context * ctx, const char * path, bool & in_sight) {
    if (!has_trailer(path)) {
        return true;
    }
    std::vector<uint8_t> data;
    std::string error;
    if (!read_bytes(path, data, error)) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, error.c_str());
        return false;
    }
    prefix_view view;
    error = check(ctx, data.data(), data.size(), view);
    if (!error.empty()) {
        fail(error);
        LLAMA_LOG_ERROR("%s: %s\n", __func__, error.c_str());
        return false;
    }
    in_sight = view.in_sight;
    return true;
}

bool keeps_nothing(const llama_memory_recurrent & memory) {
    return std::all_of(memory.r_l.begin(), memory.r_l.end(), [](const ggml_tensor * t) { return t == nullptr; });
}

bool seq_rm(llama_memory_recurrent & memory, int32_t seq_id, int32_t p0, int32_t p1) {
    if (!keeps_nothing(memory)) {
        return memory.seq_rm(seq_id, p0, p1);
    }
    if (seq_id < 0) {
        memory.clear(false);
        return true;
    }
    return memory.seq_rm(seq_id, -1, -1);
}

int32_t seq_pos_min(const llama_memory_recurrent & memory, int32_t seq_id) {
    return keeps_nothing(memory) ? -1 : memory.seq_pos_min(seq_id);
}

int32_t seq_pos_max(const llama_memory_recurrent & memory, int32_t seq_id) {
    return keeps_nothing(memory) ? std::numeric_limits<int32_t>::max() : memory.seq_pos_max(seq_id);
}

void state_write(const llama_memory_recurrent & memory, llama_io_write_i & io, int32_t seq_id, uint32_t flags) {
    if (!keeps_nothing(memory)) {
        memory.state_write(io, seq_id, flags);
    }
}

void state_read(llama_memory_recurrent & memory, llama_io_read_i & io, int32_t seq_id, uint32_t flags) {
    if (keeps_nothing(memory)) {
        seq_rm(memory, seq_id, -1, -1);
    } else {
        memory.state_read(io, seq_id, flags);
    }
}

} // namespace intactkv
