// A prefix that a context holds: its rows once, for all sequences.
//
// Rows for a quantized side of a cache are in the arena, in rows that stay; those for an F16 or F32 side are kept in
// memory as the file has them. A cell that has such a row is marked with its number, in a cache of exact cells too: so the
// cells themselves say what they are, whatever was done to them meanwhile.

#pragma once

#include "llama.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace intactkv {

class arena;
struct prefix_view;

// One cache's part. Its items: tokens first..n_tokens-1, as far as a sliding window has not left them behind, then the
// extra cells, which are there where token 0 is.
class held_rows {
public:
    held_rows(arena & a, uint32_t n_tokens) :
        a(&a),
        n_tokens(n_tokens) {}

    // state: this cache's section of a verified prefix file, moved behind it. Throws std::runtime_error
    void read(const uint8_t *& state);
    void release();

    uint32_t first_token() const { return first; }
    uint32_t n_extra() const { return numbers.size() - (n_tokens - first); }

    // the number of a token's row, of an extra cell's
    int32_t row(uint32_t token) const { return numbers[token - first]; }
    int32_t extra_row(uint32_t i) const { return numbers[n_tokens - first + i]; }

    // Writes rows into cells of a stream and marks these. rows: of row() and extra_row()
    void write(uint32_t strm, const std::vector<uint32_t> & cells, const std::vector<int32_t> & rows) const;

    // whether a cell of exact types has this row
    bool is_in(uint32_t strm, uint32_t cell, int32_t row) const;

    size_t n_bytes() const; // beside the arena's

    arena & of() const { return *a; }

    bool in_sight = false; // in a cache of a sliding window, its cells stay so (cells/sight.h)

private:
    arena * a;
    uint32_t n_tokens;
    uint32_t first = 0;
    std::vector<uint32_t> numbers; // by item, ascending

    // by layer of the cache, K and V: F16 rows by item, empty where the arena has them
    std::vector<std::vector<uint8_t>> exact_k, exact_v;

    size_t item_of(int32_t row) const;
    void take(ggml_tensor * arena_rows, std::vector<uint8_t> & exact, const ggml_tensor * cache, int32_t n_rot,
            const uint8_t * data, const std::vector<size_t> & items, uint32_t il, const char * side);
    void write_side(ggml_tensor * cells, const ggml_tensor * arena_rows, const std::vector<uint8_t> & exact,
            const std::vector<uint32_t> & to, const std::vector<int32_t> & rows) const;
};

struct held_prefix {
    std::string name;
    std::vector<llama_token> tokens;
    uint64_t hash = 0; // of the tokens
    uint32_t n_extra = 0;
    bool whole = false;            // trained together: of use to sequences that have all its tokens
    std::vector<held_rows> caches; // in the order of a saved state

    // What upstream writes for the recurrent layers' states, which are those behind the last token. Where there are any, a
    // sequence is given all of the prefix or nothing
    std::vector<uint8_t> states;

    bool whole_only() const { return !states.empty(); }

    // Whether the cells of the tokens before pos are enough for a token at pos: a sliding window that has left some of
    // them behind at the prefix's end has not done so in its middle
    bool serves(uint32_t pos) const;
};

// view: of a verified file. Throws std::runtime_error
held_prefix hold(const llama_context * ctx, const prefix_view & view, const std::string & name);

} // namespace intactkv
