// Intact cells in a saved state. A sequence that has some is written as upstream writes it, its n_layer marked by
// STATE_FLAG (so that stock llama.cpp refuses it), followed by the intact rows.

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

using cell_ranges = std::vector<std::pair<uint32_t, uint32_t>>; // cells, from inclusive, to exclusive

bool has_intact(const arena & a, uint32_t strm, const cell_ranges & ranges);
void write_state(const arena & a, llama_io_write_i & io, uint32_t strm, const cell_ranges & ranges);

// Reads a KV state into one stream: F16 rows into a quantized cache, and the section write_state() appended.
// All failures throw std::runtime_error; nothing is marked before finish().
class state_reader {
public:
    // a: nullptr for a cache that has no intact cells; cells: where the i-th cell of the state goes
    // n_layer: as read from the state; the flag is taken off
    state_reader(arena * a, uint32_t strm, const std::vector<uint32_t> & cells, uint32_t & n_layer);

    // true if rows of this type, for this tensor of the cache, are read by read_rows() instead of by upstream
    bool takes(int32_t type, const ggml_tensor * t) const;

    // one layer's K (or V) rows; io stands before the row size
    void read_rows(llama_io_read_i & io, int32_t il, bool is_v);

    void finish(llama_io_read_i & io);

private:
    arena * a;
    const uint32_t strm;
    const std::vector<uint32_t> & cells;
    const bool mixed; // written by write_state()

    std::vector<uint32_t> rows; // [cells.size()], taken by the first read_rows() that needs them
};

} // namespace intactkv
