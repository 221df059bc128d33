#include "automatic/prefixes.h"

#include "api/describe.h"
#include "api/state_bytes.h"
#include "automatic/deferred.h"
#include "cells/arena.h"
#include "cells/sharing.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-memory-recurrent.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <utility>

namespace intactkv {

void prefixes::add(held_prefix added) {
    list.push_back(std::move(added));
    const held_prefix & p = list.back();
    n_longest = std::max<uint32_t>(n_longest, p.tokens.size());
    owners.resize(p.caches.size());
    for (size_t c = 0; c < p.caches.size(); ++c) {
        const held_rows & rows = p.caches[c];
        const auto set = [&](int32_t row, int32_t token) {
            owners[c].resize(std::max<size_t>(owners[c].size(), row + 1));
            owners[c][row] = { &p, token };
        };
        for (uint32_t token = rows.first_token(); token < p.tokens.size(); ++token) {
            set(rows.row(token), token);
        }
        for (uint32_t i = 0; i < rows.n_extra(); ++i) {
            set(rows.extra_row(i), -1);
        }
    }
}

// Only where it still is as it was loaded: not one that was shifted.
const prefixes::owner * prefixes::owner_of(size_t cache, uint32_t strm, uint32_t cell) const {
    const arena & a = list.front().caches[cache].of();
    const llama_kv_cells & cells = a.cells_in(strm);
    const int32_t row = cells.ext_get(cell).intact;
    if (row < 0 || (size_t) row >= owners[cache].size() || !a.is_held(row) || cells.get_shift(cell) != 0) {
        return nullptr;
    }
    const owner & res = owners[cache][row];
    return cells.pos_get(cell) == std::max(res.token, 0) ? &res : nullptr;
}

bool prefixes::any_restored() const {
    return !list.empty() && // a context that only keeps prompts
            std::any_of(list.front().caches.begin(), list.front().caches.end(),
                    [](const held_rows & rows) { return rows.of().has_restored(); });
}

void prefixes::know_restored() const {
    for (size_t c = 0; c < list.front().caches.size(); ++c) {
        arena & a = list.front().caches[c].of();
        for (const auto & [strm, restored] : a.take_restored()) {
            const llama_kv_cells & cells = a.cells_in(strm);
            for (const uint32_t cell : restored) {
                if (cells.is_empty(cell) || cells.get_shift(cell) != 0) {
                    continue;
                }
                for (const uint32_t row : a.held_at(cells.pos_get(cell))) {
                    if (owners[c][row].prefix->caches[c].is_in(strm, cell, row)) {
                        a.mark_held(strm, cell, row);
                        break;
                    }
                }
            }
            share_cells(a, strm, { restored.begin(), restored.end() });
        }
    }
}

// Whether a cache has a cell at every position that a token at position n sees.
static bool has_all_in_sight(const arena & a, llama_seq_id seq_id, uint32_t n) {
    const auto & cells = a.cells_of(a.stream_of(seq_id), seq_id);
    for (uint32_t pos = n; pos-- > 0 && !a.is_out_of_sight(pos, n);) {
        const auto found = cells.lower_bound({ pos, 0 });
        if (found == cells.end() || (uint32_t) found->first != pos) {
            return false;
        }
    }
    return cells.empty() ? n == 0 : (uint32_t) cells.rbegin()->first + 1 == n;
}

bool prefixes::begun(llama_seq_id seq_id, origins & of) const {
    of.clear();
    const auto & caches = list.front().caches;
    const arena & a = caches[0].of();
    const uint32_t strm = a.stream_of(seq_id);
    const auto & cells = a.cells_of(strm, seq_id);
    if (!cells.empty() && !owner_of(0, strm, cells.rbegin()->second)) { // what most sequences end with
        return false;
    }
    std::vector<const held_prefix *> extra;
    for (const auto & [pos, cell] : cells) {
        const owner * found = owner_of(0, strm, cell);
        if (found == nullptr || (found->token >= 0 && (uint32_t) found->token != of.size())) {
            return false;
        }
        (found->token < 0 ? extra : of).push_back(found->prefix);
    }
    const bool same = of.empty() || std::all_of(extra.begin(), extra.end(), [&](const auto * p) { return p == of[0]; });
    if (!same || extra.size() != (of.empty() ? 0 : of[0]->n_extra)) {
        return false;
    }
    return std::all_of(caches.begin() + 1, caches.end(),
            [&](const held_rows & rows) { return has_all_in_sight(rows.of(), seq_id, of.size()); });
}

// The cache of a sliding window has cells for each sequence's window, and one that several sequences have is not free
// again when it is out of sight.
bool prefixes::may_share(size_t cache) const {
    const auto & caches = list.front().caches;
    const arena & a = caches[cache].of();
    return a.n_streams() == 1 && (!a.has_window() || a.n_stream_cells() == caches[0].of().n_stream_cells());
}

std::unordered_map<int32_t, uint32_t> prefixes::cells_by_row(size_t cache, uint32_t strm) const {
    const llama_kv_cells & cells = list.front().caches[cache].of().cells_in(strm);
    std::unordered_map<int32_t, uint32_t> res;
    for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
        if (!cells.is_empty(i) && owner_of(cache, strm, i)) {
            res.emplace(cells.ext_get(i).intact, i);
        }
    }
    return res;
}

bool prefixes::give(size_t cache, const std::vector<llama_seq_id> & seqs, const held_rows & rows,
        const std::vector<int32_t> & wanted) const {
    arena & a = rows.of();
    for (const llama_seq_id seq_id : seqs) {
        const uint32_t strm = a.stream_of(seq_id);
        llama_kv_cells & cells = a.cells_in(strm);
        std::unordered_map<int32_t, uint32_t> there;
        if (may_share(cache) || seq_id != seqs[0]) {
            there = cells_by_row(cache, strm);
        }
        std::vector<int32_t> missing;
        std::vector<llama_pos> positions;
        std::vector<llama_token> tokens;
        for (const int32_t row : wanted) {
            if (const auto found = there.find(row); found != there.end()) {
                if (!cells.seq_has(found->second, seq_id)) {
                    cells.seq_add(found->second, seq_id);
                }
                continue;
            }
            const owner & own = owners[cache][row];
            missing.push_back(row);
            positions.push_back(std::max(own.token, 0));
            tokens.push_back(own.token < 0 ? LLAMA_TOKEN_NULL : own.prefix->tokens[own.token]);
        }
        if (missing.empty()) {
            continue;
        }
        const std::vector<uint32_t> placed = place(a, seq_id, positions, tokens);
        if (placed.empty()) {
            return false;
        }
        rows.write(strm, placed, missing);
    }
    return true;
}

bool prefixes::tokens_of(llama_seq_id seq_id, std::vector<llama_token> & tokens) const {
    tokens.clear();
    const auto & caches = list.front().caches;
    uint32_t n = 0;
    if (const held_prefix * waiting = deferred(seq_id, n)) {
        tokens.assign(waiting->tokens.begin(), waiting->tokens.begin() + n);
        return true;
    }
    if (caches.empty()) {
        return llama_memory_seq_pos_max(llama_get_memory(ctx), seq_id) < 0;
    }
    const arena & a = caches[0].of();
    const uint32_t strm = a.stream_of(seq_id);
    const llama_kv_cells & cells = a.cells_in(strm);
    for (const auto & [pos, cell] : a.cells_of(strm, seq_id)) {
        const llama_token id = cells.ext_get(cell).tok;
        if ((size_t) pos != tokens.size() || id < 0 || cells.get_shift(cell) != 0) {
            return false;
        }
        tokens.push_back(id);
    }
    return true;
}

bool prefixes::replace(const std::vector<llama_seq_id> & seqs, const held_prefix & prefix, uint32_t n,
        const std::vector<uint8_t> & bytes) const {
    llama_memory_i * memory = llama_get_memory(ctx);
    for (const llama_seq_id seq_id : seqs) {
        memory->seq_rm(seq_id, -1, -1);
    }
    for (size_t c = 0; c < prefix.caches.size(); ++c) {
        const held_rows & rows = prefix.caches[c];
        std::vector<int32_t> wanted;
        for (uint32_t token = rows.first_token(); token < n; ++token) {
            wanted.push_back(rows.row(token));
        }
        for (uint32_t i = 0; i < rows.n_extra(); ++i) {
            wanted.push_back(rows.extra_row(i));
        }
        if (!give(c, seqs, rows, wanted)) {
            return false;
        }
    }
    if (ggml_backend_sched_t sched = ctx->get_sched()) {
        ggml_backend_sched_synchronize(sched);
    }
    llama_memory_recurrent & states = *states_of(ctx);
    state_bytes io(bytes.data(), bytes.size());
    states.state_read(io, seqs[0], 0);
    for (const llama_seq_id seq_id : seqs) {
        states.seq_cp(seqs[0], seq_id, -1, -1);
    }
    return true;
}

const held_prefix * prefixes::deferred(llama_seq_id seq_id, uint32_t & n) const {
    const deferred_note note = deferred_of(*states_of(ctx), seq_id);
    if (!note.there) {
        return nullptr;
    }
    n = note.n;
    for (const held_prefix & p : list) {
        if (p.tokens.size() > n && p.hash == note.hash) {
            return &p;
        }
    }
    throw std::runtime_error(format("sequence %d waits behind %u tokens of a prefix that this context does not hold: "
                                    "evaluate its tokens again",
            seq_id, n));
}

int32_t prefixes::shift_of(llama_seq_id seq_id) const {
    const deferred_note note = deferred_of(*states_of(ctx), seq_id);
    for (const held_rows & rows : list.front().caches) {
        const arena & a = rows.of();
        llama_pos expected = note.shift;
        for (const auto & [pos, cell] : a.cells_of(a.stream_of(seq_id), seq_id)) {
            if (pos != expected++) {
                throw std::runtime_error(
                        format("sequence %d waits behind %u tokens of a prefix, of which some were moved: "
                               "evaluate its tokens again",
                                seq_id, note.n));
            }
        }
    }
    return note.shift;
}

bool prefixes::any_deferred() const {
    const llama_memory_recurrent * states = list.empty() ? nullptr : states_of(ctx);
    for (uint32_t i = 0; states && i < states->size; ++i) {
        if (deferred_of(*states, i).there) {
            return true;
        }
    }
    return false;
}

// Not where a sliding window has left cells behind that it needs until then, and not where one can step back a little in the
// state: into what was not computed.
const held_prefix * prefixes::to_wait_for(const std::vector<llama_token> & tokens) const {
    if (!whole_only() || states_of(ctx)->n_rs_seq > 0) {
        return nullptr;
    }
    const auto found = std::find_if(list.begin(), list.end(), [&](const held_prefix & p) {
        return p.tokens.size() > tokens.size() && std::equal(tokens.begin(), tokens.end(), p.tokens.begin()) &&
                std::all_of(
                        p.caches.begin(), p.caches.end(), [](const auto & rows) { return rows.first_token() == 0; });
    });
    return found == list.end() ? nullptr : &*found;
}

bool prefixes::defer(const std::vector<llama_seq_id> & seqs, const held_prefix & prefix, uint32_t n) const {
    return replace(seqs, prefix, n, deferred_state(prefix, n));
}

bool prefixes::load(const std::vector<llama_seq_id> & seqs, const held_prefix & prefix, uint32_t b, uint32_t e) const {
    if (prefix.whole_only()) {
        return replace(seqs, prefix, prefix.tokens.size(), prefix.states);
    }
    for (size_t c = 0; c < prefix.caches.size(); ++c) {
        const held_rows & rows = prefix.caches[c];
        std::vector<int32_t> wanted;
        for (uint32_t token = std::max(b, rows.first_token()); token < e; ++token) {
            wanted.push_back(rows.row(token));
        }
        for (uint32_t i = 0; b == 0 && e > 0 && i < rows.n_extra(); ++i) {
            wanted.push_back(rows.extra_row(i));
        }
        if (!give(c, seqs, rows, wanted)) {
            return false;
        }
        if (rows.first_token() > 0) { // those of a window that were computed before
            take_over_cells(c, seqs, rows, 0, b);
        }
    }
    return true;
}

void prefixes::take_over_cells(
        size_t cache, const std::vector<llama_seq_id> & seqs, const held_rows & rows, uint32_t b, uint32_t e) const {
    const arena & a = rows.of();
    const uint32_t strm = a.stream_of(seqs[0]);
    llama_kv_cells & cells = a.cells_in(strm);
    std::unordered_map<int32_t, uint32_t> there;
    if (may_share(cache)) {
        there = cells_by_row(cache, strm);
    }
    std::vector<std::pair<uint32_t, int32_t>> computed; // cell, row
    for (const auto & [pos, cell] : a.cells_of(strm, seqs[0])) {
        if ((uint32_t) pos >= std::max(b, rows.first_token()) && (uint32_t) pos < e && !owner_of(cache, strm, cell)) {
            computed.emplace_back(cell, rows.row(pos));
        }
    }
    std::vector<uint32_t> to;
    std::vector<int32_t> what;
    for (const auto & [cell, row] : computed) {
        const auto found = there.find(row);
        if (found == there.end()) {
            to.push_back(cell);
            what.push_back(row);
            continue;
        }
        for (const llama_seq_id seq_id : seqs) {
            cells.seq_rm(cell, seq_id);
            cells.seq_add(found->second, seq_id);
        }
    }
    if (!to.empty()) {
        rows.write(strm, to, what);
    }
}

std::vector<int32_t> prefixes::missing_extra(size_t cache, llama_seq_id seq_id, const held_rows & rows) const {
    const arena & a = rows.of();
    const uint32_t strm = a.stream_of(seq_id);
    std::set<int32_t> there;
    for (const auto & [pos, cell] : a.cells_of(strm, seq_id)) {
        if (pos > 0) {
            break;
        }
        if (owner_of(cache, strm, cell)) {
            there.insert(a.row_of(strm, cell));
        }
    }
    std::vector<int32_t> res;
    for (uint32_t i = 0; i < rows.n_extra(); ++i) {
        if (there.count(rows.extra_row(i)) == 0) {
            res.push_back(rows.extra_row(i));
        }
    }
    return res;
}

bool prefixes::take_over(
        const std::vector<llama_seq_id> & seqs, const held_prefix & prefix, uint32_t b, uint32_t e) const {
    if (prefix.whole_only()) {
        return replace(seqs, prefix, prefix.tokens.size(), prefix.states);
    }
    for (size_t c = 0; c < prefix.caches.size(); ++c) {
        const held_rows & rows = prefix.caches[c];
        take_over_cells(c, seqs, rows, b, e);
        if (b == 0 && rows.n_extra() > 0 && !give(c, seqs, rows, missing_extra(c, seqs[0], rows))) {
            return false;
        }
    }
    return true;
}

} // namespace intactkv
