// Cells in sight: a sliding window hides them from no later token of their sequences, however far. Such are the cells of a
// trained first token whose file says so; stock llama.cpp, which loads the file too, lets them leave its windows.
//
// A cell's mark is `llama_kv_cell_ext::in_sight`, beside that of an intact cell and reset and copied with it. Only caches of
// a sliding window have marked cells: there upstream hides, gives away, purges and leaves out of a saved state what has left
// the window, and asks for the mark in each of these places.

#pragma once

#include "llama.h"

#include <cstdint>
#include <string>

struct llama_context;
class llama_kv_cells;

namespace intactkv {

class arena;
struct prefix_view;

// A sequence's smallest position from which on it has all: cells in sight that stand alone before a gap do not count, for
// no token can be evaluated again right behind them. -1: the sequence is empty
llama_pos seq_pos_min(const llama_kv_cells & cells, int32_t seq_id);

// The position of a sequence's first cell that is not in sight; the highest of all positions: there is none
llama_pos first_that_leaves(const llama_kv_cells & cells, int32_t seq_id);

void keep_in_sight(const arena & a, uint32_t strm, uint32_t cell);

// All that a sequence has in the caches of sliding windows, if so
void keep_in_sight(const llama_context * ctx, int32_t seq_id, bool in_sight);

// Whether a sequence (-1: any) has such a cell
bool any_in_sight(const llama_context * ctx, int32_t seq_id);

// Cells that never leave take room from the windows: "", or why a prefix that stays in sight has none in this context
std::string no_room_in_sight(const llama_context * ctx, const prefix_view & view);

} // namespace intactkv
