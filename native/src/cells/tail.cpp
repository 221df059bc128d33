#include "cells/tail.h"

#include "cells/arena.h"
#include "cells/graph.h"

#include "llama-impl.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <limits>
#include <map>
#include <stdexcept>
#include <utility>
#include <vector>

namespace intactkv {

constexpr int32_t TAIL = 128;

static bool under_8_bits(ggml_type type) {
    return ggml_type_size(type) < (size_t) ggml_blck_size(type);
}

int32_t default_tail(ggml_type type_k, ggml_type type_v) {
    return under_8_bits(type_k) || under_8_bits(type_v) ? TAIL : 0;
}

int32_t tail_asked() {
    const char * env = getenv("INTACTKV_TAIL");
    if (env == nullptr || *env == 0) {
        return -1;
    }
    char * end;
    errno = 0;
    const long n = strtol(env, &end, 10);
    if (*end != 0 || errno != 0 || n < 0 || n > std::numeric_limits<int32_t>::max()) {
        throw std::runtime_error(
                format("INTACTKV_TAIL is '%s': give a number of cells, 0 for no tail, or unset it", env));
    }
    return (int32_t) n;
}

namespace {

using place = std::pair<llama_pos, uint32_t>; // of a cell in a sequence: its position, then its index

// The newest cells of the sequences of each stream: as many as the tail has, besides the new ones.
class newest {
public:
    newest(const arena & a, const cells_view & view) :
        a(a) {
        for (size_t s = 0; s < view.idxs->size(); ++s) {
            const uint32_t strm = (*view.strm)[s];
            for (const uint32_t cell : (*view.idxs)[s]) {
                for (uint32_t seq_id = 0; seq_id < a.n_sequences(); ++seq_id) {
                    if (a.in_sequence(strm, cell, seq_id)) {
                        n_new[{ strm, seq_id }]++;
                    }
                }
            }
        }
    }

    bool has(uint32_t strm, uint32_t cell) {
        for (uint32_t seq_id = 0; seq_id < a.n_sequences(); ++seq_id) {
            if (!a.in_sequence(strm, cell, seq_id)) {
                continue;
            }
            const auto [it, is_first] = oldest.try_emplace({ strm, seq_id });
            if (is_first) {
                it->second = oldest_of(strm, seq_id);
            }
            if (place(a.position_of(strm, cell), cell) >= it->second) {
                return true;
            }
        }
        return false;
    }

private:
    const arena & a;

    using sequence = std::pair<uint32_t, uint32_t>; // stream, id
    std::map<sequence, uint32_t> n_new;
    std::map<sequence, place> oldest;

    place oldest_of(uint32_t strm, uint32_t seq_id) const {
        const auto & cells = a.cells_of(strm, seq_id);
        const auto found = n_new.find({ strm, seq_id });
        const size_t n = (size_t) a.tail() + (found == n_new.end() ? 0 : found->second);
        if (n == 0) {
            return { std::numeric_limits<llama_pos>::max(), 0 };
        }
        if (n >= cells.size()) {
            return { -1, 0 };
        }
        return *std::next(cells.rbegin(), n - 1);
    }
};

} // namespace

void new_cells(const cells_view & view) {
    if (view.a == nullptr || (view.a->tail() == 0 && !view.a->has_tail_cells())) {
        return;
    }
    arena & a = *view.a;

    if (a.has_tail_cells()) {
        newest kept(a, view);
        bool any = false;
        a.each_intact([&](uint32_t strm, uint32_t cell, int32_t row) {
            if (a.kind_of(row) != row_kind::tail) {
                return;
            }
            if (kept.has(strm, cell)) {
                any = true;
            } else {
                a.unmark(strm, cell);
            }
        });
        if (!any) {
            a.no_tail_cells();
        }
    }
    if (a.tail() == 0) {
        return;
    }

    uint32_t n = 0;
    for (const auto & cells : *view.idxs) {
        n += cells.size();
    }
    const std::vector<uint32_t> rows = a.take_rows(0, n);
    size_t i = 0;
    for (size_t s = 0; s < view.idxs->size(); ++s) {
        for (const uint32_t cell : (*view.idxs)[s]) {
            a.mark((*view.strm)[s], cell, rows[i++], row_kind::tail);
        }
    }
}

} // namespace intactkv
