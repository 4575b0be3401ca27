// The two products of low-rank updates, for blocks of rows that share a matrix:
//
//   shrink    z_n[r] = scale * <x_n, a_r>          reduces along the features (I or O)
//   expand    y_m[i] = sum_j c(m, j) a_j[i]        gives features
//
// Vectors always run along the features, the long dimension, so that any rank fits; a tile of rows
// and ranks stays in registers. Rows lie anywhere (pointers), and what a block uses more than once
// is first widened and copied side by side: rows of a matrix lie a power of two apart, and would
// push each other out of the cache. Every sum is in an order that the sizes alone decide.
//
// Under expand lies panel, for a kernel that does the copying itself: a product with a matrix that
// fits in the level-1 cache, its vectors along that matrix's rows, be they features or ranks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "common/factors.h"

namespace mixlora::MIXLORA_ISA {

// Of a shrink block: the copy of A takes half of a level-1 cache.
inline constexpr int kBlockRows = 48, kBlockRanks = 16, kBlockColumns = 256;
// Of an expand block.
inline constexpr int kPanelRows = 64, kPanelColumns = 96;

inline constexpr int kAhead = 8;  // rows to prefetch

// In registers: a tile's sums, one row or column of vectors, and one more.
inline constexpr int kShrinkRows = kVectorBytes == 64 ? 6 : 3, kShrinkRanks = 4;
inline constexpr int kTileSums = kVectorBytes == 64 ? 16 : 12;  // rows of 1 vector; half of 2

inline constexpr int64_t kChain = 32;  // a longer sum is one of shorter ones: less rounding error

// Calls body(std::integral_constant<int, n>{}) for 1 <= n; what is beyond kMost counts as kMost.
template <int kMost, class Body>
INLINE void with_constant(int64_t n, const Body& body) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_constant<kMost - 1>(n, body);
  }
  body(std::integral_constant<int, kMost>{});
}

// Rows lie on pages of their own, where no prefetcher of the processor foresees them.
template <class T>
INLINE void prefetch(const T* from, int64_t count) {
  const char* p = reinterpret_cast<const char*>(from);
  for (const char* end = p + count * sizeof(T); p < end; p += 64) __builtin_prefetch(p);
}

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// `to` gets `count` numbers, then zeros up to `padded`.
template <class From, class To>
INLINE void copy_padded(const From* from, int64_t count, int64_t padded, To* to) {
  convert(from, count, to);
  std::fill(to + count, to + padded, To{});
}

// sums[m][r] += x[m] * a_r, lane by lane.
template <int kRows, int kRanks, class P>
INLINE void shrink_tile(const P* const* x, const P* a, int64_t factors, Vec<SumOf<P>>* sums) {
  Vec<SumOf<P>> sum[kRows][kRanks];
  for (int m = 0; m < kRows; ++m) {
    for (int r = 0; r < kRanks; ++r) sum[m][r] = sums[m * kBlockRanks + r];
  }
  for (int64_t i = 0; i < factors; i += kWidth<SumOf<P>>) {
    decltype(load_factors(a)) x_i[kRows];
    for (int m = 0; m < kRows; ++m) x_i[m] = load_factors(x[m] + i);
    for (int r = 0; r < kRanks; ++r) {
      const auto a_i = load_factors(a + r * kBlockColumns / kTerms<P> + i);
      for (int m = 0; m < kRows; ++m) sum[m][r] = add_lanes(x_i[m], a_i, sum[m][r]);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int r = 0; r < kRanks; ++r) sums[m * kBlockRanks + r] = sum[m][r];
  }
}

// Not inlined: one copy serves all types of the same factors.
template <class P>
__attribute__((noinline)) void shrink_tiles(const P* const* x,
                                            int64_t rows,
                                            const P* a,
                                            int64_t ranks,
                                            int64_t factors,
                                            Vec<SumOf<P>>* sums) {
  with_constant<kShrinkRows>(rows, [&](auto kRows) {
    for (int64_t r = 0; r < ranks; r += kShrinkRanks) {
      with_constant<kShrinkRanks>(ranks - r, [&](auto kRanks) {
        shrink_tile<kRows, kRanks>(x, a + r * kBlockColumns / kTerms<P>, factors, sums + r);
      });
    }
  });
}

// z_NR[n, r] = scale * <x_N[n], a_RI[r]> for N <= kBlockRows. A block of columns at a time, A's are
// copied once for all rows; a row is read in place unless it must be converted or padded.
template <class X, class A>
void shrink(const X* const* x_N,
            int64_t N,
            const A* a_RI,
            int64_t R,
            int64_t I,
            Wide<X> scale,
            Wide<X>* z_NR) {
  using S = Wide<X>;
  using P = std::conditional_t<std::is_same_v<X, A>, FactorOf<X>, S>;
  using K = Kept<P>;
  alignas(64) K a[kBlockRanks * kBlockColumns], x_copy[kShrinkRows * kBlockColumns];
  Vec<S> sums[kBlockRows * kBlockRanks];
  for (int64_t r0 = 0; r0 < R; r0 += kBlockRanks) {
    const int64_t ranks = std::min<int64_t>(kBlockRanks, R - r0);
    std::fill(sums, sums + N * kBlockRanks, Vec<S>{});
    for (int64_t i0 = 0; i0 < I; i0 += kBlockColumns) {
      const int64_t columns = std::min<int64_t>(kBlockColumns, I - i0);
      const int64_t padded = round_up(columns, kWidth<S> * kTerms<P>);
      for (int64_t r = 0; r < ranks; ++r) {
        copy_padded(a_RI + (r0 + r) * I + i0, columns, padded, a + r * kBlockColumns);
      }
      for (int64_t n = 0; n < N; n += kShrinkRows) {
        const int64_t rows = std::min<int64_t>(kShrinkRows, N - n);
        for (int64_t m = n + kShrinkRows; m < std::min<int64_t>(n + 2 * kShrinkRows, N); ++m) {
          prefetch(x_N[m] + i0, columns);
        }
        const P* x[kShrinkRows] = {};
        for (int64_t m = 0; m < rows; ++m) {
          const void* row = x_N[n + m] + i0;
          if (!std::is_same_v<X, K> || columns != padded) {
            row = x_copy + m * kBlockColumns;
            copy_padded(x_N[n + m] + i0, columns, padded, x_copy + m * kBlockColumns);
          }
          x[m] = static_cast<const P*>(row);
        }
        const P* a_factors = reinterpret_cast<const P*>(a);
        shrink_tiles(x, rows, a_factors, ranks, padded / kTerms<P>, sums + n * kBlockRanks);
      }
    }
    for (int64_t n = 0; n < N; ++n) {
      for_each_vector<S>(ranks, [&](int64_t r, auto count) {
        store_part(
            z_NR + n * R + r0 + r, scale * lane_sums<S>(sums + n * kBlockRanks + r, count), count);
      });
    }
  }
}

// The factors c(m, j) = at[m * row_stride + j * term_stride].
template <class P>
struct Coefficients {
  const P* at;
  int64_t row_stride, term_stride;

  Coefficients from(int64_t m, int64_t j) const {
    return {at + m * row_stride + j * term_stride, row_stride, term_stride};
  }
};

// y_M[m][i] += sum_j c(m, j) a[j][i] for kVectors vectors of i.
template <int kRows, int kVectors, class P, class S>
INLINE void panel_tile(
    Coefficients<P> c, const P* a, int64_t a_stride, int64_t factors, int64_t i, S* const* y_M) {
  Vec<S> sum[kRows][kVectors] = {};
  for (int64_t j = 0; j < factors; ++j) {
    decltype(load_factors(a)) a_j[kVectors];
    for (int v = 0; v < kVectors; ++v) a_j[v] = load_factors(a + i + v * kWidth<S>);
    for (int m = 0; m < kRows; ++m) {
      const P* c_m = c.at + m * c.row_stride;
      for (int v = 0; v < kVectors; ++v) sum[m][v] = add_product(c_m, a_j[v], sum[m][v]);
    }
    a += a_stride;
    c.at += c.term_stride;
  }
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kVectors; ++v) {
      S* y = y_M[m] + i + v * kWidth<S>;
      store(y, load(y) + sum[m][v]);
    }
  }
}

// y_M[m][i] += sum_j c(m, j) a[j][i] for m < M, j < J factors and i < columns, a multiple of
// kWidth; the y of two rows may be one. Not inlined: one copy serves all types of the same factors.
template <class P>
__attribute__((noinline)) void panel(Coefficients<P> c,
                                     const P* a,
                                     int64_t a_stride,
                                     int64_t M,
                                     int64_t J,
                                     int64_t columns,
                                     SumOf<P>* const* y_M) {
  constexpr int64_t kW = kWidth<SumOf<P>>, kChainFactors = kChain / kTerms<P>;
  const auto tiles = [&](auto kVectors, int64_t begin, int64_t end) {
    constexpr int kMost = kTileSums / kVectors;
    for (int64_t m = 0; m < M && begin < end; m += kMost) {
      with_constant<kMost>(M - m, [&](auto kRows) {
        for (int64_t j = 0; j < J; j += kChainFactors) {
          const int64_t factors = std::min(kChainFactors, J - j);
          for (int64_t i = begin; i < end; i += kVectors * kW) {
            panel_tile<kRows, kVectors>(
                c.from(m, j), a + j * a_stride, a_stride, factors, i, y_M + m);
          }
        }
      });
    }
  };
  const int64_t pairs = columns / (2 * kW) * (2 * kW);
  tiles(std::integral_constant<int, 2>{}, 0, pairs);
  tiles(std::integral_constant<int, 1>{}, pairs, columns);
}

// y_m[i] = sum_j c(m, j) row(j)[i] for m < M, j < J terms, i < columns <= kPanelColumns;
// store(m, y_m) takes each of them. The terms are summed kPanelRows at a time, which keeps long
// sums accurate.
template <class P, class Row, class Store>
void expand(
    Coefficients<P> c, int64_t M, int64_t J, int64_t columns, const Row& row, const Store& store) {
  using S = SumOf<P>;
  alignas(64) P a[kPanelRows / kTerms<P> * kPanelColumns];
  alignas(64) S y[kBlockRows * kPanelColumns];
  S* y_M[kBlockRows];
  for (int64_t m = 0; m < kBlockRows; ++m) y_M[m] = y + m * kPanelColumns;
  const int64_t padded = round_up(columns, kWidth<S>);
  for (int64_t m0 = 0; m0 < M; m0 += kBlockRows) {
    const int64_t rows = std::min<int64_t>(kBlockRows, M - m0);
    std::fill(y, y + rows * kPanelColumns, S(0));
    for (int64_t j0 = 0; j0 < J; j0 += kPanelRows) {
      const int64_t terms = std::min<int64_t>(kPanelRows, J - j0);
      pack_rows(
          terms,
          columns,
          [&](int64_t j) {
            if (j0 + j + kAhead < J) prefetch(row(j0 + j + kAhead), columns);
            return row(j0 + j);
          },
          a,
          kPanelColumns);
      panel(c.from(m0, j0 / kTerms<P>), a, kPanelColumns, rows, num_factors<P>(terms), padded, y_M);
    }
    for (int64_t m = 0; m < rows; ++m) store(m0 + m, y_M[m]);
  }
}

// Calls body(begin, columns) for the panels of `features` columns, one after the other.
template <class Body>
void for_each_panel(int64_t features, const Body& body) {
  for (int64_t begin = 0; begin < features; begin += kPanelColumns) {
    body(begin, std::min<int64_t>(kPanelColumns, features - begin));
  }
}

struct RowBlock {
  int64_t group, begin, end;
};

// The rows of every group, cut into blocks that never straddle two groups.
inline std::vector<RowBlock> row_blocks(const int32_t* start_G1, int64_t G) {
  std::vector<RowBlock> blocks;
  for (int64_t g = 0; g < G; ++g) {
    for (int64_t begin = start_G1[g]; begin < start_G1[g + 1]; begin += kBlockRows) {
      blocks.push_back({g, begin, std::min<int64_t>(begin + kBlockRows, start_G1[g + 1])});
    }
  }
  return blocks;
}

}  // namespace mixlora::MIXLORA_ISA
