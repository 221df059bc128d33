// Attention of one item of a call. The same source for every instruction set; this file includes the others.
//
// WHAT IS COMPUTED. For every query row, which is one token of one query head of one stream, over the cells c it sees:
//
//     s[c] = scale * (q . K[c]) + slope * mask[c], with a softcap softcap * tanh(scale * (q . K[c]) / softcap) + ...
//     out  = sum over c of e^s[c] * V[c] / (sum over c of e^s[c], plus e^sink)
//
//     q      F32 [n_stream][n_tokens][n_head][dim_k]
//     K, V   a KV type [n_stream][n_kv][n_head_kv][dim_k, dim_v]; of intact cells F16 in the arena
//            [row][n_head_kv][dim]
//     mask   F16 [n_stream or 1][n_head or 1][n_tokens][n_kv], or none
//     sinks  F32 [n_head], or none
//     out    F32 [n_stream][n_tokens][n_head][dim_v]
//
// HOW A CALL IS CUT. fused_make_plan() (call.cpp) cuts it into items, which threads take in turn. An item is a block of
// query rows (some query heads that share a KV head, times some tokens), one KV head or a few, and a chunk of the
// cells. If there are several chunks, items write partial results, and a second node merges them (attention.cpp). How a
// call is cut depends on its shape only: any number of threads gives the same bits.
//
// An item walks through its cells 64 at a time (run_item()). look() reads the mask of all its tokens first. Cells that
// none of them sees go into no tile: a masked tile, a sliding window or other sequences' cells cost that look and no
// more. The others are collected in two tiles, intact cells and ordinary ones, as a tile is read in one type. A full
// tile waits until the next of its kind is full: whose rows are then known, and are read ahead while the first is
// computed.
//
// A TILE (process()) is n <= cells_max cells: 64 up to head size 128, 32 at 256, 16 at 512; of latents, whose
// V is the first values of K's rows, 32 at 576 and 48 at 320. Per KV head:
//
//     step         file       reads                          writes
//     find_rows    cells-     the call                       where K and V of the cells are; once for all KV heads
//     scores       scores-    q or q8, K                     s, as exponents of 2
//     add_mask     mask-      mask [token][cell]             s; only if some value of the mask is not 0
//     softmax      softmax-   s, max, sum                    s, now weights; max, sum, beta
//     accumulate   values-    s, beta, V                     acc = beta * acc + s . V
//
// Before the first tile load_queries() (queries-) fills q and q8; after the last, write() (output-) empties acc. All
// but K, V and the mask is in a thread's scratch of 0.36 MB (item-inl.h), for the second cache.
//
// NARROW AND WIDE. Two layouts, chosen per item (make_item()):
//
//     narrow  up to NARROW_MAX rows per KV head, NARROW_MAX_QUANT if K and V are quantized: decode, a few sequences,
//             short batches; with F16 on x86 also any batch with head sizes above 192, where FUSED_FLOATS allows 48
//             rows at most. Scores [row][cell]. Quantized K is
//             transposed so that a lane is a cell: for up to SCORE_ROWS rows in registers, as it is used, else into k8
//             once for all rows. With F16 and BF16 K a lane is a value, 4 cells at a time. V is expanded in registers,
//             VALUE_ROWS rows at a time.
//     wide    more rows: prefill. One KV head. Scores [cell][row], rows in lanes. K and V are expanded once per tile,
//             to bytes, 16-bit pairs of cells or floats, and meet the rows in register-blocked products
//             (simd/gemm-inl.h).
//
// MEMORY TRAFFIC. An item reads K and V of the cells it sees once for all its rows. Bytes per value: F16 and BF16 2,
// Q8_0 34/32, Q5_1 24/32, Q5_0 22/32, Q4_1 20/32, Q4_0 and IQ4_NL 18/32. For one token that is, per layer,
//
//     n_kv * n_head_kv * (dim_k * bytes(K) + dim_v * bytes(V))
//
// e.g. with 3 KV heads of 64: 768 bytes a cell with F16, 408 with Q8_0, 288 with Q5_1, 216 with Q4_0. Beside it, all
// small: the mask, 2 bytes per cell and token for each item that looks; q, 4 * dim_k a row; partial results, 4 * (2 +
// dim_v) a row and chunk. A batch reads K and V once per block of tokens, tokens / plan.tokens times in all; there
// arithmetic bounds it. docs/speed.md says how close decode comes to what the memory can give.
//
// PRECISION. What is rounded; all else is F32 (FMA where the target has it), and integer sums are exact:
//
//     q, for a quantized K        to 8 bits of the largest of each 32 values, after its rotation; as upstream does
//     q, for F16, BF16, intact    not at all; these K are widened exactly
//     2^x                         by a polynomial, below 2e-7 of the result (exp2_neg())
//     weights, for a quantized V  times the block's scale, to 16 bits of the largest such product of a row in the tile;
//                                 but not in wide items without x86's instructions, where V is expanded to floats
//     weights, for F16, BF16 V    not at all; these V are widened exactly
//
// Earlier results are scaled by 2^(old maximum - new maximum) when a larger score comes; merged chunks too.
//
// CONSTANTS. How to try another value of one: change it in a second checkout, and run in the first
//
//     python -m benchmarks.attention --against SECOND --threads 1 --seconds 0.6
//         [--shapes ...] [--types ...] [--depths ...] [--tokens ...]
//
// So these were measured, on one core of an AMD EPYC (Zen 4, AVX-512 VNNI) that others used too. "x 0.91": with the
// other value the kernel is 0.91 times as fast, median of 9 rounds. SmolLM2-135M's shape unless another is named. "By
// CPU time": the thread's own, both kernels in turn in one process; AVX2 means that target on the same machine.
//
//     FUSED_TILE 64       cells of a tile. 32: x 0.91 (q8_0, 1 token at 2048), 0.76 (16 tokens), 0.91 (128 at 512)
//     TILE_FLOATS 8192    K or V of a tile in floats, 32 KB. 4096: x 0.83 (7B class q8_0, 128 tokens at 512), 0.82
//                         (Gemma q8_0, 16 tokens), 1.00 (Gemma f16, 1 token), 1.08 (7B class q8_0, 1 token at 2048; it
//                         varied)
//     FUSED_ROWS_MAX 96   rows of a block: whole vectors, whole register blocks. 64: x 0.99 (q8_0, 128 tokens at 512),
//                         1.00 (f16), 1.09 (7B class q4_0). 128, with FUSED_FLOATS 16384: x 0.93, 1.01, 0.89
//     FUSED_FLOATS 12288  96 rows of head size 128, see FUSED_ROWS_MAX
//     FUSED_HEAD_MAX 512  a choice, not measured
//     of latents          by CPU time, VNNI, at 2048, 1 and 32 tokens. FUSED_FLOATS_LATENT 9216: x 0.87 to 0.96 (q8_0), 1.00
//                         (f16); 27648: x 0.92 to 1.09 (q8_0), 1.00 (f16). TILE_FLOATS_LATENT 9216: x 0.83 to 1.01
//                         (q8_0), 0.92 (f16). NARROW_MAX_QUANT 8: x 1.02 to 1.20 with 16 rows; NARROW_MAX 8: x 0.8 (f16)
//     NARROW_MAX 48       set when the narrow kernels had become faster (95e50df; measured with AVX2 and AVX-512, how
//                         is not recorded). 12, f16: x 0.95 (16 tokens at 2048), 0.81 (5 tokens, AVX2), 0.96 (16
//                         tokens, AVX2). 96: x 0.95 (f16, 128 tokens at 512). 5 with vectors of 4: not measured
//     NARROW_MAX_QUANT    by CPU time, at 2048. 12 with AVX2. 48: x 0.77 (q8_0, 16 tokens), 0.82 (8), 0.86 (5); 0.69
//                         (q4_0, 16 tokens), 0.63 (q5_1); 0.86 (7B class q8_0, 8 tokens), 0.92 (4), 1.01 (5). 16: x
//                         0.86 (q8_0, 5 tokens), 1.01 (7B class, 5 tokens), 0.96 (4). 0: x 0.95 (q8_0, 3 tokens).
//                         24 with AVX-512, whose rows are padded to 16. 48 with VNNI: x 0.85 (q8_0, 16 tokens), 0.78
//                         (q4_0), 0.88 (7B class q4_0, 8 tokens), 0.81 (Gemma q8_0, 128 tokens), 0.74 (Gemma q4_0).
//                         12 with VNNI: x 0.96 (q8_0, 8 tokens), 1.05 (q4_0), 0.78 (7B class q8_0, 5 tokens); without
//                         VNNI x 0.93, 1.02, 0.73. 5 with vectors of 4: not measured
//     SCORE_ROWS 8        as accumulators and transposed vectors fit 32 registers. 1: x 1.01 (q8_0, 1 token at 2048),
//                         0.92 (q4_0), 0.91 (7B class q8_0), 0.92 (q8_0, 2 tokens). 4 with fewer lanes: not measured
//     VALUE_ROWS 4        2: x 0.91 (q8_0, 4 tokens at 2048), 0.85 (q4_0), 0.92 (f16). 2 with 16 registers: not
//                         measured
//     VALUE_COLS 64       32: x 0.92 (f16, 1 token at 2048), 0.94 (4 tokens), 0.96 (7B class f16). 32 elsewhere: not
//                         measured
//     read ahead          one tile, to the second cache (row_list::prefetch()). None: x 0.45 (q8_0, 1 token at 8192),
//                         0.45 (f16), 0.66 (q4_0), 0.26 (7B class q8_0). To the first: x 0.60, 0.61 (f16), 0.34 (7B
//                         class q8_0). Other distances: not measured
//     read ahead, wide    the same. None, by CPU time, 128 tokens at 2048: AVX2 x 1.00 (q8_0), 0.96 (7B class q8_0), 0.95
//                         (7B class f16), 0.95 (MHA q8_0), 1.02 (MHA f16; it varied); VNNI 1.00, 0.96, 0.96, 0.93, 0.98
//     read ahead, mask    one tile (look()). None: x 0.99 (q8_0, 128 tokens at 512 and at 4096), no more than the noise
//     MB, VB              gemm-inl.h: as many accumulators as there are registers for. AVX2, by CPU time, 128 tokens at
//                         2048, q8_0: MB_I, VB_I 2, 4. 2, 2: x 0.95; 4, 2: x 0.98; 2, 3: 1.00, but 1.02 with 16
//                         tokens; 2, 6: 0.94; 1, 6: 0.92. pair_gemm() 3 rows. 2: x 0.98; 4: x 0.95. All others: a
//                         choice, not measured
//     settle()            sums of integers are computed where they stand. Not: x 0.84 (AVX2: q8_0, 128 tokens at 2048,
//                         both with blocks of 2, 2 and 2 rows): GCC kept a block's products on the stack. Without VNNI
//                         on AVX-512, 32 registers: no difference
//     of the plan         call.cpp; SHARE_FROM: attention.cpp
//
// INSTRUCTION SETS. Each file of targets/ is one translation unit: it includes all headers from outside
// (before_pragma.h), then names its instruction set to the compiler, then includes this file. What is compiled in
// between is in an anonymous namespace: no function of one target can be taken for another's. The suffix -inl.h says
// that a file is compiled so. Each includes what it needs, in any order; for that a #pragma once will do, as no
// translation unit has two targets.

#pragma once

#include "attention/kernel/cells-inl.h"
#include "attention/kernel/item-inl.h"
#include "attention/kernel/mask-inl.h"
#include "attention/kernel/output-inl.h"
#include "attention/kernel/queries-inl.h"
#include "attention/kernel/scores-inl.h"
#include "attention/kernel/softmax-inl.h"
#include "attention/kernel/values-inl.h"
#include "attention/simd/rows-inl.h"

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
    t->row[t->n] = row;
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
    int32_t row = -1;
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
    t.n = FUSED_TILE;
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
        w.mem.ordinary[i].n = w.mem.intact[i].n = 0;
        w.mem.ordinary[i].masked = w.mem.intact[i].masked = false;
        w.mem.ordinary[i].intact = false;
        w.mem.intact[i].intact = true;
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
    scratch & mem = *(scratch *) fused_scratch(sizeof(scratch));
    for (int i = call.next_item ? next(0) : ith; i < call.plan.n_item; i = next(i)) {
        const item it = make_item(call, i, nth);
        run_item({ call, it, mem });
    }
}

} // namespace

const fused_target INTACTKV_TARGET = { INTACTKV_NAME, run, rotate, widen, narrow };

} // namespace intactkv
