#include "cells/state.h"

#include "attention/rows.h"
#include "cells/arena.h"
#include "cells/sharing.h"
#include "cells/sight.h"
#include "attention/store.h"

#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cells.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace intactkv {

state_writer::state_writer(const arena * a, uint32_t strm, const cell_ranges & ranges) :
    a(a) {
    if (a == nullptr || (a->empty() && !a->has_window())) {
        return;
    }
    uint32_t n = 0;
    for (const auto & range : ranges) {
        for (uint32_t i = range.first; i < range.second; ++i, ++n) {
            if (a->cells_in(strm).ext_get(i).in_sight) {
                sight.push_back(n);
            }
            if (const int32_t row = a->empty() ? -1 : a->row_of(strm, i); row >= 0) {
                which.push_back(n | (a->kind_of(row) == row_kind::tail ? STATE_TAIL : 0));
                rows.push_back(row);
            }
        }
    }
}

// u32 n, u32 position[n] (in the state's list of cells, or-ed with STATE_TAIL), then per layer K and V: u64 row size, n rows
// (row size 0: that side of the cache is exact)
void state_writer::finish_intact(llama_io_write_i & io) const {
    if (rows.empty()) {
        return;
    }
    const uint32_t n = which.size();
    io.write(&n, sizeof(n));
    io.write(which.data(), n * sizeof(uint32_t));

    std::vector<uint8_t> buf;
    for (const auto & layer : a->all_layers()) {
        for (const ggml_tensor * t : { layer.k, layer.v }) {
            const uint64_t row_size = t ? t->nb[1] : 0;
            io.write(&row_size, sizeof(row_size));
            if (t) {
                get_rows(t, rows, buf);
                io.write(buf.data(), buf.size());
            }
        }
    }
}

// Behind the intact cells: u32 n, u32 position[n] of those in sight
void state_writer::finish(llama_io_write_i & io) const {
    finish_intact(io);
    if (const uint32_t n = sight.size()) {
        io.write(&n, sizeof(n));
        io.write(sight.data(), n * sizeof(uint32_t));
    }
}

//
// state_reader
//

// none with all exponent bits set: an infinity, or not a number
static bool all_finite(const std::vector<ggml_fp16_t> & f16) {
    return std::none_of(f16.begin(), f16.end(), [](ggml_fp16_t x) { return (x & 0x7c00) == 0x7c00; });
}

state_reader::state_reader(arena * a, uint32_t strm, const std::vector<uint32_t> & cells, uint32_t & n_layer) :
    a(a),
    strm(strm),
    cells(cells),
    mixed(a && (n_layer & STATE_FLAG)),
    sight(a && a->has_window() && (n_layer & STATE_SIGHT)) {
    n_layer &= ~((mixed ? STATE_FLAG : 0) | (sight ? STATE_SIGHT : 0));
}

bool state_reader::read_rows(llama_io_read_i & io, int32_t type, int32_t il, bool is_v) {
    if (a == nullptr || a->v_transposed() || type != GGML_TYPE_F16) {
        return false;
    }
    ggml_tensor * dst = is_v ? a->stream_v(il, strm) : a->stream_k(il, strm);
    if (dst->type == GGML_TYPE_F16) {
        return false;
    }
    const int64_t ne0 = dst->ne[0];

    uint64_t row_size;
    io.read(&row_size, sizeof(row_size));
    if (row_size != ne0 * sizeof(ggml_fp16_t)) {
        throw std::runtime_error(format("F16 %s rows of layer %d have %zu bytes, this cache needs %zu",
                is_v ? "V" : "K", il, (size_t) row_size, (size_t) ne0 * sizeof(ggml_fp16_t)));
    }

    if (!is_exact(dst->type)) {
        if (!a->reads_intact()) {
            throw std::runtime_error(
                    format("INTACTKV_ATTN=stock cannot read F16 cells in a %s cache: unset it, or use an F16 cache",
                            ggml_type_name(dst->type)));
        }
        if (rows.empty()) {
            rows = a->take_rows(cells.size());
        }
    }

    const int32_t n_rot = is_v ? a->rotation().v : a->rotation().k;

    ggml_tensor * arena_rows = is_v ? a->layer(il).v : a->layer(il).k;

    std::vector<ggml_fp16_t> f16(ne0);
    std::vector<float> f32(ne0);
    const size_t out_size = ggml_row_size(dst->type, ne0);
    std::vector<uint8_t> exact(arena_rows ? cells.size() * row_size : 0);
    std::vector<uint8_t> out(cells.size() * out_size);

    for (size_t i = 0; i < cells.size(); ++i) {
        io.read(f16.data(), row_size);
        fused_widen(f16.data(), f32.data(), ne0);
        fused_rotate(f32.data(), ne0, n_rot);
        if (arena_rows) {
            fused_narrow(GGML_TYPE_F16, f32.data(), f16.data(), ne0);
            // a rotated pivot could leave the range of F16 (65504), an infinity would poison every later token
            if (!all_finite(f16)) {
                throw std::runtime_error(format("%s row %zu of layer %d is not finite in the basis of this cache: "
                                                "use an F16 cache",
                        is_v ? "V" : "K", i, il));
            }
            memcpy(exact.data() + i * row_size, f16.data(), row_size);
        }
        // a copy in the cache's own type, for whatever reads the tensors directly
        fused_narrow(dst->type, f32.data(), out.data() + i * out_size, ne0);
    }
    if (arena_rows) {
        set_rows(arena_rows, rows, exact.data());
    }
    set_rows(dst, cells, out.data());
    return true;
}

// Of one side of a layer, n rows; t: nullptr: the cache holds this side exactly, there are none.
static void read_side(llama_io_read_i & io, const ggml_tensor * t, uint32_t n, std::vector<uint8_t> & out) {
    uint64_t row_size;
    io.read(&row_size, sizeof(row_size));
    if (row_size != (t ? t->nb[1] : 0)) {
        throw std::runtime_error(format(
                "intact rows of the state have %zu bytes, this cache needs %zu", (size_t) row_size, t ? t->nb[1] : 0));
    }
    out.resize(n * row_size);
    io.read(out.data(), out.size());
}

state_reader::rows_data state_reader::read_rows_data(llama_io_read_i & io, uint32_t n) const {
    rows_data res;
    for (const auto & layer : a->all_layers()) {
        for (const ggml_tensor * t : { layer.k, layer.v }) {
            res.emplace_back();
            read_side(io, t, n, res.back());
        }
    }
    return res;
}

// The row that stays and has what row i of the state has, in all layers; -1: none.
int32_t state_reader::held_row(const rows_data & data, uint32_t n, uint32_t i, uint32_t cell) const {
    std::vector<uint8_t> buf;
    const auto same = [&](uint32_t row) {
        size_t side = 0;
        for (const auto & layer : a->all_layers()) {
            for (const ggml_tensor * t : { layer.k, layer.v }) {
                const std::vector<uint8_t> & rows = data[side++];
                buf.resize(t ? t->nb[1] : 0);
                if (t) {
                    ggml_backend_tensor_get(t, buf.data(), row * buf.size(), buf.size());
                }
                if (memcmp(buf.data(), rows.data() + i * (rows.size() / n), buf.size()) != 0) {
                    return false;
                }
            }
        }
        return true;
    };
    const auto & there = a->held_at(a->cells_in(strm).pos_get(cells[cell]));
    const auto found = std::find_if(there.begin(), there.end(), same);
    return found == there.end() ? -1 : (int32_t) *found;
}

// u32 n, u32 position[n] in the state's list of cells, ascending but for a flag
std::vector<uint32_t> state_reader::read_list(llama_io_read_i & io, uint32_t flag) const {
    uint32_t n;
    io.read(&n, sizeof(n));
    if (n == 0 || n > cells.size()) {
        throw std::runtime_error(format("the state has %u marked cells of %zu", n, cells.size()));
    }
    std::vector<uint32_t> which(n);
    io.read(which.data(), n * sizeof(uint32_t));
    for (uint32_t i = 0; i < n; ++i) {
        const uint32_t at = which[i] & ~flag;
        if (at >= cells.size() || (i > 0 && at <= (which[i - 1] & ~flag))) {
            throw std::runtime_error(format("marked cell %u of the state is number %u of %zu", i, at, cells.size()));
        }
    }
    return which;
}

void state_reader::finish(llama_io_read_i & io) {
    finish_intact(io);
    if (a) {
        a->forget_tokens(strm, cells);
    }
    if (sight) {
        for (const uint32_t i : read_list(io, 0)) {
            keep_in_sight(*a, strm, cells[i]);
        }
    }
    if (a && a->holds_rows()) { // when all is known of the cells: some are given up for others'
        a->note_restored(strm, cells);
        share_cells(*a, strm, cells);
    }
}

void state_reader::finish_intact(llama_io_read_i & io) {
    if (!mixed) {
        for (size_t i = 0; i < rows.size(); ++i) {
            a->mark(strm, cells[i], rows[i], row_kind::kept);
        }
        return;
    }

    std::vector<uint32_t> which = read_list(io, STATE_TAIL);
    const uint32_t n = which.size();
    std::vector<row_kind> kinds(n);
    uint32_t n_tail = 0;
    for (uint32_t i = 0; i < n; ++i) {
        kinds[i] = which[i] & STATE_TAIL ? row_kind::tail : row_kind::kept;
        n_tail += kinds[i] == row_kind::tail;
        which[i] &= ~STATE_TAIL;
    }
    if (!a->reads_intact()) {
        throw std::runtime_error("INTACTKV_ATTN=stock cannot read a state with intact cells: unset it");
    }

    rows_data data;
    std::vector<int32_t> row_of(n, -1);
    uint32_t n_own = n - n_tail;
    if (a->holds_rows()) { // a row that is there already is not taken once more
        data = read_rows_data(io, n);
        for (uint32_t i = 0; i < n; ++i) {
            if (kinds[i] == row_kind::kept) {
                row_of[i] = held_row(data, n, i, which[i]);
                n_own -= row_of[i] >= 0;
            }
        }
    }
    rows = a->take_rows(n_own, n_tail);
    std::vector<uint32_t> own; // of the state, those that have a row of their own
    for (uint32_t i = 0, next = 0; i < n; ++i) {
        if (row_of[i] < 0) {
            own.push_back(i);
            row_of[i] = rows[next++];
        }
    }

    std::vector<uint8_t> buf;
    size_t side = 0;
    for (const auto & layer : a->all_layers()) {
        for (ggml_tensor * t : { layer.k, layer.v }) {
            if (data.empty()) {
                read_side(io, t, n, buf);
            } else {
                buf.swap(data[side++]);
            }
            if (t) {
                const size_t row_size = t->nb[1];
                for (size_t k = 0; k < own.size(); ++k) { // ascending: those to be written come together
                    memmove(buf.data() + k * row_size, buf.data() + own[k] * row_size, row_size);
                }
                set_rows(t, rows, buf.data());
            }
        }
    }

    for (uint32_t i = 0; i < n; ++i) {
        if (a->is_held(row_of[i])) {
            a->mark_held(strm, cells[which[i]], row_of[i]);
        } else {
            a->mark(strm, cells[which[i]], row_of[i], kinds[i]);
        }
    }
}

} // namespace intactkv
