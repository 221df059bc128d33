// Cells that several sequences of one stream have: prefixes that a context holds (automatic/) take the cells of one.

#pragma once

#include "llama.h"

#include <cstdint>
#include <vector>

namespace intactkv {

class arena;

// Free cells for a sequence's new tokens at these positions, marked as theirs. Nothing is written into them. Empty: there
// is no room, and nothing has changed
std::vector<uint32_t> place(const arena & a, int32_t seq_id, const std::vector<llama_pos> & positions,
        const std::vector<llama_token> & tokens);

// Of these cells of a stream, those that have a held row which another cell of it has too become free: their sequences
// share the other. Not in the cache of a sliding window, where a shared cell is not free again when it is out of sight.
void share_cells(const arena & a, uint32_t strm, const std::vector<uint32_t> & among);

// The position of a sequence's cells in [p0, p1) is about to change. Those of a held prefix that other sequences have too
// stay theirs, and the sequence gets copies: upstream would move them for all. p0, p1 as in llama_memory_seq_add().
// a: nullptr for a cache that can have no intact cells
void before_move(arena * a, int32_t seq_id, llama_pos p0, llama_pos p1);

} // namespace intactkv
