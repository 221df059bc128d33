// Attention of one item: a block of query rows, a few KV heads, a range of cells. The same source for every
// instruction set.
//
// Rows of an item are ordered by query head, then token: row = head*tokens + token. Two layouts:
//   narrow (few rows: decode)     scores [row][cell], cells in lanes; V is expanded in registers
//   wide   (many rows: prefill)   scores [cell][row], rows in lanes; K and V are expanded once per tile
// Cells that no query of the item sees are left out of the tiles, so a masked tile, a sliding window or the cells of
// other sequences cost only the look at the mask.

#pragma once

#include "attention/kernel/cells-inl.h"
#include "attention/kernel/item-inl.h"
#include "attention/kernel/mask-inl.h"
#include "attention/kernel/output-inl.h"
#include "attention/kernel/queries-inl.h"
#include "attention/kernel/scores-inl.h"
#include "attention/kernel/softmax-inl.h"
#include "attention/kernel/values-inl.h"
#include "attention/lanes/rows-inl.h"

namespace intactkv {
namespace {

// Everything that a tile contributes. The rows of the next one are read ahead meanwhile.
inline void process(const work & w, tile & t, const tile & next) {
    if (t.n == 0) {
        return;
    }
    if (t.masked && w.call.mask_heads == 1) {
        load_mask(w, t, 0);
    }
    find_rows(w, w.call.k, t, next, w.mem.k_rows);
    find_rows(w, w.call.v, t, next, w.mem.v_rows);
    for (int h = 0; h < w.it.kv_heads; h++) {
        scores(w, t, h);
        if (t.masked) {
            add_mask(w, t, w.it.kv_head + h);
        }
        w.it.wide ? wide_softmax(w, t.n) : narrow_softmax(w, t.n, h * w.it.rows);
        accumulate(w, t, h);
    }
    t.n = 0;
    t.masked = false;
}

// A full tile: the one before it is computed.
inline void push(const work & w, tile * pair) {
    process(w, pair[1], pair[0]);
    pair[1] = pair[0];
    pair[0].n = 0;
    pair[0].masked = false;
}

inline void add(const work & w, tile * pair, int cell, int row, bool masked) {
    tile * t = pair;
    t->cell[t->n] = cell;
    t->row[t->n]  = row;
    t->n++;
    t->masked |= masked;
    if (t->n == w.cells_max) {
        push(w, pair);
    }
}

// The usual case, without a branch per cell: n cells, all seen and ordinary, for an empty tile.
inline bool add_all(const work & w, int cell, int n, const uint16_t * live, const int32_t * arena_rows, bool masked) {
    if (n != FUSED_TILE || w.cells_max != FUSED_TILE || w.mem.ordinary[0].n != 0) {
        return false;
    }
    uint16_t all = 1;
    int32_t  row = -1;
    for (int i = 0; i < FUSED_TILE; i++) {
        all &= live[i];
    }
    for (int i = 0; arena_rows && i < FUSED_TILE; i++) {
        row = arena_rows[cell + i] > row ? arena_rows[cell + i] : row;
    }
    if (!all || row >= 0) {
        return false;
    }
    tile & t = w.mem.ordinary[0];
    for (int i = 0; i < FUSED_TILE; i++) {
        t.cell[i] = cell + i;
    }
    t.n      = FUSED_TILE;
    t.masked = masked;
    push(w, w.mem.ordinary);
    return true;
}

inline void run_item(const work & w) {
    load_queries(w);
    memset(w.mem.acc, 0, sizeof(float) * w.it.kv_heads * w.it.rows * w.dim_v);
    for (int r = 0; r < FUSED_ROWS_MAX; r++) {
        w.mem.max[r] = -__builtin_inff();
        w.mem.sum[r] = 0.0f;
    }
    for (int i = 0; i < 2; i++) {
        w.mem.ordinary[i].n      = w.mem.intact[i].n      = 0;
        w.mem.ordinary[i].masked = w.mem.intact[i].masked = false;
        w.mem.ordinary[i].intact = false;
        w.mem.intact[i].intact   = true;
    }

    const int32_t * arena_rows = w.call.row_of_cell ? w.call.row_of_cell + (size_t) w.it.stream * w.call.n_kv : nullptr;
    for (int c = w.it.cell; c < w.it.cell + w.it.cells; c += FUSED_TILE) {
        const int n = w.it.cell + w.it.cells - c < FUSED_TILE ? w.it.cell + w.it.cells - c : FUSED_TILE;
        uint16_t live[FUSED_TILE];
        const bool masked = look(w, c, n, live);
        if (add_all(w, c, n, live, arena_rows, masked)) {
            continue;
        }
        for (int i = 0; i < n; i++) {
            if (live[i]) {
                const bool intact = arena_rows && arena_rows[c + i] >= 0;
                add(w, intact ? w.mem.intact : w.mem.ordinary, c + i, intact ? arena_rows[c + i] : -1, masked);
            }
        }
    }
    const tile none{};
    process(w, w.mem.intact[1], w.mem.intact[0]);
    process(w, w.mem.intact[0], w.mem.ordinary[1]);
    process(w, w.mem.ordinary[1], w.mem.ordinary[0]);
    process(w, w.mem.ordinary[0], none);
    write(w);
}

// This thread's share of the items.
void run(const fused_call & call, int ith, int nth) {
    const auto next = [&](int i) {
        return call.next_item ? __atomic_fetch_add(call.next_item, 1, __ATOMIC_RELAXED) : i + nth;
    };
    scratch mem;
    for (int i = call.next_item ? next(0) : ith; i < call.plan.n_item; i = next(i)) {
        const item it = make_item(call, i, nth);
        run_item({ call, it, mem });
    }
}

} // namespace

const fused_target INTACTKV_TARGET = { INTACTKV_NAME, run, rotate, widen, narrow };

} // namespace intactkv
