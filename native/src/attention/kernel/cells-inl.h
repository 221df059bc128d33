// Where the rows of a tile's cells are: in the cache or, of intact cells, in the arena.
//
//   reads   call.k, call.v, tile.cell or tile.row
//   writes  mem.k_rows, mem.v_rows: offsets [cell, rounded up to W] from one base, of this tile and of the next
//
// Compiled once per instruction set, inside its anonymous namespace: see kernel-inl.h.

#pragma once

#include "attention/kernel/item-inl.h"
#include "attention/simd/blocks-inl.h"

namespace intactkv {
namespace {

// Finds the K or V rows of the tile's cells, and those of the next tile.
//
// The next tile's rows are prefetched one by one while this tile is computed: memory bounds decode, and the
// hardware's own prefetch stops at page ends and loses its way between heads and cells. In one burst the
// prefetches would fill the miss queue, and arithmetic would wait behind them.
inline void find_rows(const work & w, const fused_side & side, const tile & t, const tile & next, tile_rows & r) {
    const uint8_t * base = side.data + w.it.kv_head * side.nb_head + w.it.stream * side.nb_stream;
    const uint8_t * arena = (const uint8_t *) (side.arena ? side.arena + (size_t) w.it.kv_head * side.dim : nullptr);
    const size_t arena_row = side.arena_row * sizeof(uint16_t);
    const size_t arena_head = side.dim * sizeof(uint16_t);
    r.f16 = t.intact && arena;
    r.base = r.f16 ? arena : base;
    r.head = r.f16 ? arena_head : side.nb_head;
    for (int c = 0; c < t.n; c++) {
        r.offset[c] = r.f16 ? t.row[c] * arena_row : t.cell[c] * side.nb_cell;
    }
    for (int c = t.n; c < round_up(t.n, W); c++) { // lanes behind the last cell repeat it
        r.offset[c] = r.offset[t.n - 1];
        r.ahead[c] = 0;
    }
    int n_ahead = 0;
    const bool ahead_f16 = next.intact && arena;
    r.ahead_base = ahead_f16 ? arena : base;
    r.ahead_head = ahead_f16 ? arena_head : side.nb_head;
    if (next.n > 0) {
        n_ahead = next.n < t.n ? next.n : t.n;
        for (int c = 0; c < n_ahead; c++) {
            r.ahead[c] = ahead_f16 ? next.row[c] * arena_row : next.cell[c] * side.nb_cell;
        }
    } else if (w.it.next_cell >= 0) {
        n_ahead = w.call.n_kv - w.it.next_cell < t.n ? w.call.n_kv - w.it.next_cell : t.n;
        for (int c = 0; c < n_ahead; c++) {
            r.ahead[c] = (w.it.next_cell + c) * side.nb_cell;
        }
    }
    for (int c = n_ahead; c < t.n; c++) {
        r.ahead[c] = r.ahead[0];
    }
    if (n_ahead == 0) { // nothing to read ahead: ask for what is there
        r.ahead_base = r.base;
        r.ahead_head = r.head;
        memcpy(r.ahead, r.offset, sizeof(size_t) * t.n);
    }
}

// Pointers to the rows of a tile for one KV head, and to those that will be read later.
struct row_list {
    const uint8_t * here[FUSED_TILE];
    const uint8_t * later[FUSED_TILE];

    row_list(const tile_rows & from, int h, int n) {
        const uint8_t * base = from.base + h * from.head;
        const uint8_t * ahead = from.ahead_base + h * from.ahead_head;
        for (int c = 0; c < n; c++) {
            here[c] = base + from.offset[c];
            later[c] = ahead + from.ahead[c];
        }
    }

    // Into the second cache: the first is full of the tile in hand.
    void prefetch(int c, size_t offset) const { __builtin_prefetch(later[c] + offset, 0, 2); }
};

// Whether block b is where the next cache line is asked for: wherever a row begins, none is left out.
template <ggml_type T> inline bool new_line(int b) {
    return b % (64 / block<T>::bytes) == 0;
}

} // namespace
} // namespace intactkv
