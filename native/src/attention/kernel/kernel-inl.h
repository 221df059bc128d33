// Attention of one item: a block of query rows, a few KV heads, a range of cells. The same source for every
// instruction set.
//
// Rows of an item are ordered by query head, then token: row = head*tokens + token. Two layouts:
//   narrow (few rows: decode)     scores [row][cell], cells in lanes; V is expanded in registers
//   wide   (many rows: prefill)   scores [cell][row], rows in lanes; K and V are expanded once per tile
// Cells that no query of the item sees are left out of the tiles, so a masked tile, a sliding window or the cells of
// other sequences cost only the look at the mask.

constexpr int      TILE_FLOATS  = 8192;                    // cells x head size of a tile
constexpr uint16_t F16_NEG_INF  = 0xfc00;
constexpr int      NARROW_MAX   = W >= 8 ? 48 : 5;         // rows that are computed narrow; measured, but for NEON
constexpr int      SCORE_ROWS   = W >= 16 ? 8 : 4;         // rows up to which quantized K stays in registers
constexpr int      VALUE_ROWS   = INTACTKV_X86 >= 3 ? 4 : 2; // rows that share an expansion of V in registers
constexpr int      VALUE_COLS   = W >= 16 ? 64 : 32;       // columns of V that do so, for F16 and BF16

// Cells that are processed together: all intact or all ordinary.
struct tile {
    int     n = 0;
    bool    intact = false;
    bool    masked = false; // some mask value may not be 0
    int32_t cell[FUSED_TILE];
    int32_t row[FUSED_TILE]; // of the arena
};

struct item {
    int  stream, head, heads, token, tokens, kv_head, kv_heads, cell, cells;
    int  next_cell; // where this thread will read on, most likely; -1: not in this cache
    int  rows;     // per KV head
    int  rows_pad; // wide: rows, rounded up to W
    bool wide;
};

// Where the rows of a tile's cells are, for the first KV head of the item.
struct rows {
    bool            f16; // rows of the arena
    const uint8_t * base;
    const uint8_t * ahead_base;
    size_t          head; // bytes from one KV head to the next
    size_t          ahead_head;
    size_t          offset[FUSED_TILE];
    size_t          ahead[FUSED_TILE]; // rows of the next tile, see find_rows()
};

struct alignas(64) scratch {
    float    acc[FUSED_FLOATS];             // [KV head][row][dim_v]
    float    q[FUSED_FLOATS];               // narrow: [KV head][row][dim_k]; wide: [dim_k][row]
    uint8_t  q8[FUSED_FLOATS];              // narrow: [KV head][row][dim_k]; wide: [dim_k/4][row][4]
    float    q_scale[FUSED_FLOATS / QK];    // narrow: [KV head][row][block]; wide: [block][row]
    float    q_sum[FUSED_FLOATS / QK];      // scale times sum of q8 over a block, as q_scale
    int32_t  q_start[FUSED_FLOATS / QK];    // -K_BIAS times sum of q8 over a block, as q_scale
    float    k[TILE_FLOATS];                // wide: [cell][dim_k]
    uint8_t  k8[TILE_FLOATS];               // narrow: [dim_k/4][cell, cells_max][4]; wide: [cell][dim_k]
    float    k_scale[TILE_FLOATS / QK];     // narrow: [block][cell, cells_max]; wide: [cell][block]
    float    k_low[TILE_FLOATS / QK];       // as k_scale
    float    v[TILE_FLOATS];                // wide: [cell][dim_v]
    float    s[FUSED_ROWS_MAX * FUSED_TILE + W]; // W more: see add_mask()
    float    mask[(FUSED_ROWS_MAX + W) * FUSED_TILE]; // narrow: [token][cell]; wide: [cell][token, rounded up to W]
    float    max[FUSED_ROWS_MAX];
    float    sum[FUSED_ROWS_MAX];
    float    beta[FUSED_ROWS_MAX];
    rows     k_rows, v_rows;                // of the tile in hand
    tile     ordinary[2], intact[2];        // one being filled, one full
};

inline int round_up(int a, int b) {
    return (a + b - 1) / b * b;
}

struct worker {
    const fused_call & call;
    const item       & it;
    scratch          & x;

    // K and V row of cell c of the tile for the KV head in hand.
    const uint8_t * k_row(int h, int c) const   { return x.k_rows.base + h * x.k_rows.head + x.k_rows.offset[c]; }
    const uint8_t * v_row(int h, int c) const   { return x.v_rows.base + h * x.v_rows.head + x.v_rows.offset[c]; }

    const int dim_k  = call.k.dim;
    const int dim_v  = call.v.dim;
    const int cells_max = TILE_FLOATS / (dim_k > dim_v ? dim_k : dim_v) >= FUSED_TILE ? FUSED_TILE
                        : TILE_FLOATS / (dim_k > dim_v ? dim_k : dim_v) / 16 * 16;

    // --- queries ---

    const float * query(int kv_head, int row) const {
        const int head  = kv_head * (call.n_head / call.n_head_kv) + it.head + row / it.tokens;
        const int token = it.token + row % it.tokens;
        return (const float *) (call.q + head * call.q_nb_head + token * call.q_nb_token + it.stream * call.q_nb_stream);
    }

    // Scaled, so that scores come out in powers of 2, and for a quantized K rounded to 8 bits per block of 32 once.
    void load_queries() const {
        const float scale   = call.softcap != 0.0f ? call.scale / call.softcap : call.scale * FUSED_LOG2E;
        const int   n_block = dim_k / QK;
        const bool  floats  = call.k.type == GGML_TYPE_F16 || call.k.type == GGML_TYPE_BF16 || (call.row_of_cell && call.k.arena);
        const bool  bytes   = call.k.type != GGML_TYPE_F16 && call.k.type != GGML_TYPE_BF16;
        if (it.wide && it.rows_pad > it.rows) {
            memset(x.q, 0, sizeof(float) * dim_k * it.rows_pad);
            memset(x.q8, 0, dim_k * it.rows_pad);
            memset(x.q_scale, 0, sizeof(float) * n_block * it.rows_pad);
            memset(x.q_sum, 0, sizeof(float) * n_block * it.rows_pad);
            memset(x.q_start, 0, sizeof(int32_t) * n_block * it.rows_pad);
        }
        for (int h = 0; h < it.kv_heads; h++) {
            for (int r = 0; r < it.rows; r++) {
                const int     row = h * it.rows + r;
                const float * q   = query(it.kv_head + h, r);
                alignas(64) float rotated[FUSED_HEAD_MAX];
                if (call.rot_q > 0) {
                    memcpy(rotated, q, sizeof(float) * dim_k);
                    rotate(rotated, dim_k, call.rot_q);
                    q = rotated;
                }
                if (floats) {
                    for (int d = 0; d < dim_k; d++) {
                        x.q[it.wide ? d * it.rows_pad + row : row * dim_k + d] = q[d] * scale;
                    }
                }
                for (int b = 0; bytes && b < n_block; b++) {
                    load_query_block(q + b * QK, scale, row, b, n_block);
                }
            }
        }
    }

    void load_query_block(const float * q, float scale, int row, int b, int n_block) const {
        const float amax = largest_of(q);
        const float inv  = amax > 0.0f ? 127.0f / amax : 0.0f;
        int32_t bits[QK];
        for (int i = 0; i < QK; i += W) {
            // rounds to nearest, as in exp2_neg()
            store(bits + i, as_int(fma(load(q + i), set1(inv), set1(12582912.0f))) - 0x4b400000);
        }
        int32_t total = 0;
        int8_t  n[QK];
        for (int i = 0; i < QK; i++) {
            n[i] = (int8_t) bits[i];
            total += bits[i];
        }
        if (it.wide) {
            for (int j = 0; j < QK / 4; j++) {
                memcpy(x.q8 + ((b * (QK / 4) + j) * it.rows_pad + row) * 4, n + j * 4, 4);
            }
        } else {
            memcpy(x.q8 + row * dim_k + b * QK, n, QK);
        }
        const int at = it.wide ? b * it.rows_pad + row : row * n_block + b;
        x.q_scale[at] = amax / 127.0f * scale;
        x.q_sum[at]   = x.q_scale[at] * total;
        x.q_start[at] = -K_BIAS * total;
    }

    // --- scores ---

    // Finds the K or V rows of the tile's cells, and those of the next tile.
    //
    // The next tile's rows are prefetched one by one while this tile is computed: memory bounds decode, and the
    // hardware's own prefetch stops at page ends and loses its way between heads and cells. In one burst the
    // prefetches would fill the miss queue, and arithmetic would wait behind them.
    void find_rows(const fused_side & side, const tile & t, const tile & next, rows & r) const {
        const uint8_t * base  = side.data + it.kv_head * side.nb_head + it.stream * side.nb_stream;
        const uint8_t * arena = (const uint8_t *) (side.arena ? side.arena + (size_t) it.kv_head * side.dim : nullptr);
        const size_t    arena_row  = side.arena_row * sizeof(uint16_t);
        const size_t    arena_head = side.dim * sizeof(uint16_t);
        r.f16  = t.intact && arena;
        r.base = r.f16 ? arena : base;
        r.head = r.f16 ? arena_head : side.nb_head;
        for (int c = 0; c < t.n; c++) {
            r.offset[c] = r.f16 ? t.row[c] * arena_row : t.cell[c] * side.nb_cell;
        }
        for (int c = t.n; c < round_up(t.n, W); c++) { // lanes behind the last cell repeat it
            r.offset[c] = r.offset[t.n - 1];
            r.ahead[c]  = 0;
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
        } else if (it.next_cell >= 0) {
            n_ahead = call.n_kv - it.next_cell < t.n ? call.n_kv - it.next_cell : t.n;
            for (int c = 0; c < n_ahead; c++) {
                r.ahead[c] = (it.next_cell + c) * side.nb_cell;
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

    // 8 x W dwords: a block of each of W cells -> [8][W]
    template <ggml_type T> static void transpose(const uint8_t * const * in, size_t offset, vi (&out)[QK / 4]) {
#if INTACTKV_X86 >= 3
        __m512i z[8], u[8], w[8];
        for (int i = 0; i < 8; i++) {
            const int c = i < 4 ? i : i + 4; // cells c and c+4 in the halves
            z[i] = _mm512_inserti64x4(_mm512_castsi256_si512(unpacked<T, K_BIAS>(in[c] + offset)), unpacked<T, K_BIAS>(in[c + 4] + offset), 1);
        }
        for (int i = 0; i < 8; i += 2) {
            u[i]     = _mm512_unpacklo_epi32(z[i], z[i + 1]);
            u[i + 1] = _mm512_unpackhi_epi32(z[i], z[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            w[i]     = _mm512_unpacklo_epi64(u[i], u[i + 2]);
            w[i + 1] = _mm512_unpackhi_epi64(u[i], u[i + 2]);
            w[i + 2] = _mm512_unpacklo_epi64(u[i + 1], u[i + 3]);
            w[i + 3] = _mm512_unpackhi_epi64(u[i + 1], u[i + 3]);
        }
        for (int j = 0; j < 4; j++) {
            out[j]     = (vi) _mm512_shuffle_i32x4(w[j], w[j + 4], 0x88);
            out[j + 4] = (vi) _mm512_shuffle_i32x4(w[j], w[j + 4], 0xdd);
        }
#elif INTACTKV_X86 == 2
        __m256i z[8], u[8], w[8];
        for (int i = 0; i < 8; i++) {
            z[i] = unpacked<T, K_BIAS>(in[i] + offset);
        }
        for (int i = 0; i < 8; i += 2) {
            u[i]     = _mm256_unpacklo_epi32(z[i], z[i + 1]);
            u[i + 1] = _mm256_unpackhi_epi32(z[i], z[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            w[i]     = _mm256_unpacklo_epi64(u[i], u[i + 2]);
            w[i + 1] = _mm256_unpackhi_epi64(u[i], u[i + 2]);
            w[i + 2] = _mm256_unpacklo_epi64(u[i + 1], u[i + 3]);
            w[i + 3] = _mm256_unpackhi_epi64(u[i + 1], u[i + 3]);
        }
        for (int j = 0; j < 4; j++) {
            out[j]     = (vi) _mm256_permute2x128_si256(w[j], w[j + 4], 0x20);
            out[j + 4] = (vi) _mm256_permute2x128_si256(w[j], w[j + 4], 0x31);
        }
#else
        alignas(64) uint8_t bytes[W][QK];
        for (int c = 0; c < W; c++) {
            unpack<T, K_BIAS>(in[c] + offset, bytes[c]);
        }
        for (int j = 0; j < QK / 4; j++) {
            for (int c = 0; c < W; c++) {
                out[j][c] = load_as<int32_t>(bytes[c] + j * 4);
            }
        }
#endif
    }

    // Pointers to the rows of a tile for one KV head, and to those that will be read later.
    struct row_list {
        const uint8_t * here[FUSED_TILE];
        const uint8_t * later[FUSED_TILE];

        row_list(const rows & from, int h, int n) {
            const uint8_t * base  = from.base + h * from.head;
            const uint8_t * ahead = from.ahead_base + h * from.ahead_head;
            for (int c = 0; c < n; c++) {
                here[c]  = base + from.offset[c];
                later[c] = ahead + from.ahead[c];
            }
        }

        // Into the second cache: the first is full of the tile in hand.
        void prefetch(int c, size_t offset) const {
            __builtin_prefetch(later[c] + offset, 0, 2);
        }
    };

    // Whether block b is where the next cache line is asked for: wherever a row begins, none is left out.
    template <ggml_type T> static bool new_line(int b) {
        return b % (64 / block<T>::bytes) == 0;
    }

    template <ggml_type T> void pack_k(int n, int h) const {
        const int n_block = dim_k / QK;
        const int n_pad   = round_up(n, W);
        const row_list rows(x.k_rows, h, n_pad);
        for (int b = 0; b < n_block; b++) {
            const size_t offset = b * block<T>::bytes;
            for (int c = 0; c < n_pad; c += W) {
                store(x.k_scale + b * cells_max + c, gather_f16(rows.here + c, offset));
                if constexpr (block<T>::min) {
                    store(x.k_low + b * cells_max + c, gather_f16(rows.here + c, offset + 2));
                }
                for (int i = 0; new_line<T>(b) && i < W; i++) {
                    rows.prefetch(c + i, offset);
                }
                vi dwords[QK / 4];
                transpose<T>(rows.here + c, offset, dwords);
                for (int j = 0; j < QK / 4; j++) {
                    store(x.k8 + ((b * (QK / 4) + j) * cells_max + c) * 4, dwords[j]);
                }
            }
        }
    }

    // Scores of R rows with the cells' blocks transposed in registers, W cells at a time.
    template <ggml_type T, int R> void narrow_scores_quant_rows(int n, int h) const {
        const int      n_block = dim_k / QK;
        const row_list rows(x.k_rows, h, round_up(n, W));
        const uint8_t * q       = x.q8 + h * R * dim_k;
        const float   * q_scale = x.q_scale + h * R * n_block;
        const float   * q_sum   = x.q_sum   + h * R * n_block;
        const int32_t * q_start = x.q_start + h * R * n_block;
        for (int c = 0; c < n; c += W) {
            vf s[R] = {};
            for (int b = 0; b < n_block; b++) {
                const size_t offset = b * block<T>::bytes;
                const vf scale = gather_f16(rows.here + c, offset);
                for (int i = 0; new_line<T>(b) && i < W; i++) {
                    rows.prefetch(c + i, offset);
                }
                vi dwords[QK / 4], acc[R];
                transpose<T>(rows.here + c, offset, dwords);
                for (int r = 0; r < R; r++) {
                    acc[r] = set1(q_start[r * n_block + b]);
                }
                for (int j = 0; j < QK / 4; j++) {
                    for (int r = 0; r < R; r++) {
                        acc[r] = dot4(acc[r], dwords[j], set1(load_as<int32_t>(q + r * dim_k + b * QK + j * 4)));
                    }
                }
                for (int r = 0; r < R; r++) {
                    s[r] = fma(to_float(acc[r]), scale * q_scale[r * n_block + b], s[r]);
                }
                if constexpr (block<T>::min) {
                    const vf low = gather_f16(rows.here + c, offset + 2);
                    for (int r = 0; r < R; r++) {
                        s[r] = fma(low, set1(q_sum[r * n_block + b]), s[r]);
                    }
                }
            }
            for (int r = 0; r < R; r++) {
                store(x.s + r * FUSED_TILE + c, s[r]);
            }
        }
    }

    template <ggml_type T, int R = SCORE_ROWS> void narrow_scores_quant(int n, int h) const {
        if (it.rows == R) {
            narrow_scores_quant_rows<T, R>(n, h);
        } else if constexpr (R > 1) {
            narrow_scores_quant<T, R - 1>(n, h);
        } else {
            narrow_scores_quant_many<T>(n, h);
        }
    }

    // Of more rows: the cells are transposed once for all.
    template <ggml_type T> void narrow_scores_quant_many(int n, int h) const {
        pack_k<T>(n, h);
        const int row0 = h * it.rows;
        const int n_block = dim_k / QK;
        const idot_args g = {
            x.q8 + row0 * dim_k, (size_t) dim_k, x.k8, (size_t) cells_max,
            x.q_scale + row0 * n_block, x.k_scale,
            block<T>::min ? x.q_sum + row0 * n_block : nullptr, x.k_low,
            x.q_start + row0 * n_block, x.s, FUSED_TILE, n_block,
        };
        idot<false>(g, it.rows, round_up(n, W));
    }

    // Four cells at a time, for the sums over their lanes. Behind the last cell it comes once more.
    template <ggml_type T, int R> void narrow_scores_float_rows(const row_list & rows, int n, int h, int r0) const {
        const float * q = x.q + (h * it.rows + r0) * dim_k;
        for (int c = 0; c < n; c += 4) {
            vf acc[R][4] = {};
            for (int d = 0; d < dim_k; d += W) {
                vf k[4];
                for (int i = 0; i < 4; i++) {
                    if (r0 == 0 && d % 32 == 0) {
                        rows.prefetch(c + i, d * 2);
                    }
                    k[i] = values<T>(rows.here[c + i] + d * 2, 0);
                }
                for (int r = 0; r < R; r++) {
                    const vf qr = load(q + r * dim_k + d);
                    for (int i = 0; i < 4; i++) {
                        acc[r][i] = fma(k[i], qr, acc[r][i]);
                    }
                }
            }
            for (int r = 0; r < R; r++) {
                sum4(acc[r], x.s + (r0 + r) * FUSED_TILE + c);
            }
        }
    }

    template <ggml_type T> void narrow_scores_float(int n, int h) const {
        const row_list rows(x.k_rows, h, round_up(n, 4));
        int r = 0;
        for (; r + 4 <= it.rows; r += 4) {
            narrow_scores_float_rows<T, 4>(rows, n, h, r);
        }
        switch (it.rows - r) {
            case 3: narrow_scores_float_rows<T, 3>(rows, n, h, r); break;
            case 2: narrow_scores_float_rows<T, 2>(rows, n, h, r); break;
            case 1: narrow_scores_float_rows<T, 1>(rows, n, h, r); break;
        }
    }

    template <ggml_type T> void wide_scores_quant(int n) const {
        const int n_block = dim_k / QK;
        for (int c = 0; c < n; c++) {
            for (int b = 0; b < n_block; b++) {
                const uint8_t * p = k_row(0, c) + b * block<T>::bytes;
                unpack<T, K_BIAS>(p, x.k8 + c * dim_k + b * QK);
                x.k_scale[c * n_block + b] = f16(p);
                if constexpr (block<T>::min) {
                    x.k_low[c * n_block + b] = f16(p + 2);
                }
            }
        }
        const idot_args g = {
            x.k8, (size_t) dim_k, x.q8, (size_t) it.rows_pad,
            x.k_scale, x.q_scale, block<T>::min ? x.k_low : nullptr, x.q_sum,
            x.q_start, x.s, (size_t) it.rows_pad, n_block,
        };
        idot<true>(g, n, it.rows_pad);
    }

    template <ggml_type T> void wide_scores_float(int n) const {
        for (int c = 0; c < n; c++) {
            for (int d = 0; d < dim_k; d += W) {
                store(x.k + c * dim_k + d, values<T>(k_row(0, c) + d * 2, 0));
            }
        }
        const gemm_args g = { x.k, (size_t) dim_k, 1, x.q, (size_t) it.rows_pad, x.s, (size_t) it.rows_pad, nullptr, dim_k };
        gemm(g, n, it.rows_pad);
    }

    template <ggml_type T> void scores_of(int n, int h) const {
        if constexpr (block<T>::quant) {
            it.wide ? wide_scores_quant<T>(n) : narrow_scores_quant<T>(n, h);
        } else {
            it.wide ? wide_scores_float<T>(n) : narrow_scores_float<T>(n, h);
        }
    }

    void scores(const tile & t, int h) const {
        switch (x.k_rows.f16 ? GGML_TYPE_F16 : call.k.type) {
            case GGML_TYPE_F16:    scores_of<GGML_TYPE_F16>   (t.n, h); break;
            case GGML_TYPE_BF16:   scores_of<GGML_TYPE_BF16>  (t.n, h); break;
            case GGML_TYPE_Q8_0:   scores_of<GGML_TYPE_Q8_0>  (t.n, h); break;
            case GGML_TYPE_Q5_1:   scores_of<GGML_TYPE_Q5_1>  (t.n, h); break;
            case GGML_TYPE_Q5_0:   scores_of<GGML_TYPE_Q5_0>  (t.n, h); break;
            case GGML_TYPE_Q4_1:   scores_of<GGML_TYPE_Q4_1>  (t.n, h); break;
            case GGML_TYPE_Q4_0:   scores_of<GGML_TYPE_Q4_0>  (t.n, h); break;
            case GGML_TYPE_IQ4_NL: scores_of<GGML_TYPE_IQ4_NL>(t.n, h); break;
            default: break; // fused_supported() lets no other type through
        }
        if (call.softcap != 0.0f) {
            const int n_row = it.wide ? t.n : it.rows;
            const int n_col = it.wide ? it.rows_pad : round_up(t.n, W);
            const int ld    = it.wide ? it.rows_pad : FUSED_TILE;
            for (int i = 0; i < n_row; i++) {
                for (int j = 0; j < n_col; j += W) {
                    store(x.s + i * ld + j, tanh(load(x.s + i * ld + j)) * (call.softcap * FUSED_LOG2E));
                }
            }
        }
    }

    // --- mask ---

    const uint16_t * mask_row(int head, int token) const {
        return (const uint16_t *) (call.mask + (it.token + token) * call.mask_nb_token +
                head % call.mask_heads * call.mask_nb_head + it.stream % call.mask_streams * call.mask_nb_stream);
    }

    int mask_ld() const {
        return it.wide ? round_up(it.tokens, W) : FUSED_TILE;
    }

    // The tile's mask values of one query head as floats, 0 in the padding.
    void load_mask(const tile & t, int head) const {
        const int ld = mask_ld();
        memset(x.mask, 0, sizeof(float) * ld * (it.wide ? t.n : it.tokens));
        for (int i = 0; i < it.tokens; i++) {
            const uint16_t * m = mask_row(head, i);
            for (int c = 0; c < t.n; c++) {
                x.mask[it.wide ? c * ld + i : i * ld + c] = f16(m + t.cell[c]);
            }
        }
    }

    void add_mask(const tile & t, int kv_head) const {
        const int n_group = call.n_head / call.n_head_kv;
        const int ld      = mask_ld();
        for (int g = 0; g < it.heads; g++) {
            const int head = kv_head * n_group + it.head + g;
            if (call.mask_heads > 1) {
                load_mask(t, head);
            }
            const vf slope = set1(fused_slope(call.max_bias, call.n_head, head) * FUSED_LOG2E);
            if (it.wide) {
                // the padding behind the last token adds 0 to rows of the next head
                for (int c = 0; c < t.n; c++) {
                    for (int i = 0; i < ld; i += W) {
                        float * s = x.s + c * it.rows_pad + g * it.tokens + i;
                        store(s, fma(slope, load(x.mask + c * ld + i), load(s)));
                    }
                }
            } else {
                for (int i = 0; i < it.tokens; i++) {
                    for (int c = 0; c < t.n; c += W) {
                        float * s = x.s + (g * it.tokens + i) * FUSED_TILE + c;
                        store(s, fma(slope, load(x.mask + i * ld + c), load(s)));
                    }
                }
            }
        }
    }

    // --- softmax: scores become weights, x.beta what earlier results are scaled by ---

    // Of a row: 2^(old - new), and the sum brought along. A row that has seen no cell keeps maximum -inf.
    static float lowest(float m) {
        return m > -3.0e38f ? m : -3.0e38f; // so that -inf - lowest(-inf) is not NaN
    }

    void narrow_softmax(int n, int row0) const {
        const int n_pad = round_up(n, W);
        for (int r = 0; r < it.rows; r++) {
            float * s = x.s + r * FUSED_TILE;
            for (int c = n; c < n_pad; c++) {
                s[c] = -__builtin_inff();
            }
            vf m = load(s);
            for (int c = W; c < n_pad; c += W) {
                m = max(m, load(s + c));
            }
            const float here = max_of(m), before = x.max[row0 + r];
            const float now  = here > before ? here : before;
            const float ref  = lowest(now);
            vf total = {};
            for (int c = 0; c < n_pad; c += W) {
                const vf p = exp2_neg(load(s + c) - ref);
                total += p;
                store(s + c, p);
            }
            x.beta[r]       = here > before ? exp2_neg(set1(lowest(before) - ref))[0] : 1.0f;
            x.max[row0 + r] = now;
            x.sum[row0 + r] = x.sum[row0 + r] * x.beta[r] + sum(total);
        }
    }

    void wide_softmax(int n) const {
        for (int r = 0; r < it.rows_pad; r += W) {
            float * s = x.s + r;
            const vf old = load(x.max + r);
            vf m = old;
            for (int c = 0; c < n; c++) {
                m = max(m, load(s + c * it.rows_pad));
            }
            const vf ref  = max(set1(-3.0e38f), m);
            const vf beta = exp2_neg(max(set1(-3.0e38f), old) - ref);
            vf total = {};
            for (int c = 0; c < n; c++) {
                const vf p = exp2_neg(load(s + c * it.rows_pad) - ref);
                total += p;
                store(s + c * it.rows_pad, p);
            }
            store(x.beta + r, beta);
            store(x.max + r, m);
            store(x.sum + r, fma(load(x.sum + r), beta, total));
        }
    }

    // --- values ---

    // The weights of R rows for a block of V, as narrow_values_quant() wants them.
    template <int R> struct weights {
        alignas(64) int16_t w[R][FUSED_TILE];
        float unit[R], lows[R];

        // p: [row][cell]. N: the number of vectors if it is known (then they stay in registers), else 0.
        template <ggml_type T, int N> void set(const row_list & rows, size_t offset, const float * p, int n) {
            const int n_vec = N > 0 ? N : n;
            vf scale[FUSED_TILE / W], low[FUSED_TILE / W];
            for (int v = 0; v < n_vec; v++) {
                scale[v] = gather_f16(rows.here + v * W, offset);
                if constexpr (block<T>::min) {
                    low[v] = gather_f16(rows.here + v * W, offset + 2);
                }
            }
            for (int r = 0; r < R; r++) {
                vf product[FUSED_TILE / W], largest = {}, total = {};
                for (int v = 0; v < n_vec; v++) {
                    const vf pc = load(p + r * FUSED_TILE + v * W);
                    product[v] = pc * scale[v];
                    largest = max(largest, as_float(as_int(product[v]) & 0x7fffffff));
                    if constexpr (block<T>::min) {
                        total = fma(pc, low[v], total);
                    }
                }
                const float w_max = max_of(largest);
                const float inv   = w_max > 1.0e-30f ? 32767.0f / w_max : 0.0f;
                for (int v = 0; v < n_vec; v++) {
                    store_s16(w[r] + v * W, product[v] * inv);
                }
                unit[r] = w_max * (1.0f / 32767.0f);
                lows[r] = block<T>::min ? sum(total) : 0.0f;
            }
        }
    };

    // Quantized V: acc[r][d0..d0+32) of R rows in integers, two cells at a time. A weight is multiplied by its block's
    // scale and rounded to 16 bits of the largest such product in the tile: an error below 2^-16 of that.
    template <ggml_type T, int R> void narrow_values_quant(const row_list & rows, int n, int r0, int h, int d0) const {
        const int    row0   = h * it.rows + r0;
        const size_t offset = (size_t) (d0 / QK * block<T>::bytes);

        weights<R> u;
        if (W >= 16 && n > FUSED_TILE - W) {
            u.template set<T, FUSED_TILE / W>(rows, offset, x.s + r0 * FUSED_TILE, 0);
        } else {
            u.template set<T, 0>(rows, offset, x.s + r0 * FUSED_TILE, round_up(n, W) / W);
        }

        const bool ahead = r0 == 0 && new_line<T>(d0 / QK);
        vi acc[R][2 * BLOCK_S] = {};
        for (int c = 0; c < n; c += 2) { // behind the last cell comes itself once more, with a weight of 0
            vs v0[BLOCK_S], v1[BLOCK_S];
            unpack_s16<T>(rows.here[c] + offset, v0);
            unpack_s16<T>(rows.here[c + 1] + offset, v1);
            if (ahead) {
                rows.prefetch(c, offset);
                rows.prefetch(c + 1, offset);
            }
            for (int i = 0; i < BLOCK_S; i++) {
                const cell_pair pair = make_pair(v0[i], v1[i]);
                for (int r = 0; r < R; r++) {
                    pair_dot(acc[r][2 * i], acc[r][2 * i + 1], pair, u.w[r] + c);
                }
            }
        }
        for (int r = 0; r < R; r++) {
            float * out = x.acc + (row0 + r) * dim_v + d0;
            for (int i = 0; i < 2 * BLOCK_S; i++) {
                if (i % 2 == 0) {
                    in_order(acc[r][i], acc[r][i + 1]);
                }
                const vf old = fma(load(out + i * W), set1(x.beta[r0 + r]), set1(u.lows[r]));
                store(out + i * W, fma(to_float(acc[r][i]), set1(u.unit[r]), old));
            }
        }
    }

    // F16 and BF16: acc[r][d0..d0+N) of R rows.
    template <ggml_type T, int R, int N> void narrow_values_float(const row_list & rows, int n, int r0, int h, int d0) const {
        const int row0 = h * it.rows + r0;
        constexpr int NV = N / W;
        vf acc[R][NV];
        for (int r = 0; r < R; r++) {
            for (int v = 0; v < NV; v++) {
                acc[r][v] = load(x.acc + (row0 + r) * dim_v + d0 + v * W) * x.beta[r0 + r];
            }
        }
        for (int c = 0; c < n; c++) {
            const uint8_t * p = rows.here[c] + d0 * 2;
            for (int line = 0; r0 == 0 && line < N; line += 32) {
                rows.prefetch(c, (d0 + line) * 2);
            }
            for (int v = 0; v < NV; v++) {
                const vf value = values<T>(p, v);
                for (int r = 0; r < R; r++) {
                    acc[r][v] = fma(value, set1(x.s[(r0 + r) * FUSED_TILE + c]), acc[r][v]);
                }
            }
        }
        for (int r = 0; r < R; r++) {
            for (int v = 0; v < NV; v++) {
                store(x.acc + (row0 + r) * dim_v + d0 + v * W, acc[r][v]);
            }
        }
    }

    template <ggml_type T, int R> void narrow_values_rows(const row_list & rows, int n, int r0, int h) const {
        int d = 0;
        if constexpr (block<T>::quant) {
            for (; d < dim_v; d += QK) {
                narrow_values_quant<T, R>(rows, n, r0, h, d);
            }
        } else {
            for (; d + VALUE_COLS <= dim_v; d += VALUE_COLS) {
                narrow_values_float<T, R, VALUE_COLS>(rows, n, r0, h, d);
            }
            for (; d < dim_v; d += 16) {
                narrow_values_float<T, R, 16>(rows, n, r0, h, d);
            }
        }
    }

    template <ggml_type T> void narrow_values(int n, int h) const {
        const row_list rows(x.v_rows, h, round_up(n, W));
        int r = 0;
        for (; r + VALUE_ROWS <= it.rows; r += VALUE_ROWS) {
            narrow_values_rows<T, VALUE_ROWS>(rows, n, r, h);
        }
        if constexpr (VALUE_ROWS > 2) {
            switch (it.rows - r) {
                case 3: narrow_values_rows<T, 3>(rows, n, r, h); break;
                case 2: narrow_values_rows<T, 2>(rows, n, r, h); break;
            }
        }
        if (it.rows - r == 1) {
            narrow_values_rows<T, 1>(rows, n, r, h);
        }
    }

#if INTACTKV_X86 >= 2
    // V of the tile as pairs of cells [pair][dim_v][2], 16 bits each; scale, low: [block][cell, cells_max]. Behind an odd
    // last cell comes itself once more.
    template <ggml_type T> void pack_v(int n, int32_t * pairs, float * scale, float * low) const {
        for (int c = 0; c < n; c += 2) {
            const uint8_t * rows[2] = { v_row(0, c), v_row(0, c + 1 < n ? c + 1 : c) };
            for (int b = 0; b < dim_v / QK; b++) {
                const size_t offset = (size_t) (b * block<T>::bytes);
                vs v[2][BLOCK_S];
                for (int i = 0; i < 2; i++) {
                    unpack_s16<T>(rows[i] + offset, v[i]);
                    scale[b * cells_max + c + i] = f16(rows[i] + offset);
                    if constexpr (block<T>::min) {
                        low[b * cells_max + c + i] = f16(rows[i] + offset + 2);
                    }
                }
                int32_t * out = pairs + c / 2 * dim_v + b * QK;
                for (int i = 0; i < BLOCK_S; i++) {
                    const cell_pair pair = make_pair(v[0][i], v[1][i]);
                    vi lo = (vi) pair.a, hi = (vi) pair.b;
                    in_order(lo, hi);
                    store(out + 2 * i * W, lo);
                    store(out + (2 * i + 1) * W, hi);
                }
            }
        }
    }

    // The weights times one block's scales, by row in units of the largest / 32767: [pair of cells][row][2], 16 bits
    // each. lows: the sum of the weights times the block's lows. n: even.
    template <ggml_type T> void pack_weights(int n, const float * scale, const float * low, int32_t * w, float * unit, float * lows) const {
        for (int r = 0; r < it.rows_pad; r += W) {
            vf largest = {}, total = {};
            for (int c = 0; c < n; c++) {
                const vf p = load(x.s + c * it.rows_pad + r);
                largest = max(largest, as_float(as_int(p * scale[c]) & 0x7fffffff));
                if constexpr (block<T>::min) {
                    total = fma(p, set1(low[c]), total);
                }
            }
            largest = max(largest, set1(1.0e-30f));
            const vf inv = 32767.0f / largest;
            for (int c = 0; c < n; c += 2) {
                const vf p0 = load(x.s + c * it.rows_pad + r) * scale[c];
                const vf p1 = load(x.s + (c + 1) * it.rows_pad + r) * scale[c + 1];
                store(w + c / 2 * it.rows_pad + r, (nearest(p0 * inv) & 0xffff) | (nearest(p1 * inv) << 16));
            }
            store(unit + r, largest * (1.0f / 32767.0f));
            store(lows + r, total);
        }
    }

    // Quantized V as narrow_values_quant() does it, a block of 32 columns of all rows at a time.
    template <ggml_type T> void wide_values_quant(int n) const {
        int32_t * pairs = (int32_t *) x.v;
        alignas(64) float   scale[TILE_FLOATS / QK], low[TILE_FLOATS / QK];
        alignas(64) int32_t w[FUSED_TILE / 2 * FUSED_ROWS_MAX];
        alignas(64) float   unit[FUSED_ROWS_MAX], lows[FUSED_ROWS_MAX];
        pack_v<T>(n, pairs, scale, low);
        if (n % 2 != 0) { // the cell that came once more
            memset(x.s + n * it.rows_pad, 0, sizeof(float) * it.rows_pad);
            n++;
        }
        for (int b = 0; b < dim_v / QK; b++) {
            pack_weights<T>(n, scale + b * cells_max, low + b * cells_max, w, unit, lows);
            const pair_args g = { w, (size_t) it.rows_pad, pairs + b * QK, (size_t) dim_v, x.acc + b * QK, (size_t) dim_v,
                                  x.beta, unit, block<T>::min ? lows : nullptr, n / 2 };
            pair_gemm(g, it.rows);
        }
    }
#endif

    template <ggml_type T> void wide_values_float(int n) const {
        for (int c = 0; c < n; c++) {
            if constexpr (block<T>::quant) {
                for (int d = 0; d < dim_v; d += QK) {
                    const uint8_t * p = v_row(0, c) + d / QK * block<T>::bytes;
                    const vf scale = set1(block_scale<T>(p));
                    const vf low   = set1(block_low<T>(p));
                    for (int v = 0; v < QK / W; v++) {
                        store(x.v + c * dim_v + d + v * W, fma(values<T>(p, v), scale, low));
                    }
                }
            } else {
                for (int d = 0; d < dim_v; d += W) {
                    store(x.v + c * dim_v + d, values<T>(v_row(0, c) + d * 2, 0));
                }
            }
        }
        const gemm_args g = { x.s, 1, (size_t) it.rows_pad, x.v, (size_t) dim_v, x.acc, (size_t) dim_v, x.beta, n };
        gemm(g, it.rows, dim_v);
    }

    template <ggml_type T> void wide_values(int n) const {
#if INTACTKV_X86 >= 2
        if constexpr (block<T>::quant) {
            wide_values_quant<T>(n);
            return;
        }
#endif
        wide_values_float<T>(n);
    }

    template <ggml_type T> void values_of(int n, int h) const {
        it.wide ? wide_values<T>(n) : narrow_values<T>(n, h);
    }

    void accumulate(const tile & t, int h) const {
        switch (x.v_rows.f16 ? GGML_TYPE_F16 : call.v.type) {
            case GGML_TYPE_F16:    values_of<GGML_TYPE_F16>   (t.n, h); break;
            case GGML_TYPE_BF16:   values_of<GGML_TYPE_BF16>  (t.n, h); break;
            case GGML_TYPE_Q8_0:   values_of<GGML_TYPE_Q8_0>  (t.n, h); break;
            case GGML_TYPE_Q5_1:   values_of<GGML_TYPE_Q5_1>  (t.n, h); break;
            case GGML_TYPE_Q5_0:   values_of<GGML_TYPE_Q5_0>  (t.n, h); break;
            case GGML_TYPE_Q4_1:   values_of<GGML_TYPE_Q4_1>  (t.n, h); break;
            case GGML_TYPE_Q4_0:   values_of<GGML_TYPE_Q4_0>  (t.n, h); break;
            case GGML_TYPE_IQ4_NL: values_of<GGML_TYPE_IQ4_NL>(t.n, h); break;
            default: break;
        }
    }

    // --- tiles ---

    void process(tile & t, const tile & next) const {
        if (t.n == 0) {
            return;
        }
        if (t.masked && call.mask_heads == 1) {
            load_mask(t, 0);
        }
        find_rows(call.k, t, next, x.k_rows);
        find_rows(call.v, t, next, x.v_rows);
        for (int h = 0; h < it.kv_heads; h++) {
            scores(t, h);
            if (t.masked) {
                add_mask(t, it.kv_head + h);
            }
            it.wide ? wide_softmax(t.n) : narrow_softmax(t.n, h * it.rows);
            accumulate(t, h);
        }
        t.n = 0;
        t.masked = false;
    }

    // Which of n cells from c on does any query of the item see? true: some mask value is not 0.
    bool look(int c, int n, uint16_t * live) const {
        for (int i = 0; i < FUSED_TILE; i++) {
            live[i] = call.mask == nullptr;
        }
        if (!call.mask) {
            return false;
        }
        const int n_group = call.n_head / call.n_head_kv;
        const int first   = call.mask_heads > 1 ? it.kv_head * n_group : 0;
        const int last    = call.mask_heads > 1 ? (it.kv_head + it.kv_heads) * n_group : 1;
        uint16_t any = 0;
        for (int head = first; head < last; head++) {
            for (int i = 0; i < it.tokens; i++) {
                const uint16_t * m = mask_row(head, i) + c;
                // the rows are pages apart: the next tile's part of each would be waited for
                __builtin_prefetch(m + FUSED_TILE);
                __builtin_prefetch(m + FUSED_TILE + 32);
                for (int j = 0; j < n; j++) {
                    live[j] |= m[j] != F16_NEG_INF;
                    any |= m[j];
                }
            }
        }
        return any != 0;
    }

    void add(tile * pair, int cell, int row, bool masked) const {
        tile * t = pair;
        t->cell[t->n] = cell;
        t->row[t->n]  = row;
        t->n++;
        t->masked |= masked;
        if (t->n == cells_max) {
            push(pair);
        }
    }

    // The usual case, without a branch per cell: n cells, all seen and ordinary, for an empty tile.
    bool add_all(int cell, int n, const uint16_t * live, const int32_t * arena_rows, bool masked) const {
        if (n != FUSED_TILE || cells_max != FUSED_TILE || x.ordinary[0].n != 0) {
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
        tile & t = x.ordinary[0];
        for (int i = 0; i < FUSED_TILE; i++) {
            t.cell[i] = cell + i;
        }
        t.n      = FUSED_TILE;
        t.masked = masked;
        push(x.ordinary);
        return true;
    }

    // A full tile: the one before it is computed.
    void push(tile * pair) const {
        process(pair[1], pair[0]);
        pair[1] = pair[0];
        pair[0].n = 0;
        pair[0].masked = false;
    }

    void run() const {
        load_queries();
        memset(x.acc, 0, sizeof(float) * it.kv_heads * it.rows * dim_v);
        for (int r = 0; r < FUSED_ROWS_MAX; r++) {
            x.max[r] = -__builtin_inff();
            x.sum[r] = 0.0f;
        }
        for (int i = 0; i < 2; i++) {
            x.ordinary[i].n      = x.intact[i].n      = 0;
            x.ordinary[i].masked = x.intact[i].masked = false;
            x.ordinary[i].intact = false;
            x.intact[i].intact   = true;
        }

        const int32_t * arena_rows = call.row_of_cell ? call.row_of_cell + (size_t) it.stream * call.n_kv : nullptr;
        for (int c = it.cell; c < it.cell + it.cells; c += FUSED_TILE) {
            const int n = it.cell + it.cells - c < FUSED_TILE ? it.cell + it.cells - c : FUSED_TILE;
            uint16_t live[FUSED_TILE];
            const bool masked = look(c, n, live);
            if (add_all(c, n, live, arena_rows, masked)) {
                continue;
            }
            for (int i = 0; i < n; i++) {
                if (live[i]) {
                    const bool intact = arena_rows && arena_rows[c + i] >= 0;
                    add(intact ? x.intact : x.ordinary, c + i, intact ? arena_rows[c + i] : -1, masked);
                }
            }
        }
        const tile none{};
        process(x.intact[1], x.intact[0]);
        process(x.intact[0], x.ordinary[1]);
        process(x.ordinary[1], x.ordinary[0]);
        process(x.ordinary[0], none);
        write();
    }

    // --- results ---

    void write() const {
        const int  n_group = call.n_head / call.n_head_kv;
        const bool partial = call.plan.n_chunk > 1;
        const size_t size  = dim_v + (partial ? FUSED_PARTIAL : 0);
        for (int h = 0; h < it.kv_heads; h++) {
            for (int r = 0; r < it.rows; r++) {
                const int row   = h * it.rows + r;
                const int head  = (it.kv_head + h) * n_group + it.head + r / it.tokens;
                const int token = it.token + r % it.tokens;
                const float * acc = x.acc + row * dim_v;
                size_t at = (size_t) it.stream * call.plan.n_chunk + it.cell / call.plan.chunk_cells;
                at = (at * call.n_tokens + token) * call.n_head + head;
                float * out = call.out + at * size;
                float scale = 1.0f;
                if (partial) {
                    out[0] = x.max[row];
                    out[1] = x.sum[row];
                    out += FUSED_PARTIAL;
                } else {
                    // a sink is one more score, of a cell without a value
                    float total = x.sum[row];
                    if (call.sinks) {
                        const float sink = call.sinks[head] * FUSED_LOG2E;
                        const float ref  = lowest(sink > x.max[row] ? sink : x.max[row]);
                        scale = exp2_neg(set1(lowest(x.max[row]) - ref))[0];
                        total = total * scale + exp2_neg(set1(lowest(sink) - ref))[0];
                    }
                    scale = total == 0.0f ? 0.0f : scale / total;
                }
                for (int d = 0; d < dim_v; d += W) {
                    store(out + d, load(acc + d) * scale);
                }
                if (!partial && call.rot_out > 0) {
                    rotate(out, dim_v, call.rot_out);
                }
            }
        }
    }
};

// Item i of the plan, chunks varying fastest.
inline item make_item(const fused_call & call, int i, int nth) {
    const fused_plan & p = call.plan;
    const int n_group = call.n_head / call.n_head_kv;
    item it;
    it.cell     = i % p.n_chunk * p.chunk_cells;
    it.next_cell = i % p.n_chunk + nth < p.n_chunk ? it.cell + nth * p.chunk_cells : -1;
    i /= p.n_chunk;
    it.kv_head  = i % p.n_head_group * p.kv_heads;
    i /= p.n_head_group;
    it.head     = i % p.n_head_block * p.heads;
    i /= p.n_head_block;
    it.token    = i % p.n_token_block * p.tokens;
    it.stream   = i / p.n_token_block;
    it.cells    = call.n_kv - it.cell      < p.chunk_cells ? call.n_kv - it.cell      : p.chunk_cells;
    it.kv_heads = call.n_head_kv - it.kv_head < p.kv_heads ? call.n_head_kv - it.kv_head : p.kv_heads;
    it.heads    = n_group - it.head        < p.heads       ? n_group - it.head        : p.heads;
    it.tokens   = call.n_tokens - it.token < p.tokens      ? call.n_tokens - it.token : p.tokens;
    it.rows     = it.heads * it.tokens;
    it.rows_pad = round_up(it.rows, W);
    it.wide     = it.rows > NARROW_MAX && it.kv_heads == 1;
    return it;
}

void run(const fused_call & call, int ith, int nth) {
    const auto next = [&](int i) {
        return call.next_item ? __atomic_fetch_add(call.next_item, 1, __ATOMIC_RELAXED) : i + nth;
    };
    scratch x;
    for (int i = call.next_item ? next(0) : ith; i < call.plan.n_item; i = next(i)) {
        const item it = make_item(call, i, nth);
        worker{ call, it, x }.run();
    }
}
