#include "cells/tail.h"

#include "cells/arena.h"
#include "cells/graph.h"

#include "llama-impl.h"

#include <cerrno>
#include <cstdlib>
#include <exception>
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

// By stream, the cells that are among the newest of a sequence: as many of each as the tail has, besides the new ones.
static std::vector<std::vector<bool>> newest_cells(const arena & a, const cells_view & view) {
    std::map<std::pair<uint32_t, uint32_t>, size_t> n_new; // of stream, sequence
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

    std::vector<std::vector<bool>> res(a.n_streams(), std::vector<bool>(a.n_stream_cells()));
    for (uint32_t strm = 0; strm < res.size(); ++strm) {
        for (uint32_t seq_id = 0; seq_id < a.n_sequences(); ++seq_id) {
            const auto & cells = a.cells_of(strm, seq_id);
            if (cells.empty()) {
                continue;
            }
            const auto found = n_new.find({ strm, seq_id });
            size_t n = a.tail() + (found == n_new.end() ? 0 : found->second);
            for (auto it = cells.rbegin(); it != cells.rend() && n > 0; ++it, --n) {
                res[strm][it->second] = true;
            }
        }
    }
    return res;
}

void new_cells(const cells_view & view) {
    if (view.a == nullptr || view.borrower || (view.a->tail() == 0 && !view.a->has_tail_cells())) {
        return;
    }
    arena & a = *view.a;

    if (a.has_tail_cells()) {
        const auto newest = newest_cells(a, view);
        bool any = false;
        a.each_intact([&](uint32_t strm, uint32_t cell, int32_t row) {
            if (a.kind_of(row) != row_kind::tail) {
                return;
            }
            if (newest[strm][cell]) {
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
    std::vector<uint32_t> rows;
    try {
        rows = a.take_rows(0, n);
    } catch (const std::exception & err) {
        // only where sequences share cells and are shifted apart can it be that the rows reserved are not enough; the
        // batch goes on, its cells are ordinary
        LLAMA_LOG_WARN("%s: no tail from here on: %s\n", __func__, err.what());
        a.give_up_tail();
        return;
    }
    size_t i = 0;
    for (size_t s = 0; s < view.idxs->size(); ++s) {
        for (const uint32_t cell : (*view.idxs)[s]) {
            a.mark((*view.strm)[s], cell, rows[i++], row_kind::tail);
        }
    }
}

} // namespace intactkv
