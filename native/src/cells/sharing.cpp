#include "cells/sharing.h"

#include "attention/rows.h"
#include "cells/arena.h"

#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <map>
#include <utility>
#include <vector>

namespace intactkv {

std::vector<uint32_t> place(const arena & a, int32_t seq_id, const std::vector<llama_pos> & positions,
        const std::vector<llama_token> & tokens) {
    llama_kv_cache & kv = a.cache();
    llama_batch_allocr balloc(a.hparams().n_pos_per_embd());
    llama_ubatch ubatch = balloc.ubatch_reserve(positions.size(), 1);
    ubatch.seq_id_unq[0] = seq_id;
    for (size_t i = 0; i < positions.size(); ++i) {
        for (uint32_t dim = 0; dim < ubatch.n_pos; ++dim) { // that of text is the same in all
            ubatch.pos[dim * positions.size() + i] = positions[i];
        }
        ubatch.token[i] = tokens[i];
        ubatch.n_seq_id[i] = 1;
        ubatch.seq_id[i] = &seq_id;
    }
    const auto found = kv.find_slot(ubatch, false);
    if (found.empty()) {
        return {};
    }
    kv.apply_ubatch(found, ubatch);
    return found.idxs[0];
}

void share_cells(const arena & a, uint32_t strm, const std::vector<uint32_t> & among) {
    if (a.n_streams() > 1 || a.has_window()) {
        return;
    }
    llama_kv_cells & cells = a.cells_in(strm);
    std::map<std::pair<int32_t, llama_pos>, uint32_t> there; // by row and position, the first such cell
    for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
        if (!cells.is_empty(i) && a.is_held(cells.ext_get(i).intact) && cells.get_shift(i) == 0) {
            there.emplace(std::pair(cells.ext_get(i).intact, cells.pos_get(i)), i);
        }
    }
    for (const uint32_t cell : among) {
        const auto found = cells.is_empty(cell) || cells.get_shift(cell) != 0
                ? there.end()
                : there.find({ cells.ext_get(cell).intact, cells.pos_get(cell) });
        if (found == there.end() || found->second == cell) {
            continue;
        }
        for (uint32_t seq_id = 0; seq_id < a.n_sequences() && !cells.is_empty(cell); ++seq_id) {
            if (cells.seq_has(cell, seq_id)) {
                cells.seq_rm(cell, seq_id);
                if (!cells.seq_has(found->second, seq_id)) {
                    cells.seq_add(found->second, seq_id);
                }
            }
        }
    }
}

static void copy_cells(
        const arena & a, uint32_t strm, const std::vector<uint32_t> & from, const std::vector<uint32_t> & to) {
    a.wait();
    std::vector<uint8_t> buf;
    for (const uint32_t il : a.layer_ids()) {
        for (ggml_tensor * t : { a.stream_k(il, strm), a.stream_v(il, strm) }) {
            if (t) {
                copy_rows(t, from, to, buf);
            }
        }
    }
}

void before_move(arena * a, int32_t seq_id, llama_pos p0, llama_pos p1) {
    if (a == nullptr || !a->holds_rows()) {
        return;
    }
    const uint32_t strm = a->stream_of(seq_id);
    llama_kv_cells & cells = a->cells_in(strm);
    std::vector<uint32_t> shared;
    std::vector<llama_pos> positions;
    std::vector<llama_token> tokens;
    for (const auto & [pos, cell] : cells.seq_pos_get(seq_id)) {
        if (pos >= p0 && (p1 < 0 || pos < p1) && a->is_held(cells.ext_get(cell).intact) && cells.seq_count(cell) > 1) {
            shared.push_back(cell);
            positions.push_back(pos);
            tokens.push_back(cells.ext_get(cell).tok);
        }
    }
    if (shared.empty()) {
        return;
    }
    const std::vector<uint32_t> own = place(*a, seq_id, positions, tokens);
    if (own.empty()) {
        LLAMA_LOG_WARN("%s: the cache has no room for copies of the %zu cells of a prefix that sequence %d shares and "
                       "moves: it loses them\n",
                __func__, shared.size(), seq_id);
    }
    if (!own.empty()) {
        copy_cells(*a, strm, shared, own);
    }
    for (size_t i = 0; i < shared.size(); ++i) {
        if (!own.empty()) {
            cells.ext_set(own[i], cells.ext_get(shared[i]));
        }
        cells.seq_rm(shared[i], seq_id);
    }
}

} // namespace intactkv
