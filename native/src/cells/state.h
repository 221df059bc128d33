// Intact cells, and cells in sight, in a saved state. A sequence that has some is written as upstream writes it, its n_layer
// marked by STATE_FLAG or STATE_SIGHT (so that stock llama.cpp refuses it), followed by the intact rows, then by which cells
// stay in sight.

#pragma once

#include "ggml.h"

#include <cstdint>
#include <utility>
#include <vector>

class llama_io_read_i;
class llama_io_write_i;

namespace intactkv {

class arena;

constexpr uint32_t STATE_FLAG = 0x80000000u;
constexpr uint32_t STATE_SIGHT = 0x40000000u;
constexpr uint32_t STATE_TAIL = 0x80000000u; // of the position of a cell that is intact for being new

using cell_ranges = std::vector<std::pair<uint32_t, uint32_t>>; // cells, from inclusive, to exclusive

// Writes what a KV state of one stream has more than upstream's: the flags, and their sections.
class state_writer {
public:
    // a: nullptr for a cache that can have no intact cells; ranges: the state's cells
    state_writer(const arena * a, uint32_t strm, const cell_ranges & ranges);

    // or-ed into n_layer
    uint32_t flag() const { return (rows.empty() ? 0 : STATE_FLAG) | (sight.empty() ? 0 : STATE_SIGHT); }

    void finish(llama_io_write_i & io) const;

private:
    const arena * a;

    // the intact cells: their positions in the state's list of cells, or-ed with STATE_TAIL, and their rows
    std::vector<uint32_t> which;
    std::vector<int32_t> rows;

    std::vector<uint32_t> sight; // those in sight, by position in the list

    void finish_intact(llama_io_write_i & io) const;
};

// Reads a KV state into one stream: F16 rows into a quantized cache, and the sections that state_writer appended.
// All failures throw std::runtime_error; nothing is marked before finish().
class state_reader {
public:
    // a: nullptr for a cache that can have no intact cells; cells: where the i-th cell of the state goes
    // n_layer: as read from the state; the flags are taken off
    state_reader(arena * a, uint32_t strm, const std::vector<uint32_t> & cells, uint32_t & n_layer);

    // Reads one layer's K (or V) rows, which are of this type in the state; io stands before the row size. false: the
    // cache is of this type or has no place for them, upstream goes on
    bool read_rows(llama_io_read_i & io, int32_t type, int32_t il, bool is_v);

    void finish(llama_io_read_i & io);

private:
    arena * a;
    const uint32_t strm;
    const std::vector<uint32_t> & cells;
    const bool mixed; // state_writer has flagged it
    const bool sight; // this too

    using rows_data = std::vector<std::vector<uint8_t>>; // by layer, K and V: n rows

    rows_data read_rows_data(llama_io_read_i & io, uint32_t n) const;
    int32_t held_row(const rows_data & data, uint32_t n, uint32_t i, uint32_t cell) const;

    std::vector<uint32_t> rows; // [cells.size()], taken by the first read_rows() that needs them

    void finish_intact(llama_io_read_i & io);
    std::vector<uint32_t> read_list(llama_io_read_i & io, uint32_t flag) const;
};

} // namespace intactkv
