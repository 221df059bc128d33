#include "cells/sight.h"

#include "api/describe.h"
#include "cells/arena.h"
#include "prefix_file/parse.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <limits>

namespace intactkv {

llama_pos seq_pos_min(const llama_kv_cells & cells, int32_t seq_id) {
    const llama_pos first = cells.seq_pos_min(seq_id);
    llama_pos last = first; // of those in sight that the sequence begins with
    for (const auto & [pos, cell] : cells.seq_pos_get(seq_id)) {
        if (!cells.ext_get(cell).in_sight) {
            return pos > last + 1 ? pos : first;
        }
        last = pos;
    }
    return first;
}

llama_pos first_that_leaves(const llama_kv_cells & cells, int32_t seq_id) {
    for (const auto & [pos, cell] : cells.seq_pos_get(seq_id)) {
        if (!cells.ext_get(cell).in_sight) {
            return pos;
        }
    }
    return std::numeric_limits<llama_pos>::max();
}

void keep_in_sight(const arena & a, uint32_t strm, uint32_t cell) {
    if (a.has_window()) {
        llama_kv_cells & cells = a.cells_in(strm);
        llama_kv_cell_ext ext = cells.ext_get(cell);
        ext.in_sight = true;
        cells.ext_set(cell, ext);
    }
}

void keep_in_sight(const llama_context * ctx, int32_t seq_id, bool in_sight) {
    for (const llama_kv_cache * kv : caches_of(ctx)) {
        if (in_sight && kv->intact) {
            const uint32_t strm = kv->intact->stream_of(seq_id);
            for (const auto & [pos, cell] : kv->intact->cells_of(strm, seq_id)) {
                keep_in_sight(*kv->intact, strm, cell);
            }
        }
    }
}

static bool any_in_sight(const arena & a, int32_t seq_id) {
    for (uint32_t strm = 0; a.has_window() && strm < a.n_streams(); ++strm) {
        const llama_kv_cells & cells = a.cells_in(strm);
        for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
            if (!cells.is_empty(i) && cells.ext_get(i).in_sight && (seq_id < 0 || cells.seq_has(i, seq_id))) {
                return true;
            }
        }
    }
    return false;
}

bool any_in_sight(const llama_context * ctx, int32_t seq_id) {
    for (const llama_kv_cache * kv : caches_of(ctx)) {
        if (kv->intact && any_in_sight(*kv->intact, seq_id)) {
            return true;
        }
    }
    return false;
}

std::string no_room_in_sight(const llama_context * ctx, const prefix_view & view) {
    const auto caches = caches_of(ctx);
    for (const llama_kv_cache * kv : caches) {
        if (!view.in_sight || !kv->intact || !kv->intact->has_window() || kv->get_size() == caches[0]->get_size()) {
            continue; // one of full size has room for what the context has room for
        }
        const uint32_t n_swa = ctx->get_model().hparams.n_swa, n_ubatch = ctx->get_cparams().n_ubatch;
        const uint32_t n_seq = kv->get_n_stream() == 1 ? kv->get_n_seq_max() : 1;
        if (n_seq * (n_swa - 1 + view.n_cells) + n_ubatch > kv->get_size()) {
            return format("its %u cells stay in sight, and the cache of the sliding window has no room for them beside "
                          "n_ubatch = %u: use a smaller n_ubatch, or a cache of full size (swa_full)",
                    view.n_cells, n_ubatch);
        }
    }
    return "";
}

} // namespace intactkv
