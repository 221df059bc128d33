// The tail: the newest cells of each sequence are intact. In a 4-bit cache it is their rounding that does most
// of the harm (docs/results/tail.md).
//
// A new cell is written both ways, rounded into its place and at F16 into a row of the arena, and loses its mark when as
// many newer ones exist. So no cell is ever rounded anew, none moves, and rows go round: those of cells that lost their
// marks are the next ones to be written.
//
// The tokens of a ubatch see each other at F16, also where the ubatch is longer than the tail; the marks that are too
// many are taken off when the next ubatch comes.

#pragma once

#include "ggml.h"

#include <cstdint>

namespace intactkv {

struct cells_view;

// Cells of a tail where nothing else was asked for: 128 if K or V has less than 8 bits a value, else 0. How much closer
// to an F16 cache that is: docs/results/tail.md
int32_t default_tail(ggml_type type_k, ggml_type type_v);

// INTACTKV_TAIL, -1 if it is not set. Throws std::runtime_error if it is no number of cells
int32_t tail_asked();

// The cells of view.idxs have been given to new tokens: marks them, and takes the marks of those off that are no longer
// among the newest of any of their sequences. Before the graph is built, or its inputs set
void new_cells(const cells_view & view);

} // namespace intactkv
