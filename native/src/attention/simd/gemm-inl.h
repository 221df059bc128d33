// Register-blocked products. MB rows of A (broadcast) times VB vectors of B (columns in lanes).
//
// Compiled once per instruction set, inside its anonymous namespace: see kernel/kernel-inl.h.

#pragma once

#include "attention/simd/blocks-inl.h"
#include "attention/simd/vector-inl.h"

namespace intactkv {
namespace {

#if INTACTKV_X86 >= 3 || INTACTKV_ARM
constexpr int MB_F = 6, VB_F = 4, MB_I = 4, VB_I = 3; // 32 registers
#elif INTACTKV_X86 == 2
constexpr int MB_F = 6, VB_F = 2, MB_I = 2, VB_I = 4; // 16 registers
#else
constexpr int MB_F = 3, VB_F = 4, MB_I = 2, VB_I = 2;
#endif

// Zeros. Unrolled by hand, as other loops over accumulators here: GCC otherwise keeps those in memory.
template <typename V, int MB, int VB> inline void clear(V (&acc)[MB][VB]) {
#pragma GCC unroll 12
    for (int m = 0; m < MB; m++) {
#pragma GCC unroll 4
        for (int v = 0; v < VB; v++) {
            acc[m][v] = V{};
        }
    }
}

// C[m][n] = beta[m]*C[m][n] + sum over k < K of A[m][k]*B[k][n]; beta nullptr: C is overwritten.
struct gemm_args {
    const float * a;
    size_t a_row, a_col;
    const float * b;
    size_t b_row;
    float * c;
    size_t c_row;
    const float * beta;
    int k;
};

template <int MB, int VB> inline void gemm_tile(const gemm_args & g, int m0, int n0) {
    vf acc[MB][VB];
    for (int m = 0; m < MB; m++) {
        for (int v = 0; v < VB; v++) {
            acc[m][v] = g.beta ? load(g.c + (m0 + m) * g.c_row + n0 + v * W) * g.beta[m0 + m] : vf{};
        }
    }
    const float * a = g.a + m0 * g.a_row;
    const float * b = g.b + n0;
    for (int k = 0; k < g.k; k++) {
        vf bv[VB];
        for (int v = 0; v < VB; v++) {
            bv[v] = load(b + v * W);
        }
        for (int m = 0; m < MB; m++) {
            const vf am = set1(a[m * g.a_row]);
            for (int v = 0; v < VB; v++) {
                acc[m][v] = fma(am, bv[v], acc[m][v]);
            }
        }
        a += g.a_col;
        b += g.b_row;
    }
    for (int m = 0; m < MB; m++) {
        for (int v = 0; v < VB; v++) {
            store(g.c + (m0 + m) * g.c_row + n0 + v * W, acc[m][v]);
        }
    }
}

template <int MB> inline void gemm_rows(const gemm_args & g, int m0, int n) {
    int n0 = 0;
    for (; n0 + VB_F * W <= n; n0 += VB_F * W) {
        gemm_tile<MB, VB_F>(g, m0, n0);
    }
    for (; n0 < n; n0 += W) {
        gemm_tile<MB, 1>(g, m0, n0);
    }
}

// n: a multiple of W
inline void gemm(const gemm_args & g, int m, int n) {
    int m0 = 0;
    for (; m0 + MB_F <= m; m0 += MB_F) {
        gemm_rows<MB_F>(g, m0, n);
    }
    for (; m0 + 2 <= m; m0 += 2) {
        gemm_rows<2>(g, m0, n);
    }
    if (m0 < m) {
        gemm_rows<1>(g, m0, n);
    }
}

#if INTACTKV_X86 >= 2
// For QK columns: C[m] = beta[m]*C[m] + unit[m] * (sum over p < n_pair of A[p][m] . B[p]) + low[m]
struct pair_args {
    const int32_t * a; // [pair][a_row rows][2], 16 bits each
    size_t a_row;
    const int32_t * b; // [pair][b_row columns][2], 16 bits each
    size_t b_row;
    float * c;
    size_t c_row;
    const float * beta;
    const float * unit;
    const float * low; // or nullptr
    int n_pair;
};

template <int MB> __attribute__((noinline)) void pair_tile(const pair_args & g, int m0) {
    constexpr int VB = QK / W;
    vi acc[MB][VB];
    clear(acc);
    for (int p = 0; p < g.n_pair; p++) {
        vi bv[VB];
        for (int v = 0; v < VB; v++) {
            bv[v] = load_as<vi>(g.b + p * g.b_row + v * W);
        }
        for (int m = 0; m < MB; m++) {
            const vi am = set1(g.a[p * g.a_row + m0 + m]);
            for (int v = 0; v < VB; v++) {
                acc[m][v] = dot2(acc[m][v], am, bv[v]);
                settle(acc[m][v]);
            }
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < MB; m++) {
#pragma GCC unroll 4
        for (int v = 0; v < VB; v++) {
            float * c = g.c + (m0 + m) * g.c_row + v * W;
            const vf old = load(c) * g.beta[m0 + m] + (g.low ? g.low[m0 + m] : 0.0f);
            store(c, fma(to_float(acc[m][v]), set1(g.unit[m0 + m]), old));
        }
    }
}

inline void pair_gemm(const pair_args & g, int m) {
    constexpr int MB = INTACTKV_X86 >= 3 ? 12 : 3;
    int m0 = 0;
    for (; m0 + MB <= m; m0 += MB) {
        pair_tile<MB>(g, m0);
    }
    for (; m0 + 2 <= m; m0 += 2) {
        pair_tile<2>(g, m0);
    }
    if (m0 < m) {
        pair_tile<1>(g, m0);
    }
}
#endif

// C[m][n] = sum over blocks b of scale_a[m][b]*scale_b[b][n]*(integer dot product) + sum_a[m][b]*low_b[b][n]
// K_ROWS: A is K (with K_BIAS) and B is Q, else the other way round. The bias is taken out by what the integer sums
// start from: -K_BIAS times the sum of q over the block.
struct idot_args {
    const uint8_t * a; // [m][a_row bytes]
    size_t a_row;
    const uint8_t * b; // [block][8][b_row lanes][4]
    size_t b_row;
    const float * scale_a; // [m][n_block]
    const float * scale_b; // [block][b_row]
    const float * low_a;   // as scale_a, nullptr: no lows
    const float * low_b;   // as scale_b
    const int32_t * start; // [m][n_block] if A is Q, [block][b_row] if B is Q
    float * c;
    size_t c_row;
    int n_block;
};

template <bool K_ROWS, int MB, int VB> __attribute__((noinline)) void idot_tile(const idot_args & g, int m0, int n0) {
    vf c[MB][VB];
    clear(c);
    for (int b = 0; b < g.n_block; b++) {
        vi acc[MB][VB];
        for (int m = 0; m < MB; m++) {
            for (int v = 0; v < VB; v++) {
                acc[m][v] = K_BIAS == 0 ? vi{}
                        : K_ROWS        ? load_as<vi>(g.start + b * g.b_row + n0 + v * W)
                                        : set1(g.start[(m0 + m) * g.n_block + b]);
            }
        }
        for (int j = 0; j < QK / 4; j++) {
            vi bv[VB];
            for (int v = 0; v < VB; v++) {
                bv[v] = load_as<vi>(g.b + ((b * (QK / 4) + j) * g.b_row + n0 + v * W) * 4);
            }
            for (int m = 0; m < MB; m++) {
                const vi am = set1(load_as<int32_t>(g.a + (m0 + m) * g.a_row + b * QK + j * 4));
                for (int v = 0; v < VB; v++) {
                    acc[m][v] = K_ROWS ? dot4(acc[m][v], am, bv[v]) : dot4(acc[m][v], bv[v], am);
                    settle(acc[m][v]);
                }
            }
        }
        for (int v = 0; v < VB; v++) {
            const vf sb = load(g.scale_b + b * g.b_row + n0 + v * W);
            for (int m = 0; m < MB; m++) {
                c[m][v] = fma(to_float(acc[m][v]), sb * g.scale_a[(m0 + m) * g.n_block + b], c[m][v]);
            }
        }
        if (g.low_a) {
            for (int v = 0; v < VB; v++) {
                const vf lb = load(g.low_b + b * g.b_row + n0 + v * W);
                for (int m = 0; m < MB; m++) {
                    c[m][v] = fma(lb, set1(g.low_a[(m0 + m) * g.n_block + b]), c[m][v]);
                }
            }
        }
    }
    for (int m = 0; m < MB; m++) {
        for (int v = 0; v < VB; v++) {
            store(g.c + (m0 + m) * g.c_row + n0 + v * W, c[m][v]);
        }
    }
}

template <bool K_ROWS, int MB> inline void idot_rows(const idot_args & g, int m0, int n) {
    int n0 = 0;
    for (; n0 + VB_I * W <= n; n0 += VB_I * W) {
        idot_tile<K_ROWS, MB, VB_I>(g, m0, n0);
    }
    for (; n0 + 2 * W <= n; n0 += 2 * W) {
        idot_tile<K_ROWS, MB, 2>(g, m0, n0);
    }
    for (; n0 < n; n0 += W) {
        idot_tile<K_ROWS, MB, 1>(g, m0, n0);
    }
}

// n: a multiple of W
template <bool K_ROWS> inline void idot(const idot_args & g, int m, int n) {
    int m0 = 0;
    for (; m0 + MB_I <= m; m0 += MB_I) {
        idot_rows<K_ROWS, MB_I>(g, m0, n);
    }
    switch (m - m0) {
        case 3: idot_rows<K_ROWS, 3>(g, m0, n); break;
        case 2: idot_rows<K_ROWS, 2>(g, m0, n); break;
        case 1: idot_rows<K_ROWS, 1>(g, m0, n); break;
    }
}

} // namespace
} // namespace intactkv
