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

#include "common/vec.h"

namespace mixlora::MIXLORA_ISA {

// Of a shrink block: the copy of A takes half of a level-1 cache.
inline constexpr int kBlockRows = 48, kBlockRanks = 16, kBlockColumns = 256;
// Of an expand block.
inline constexpr int kPanelRows = 64, kPanelColumns = 96;

inline constexpr int kAhead = 8;  // rows to prefetch

// In registers: a tile's sums, one row or column of vectors, and one more.
inline constexpr int kShrinkRows = kVectorBytes == 64 ? 6 : 3, kShrinkRanks = 4;
inline constexpr int kTileSums = 12;  // 6 rows of 2 vectors, or 12 of 1

inline constexpr int64_t kChain = 32;  // a longer sum is one of shorter ones: less rounding error

// Calls body(std::integral_constant<int, n>{}) for 1 <= n; what is beyond kMost counts as kMost.
template <int kMost, class Body>
INLINE void with_constant(int64_t n, const Body& body) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_constant<kMost - 1>(n, body);
  }
  body(std::integral_constant<int, kMost>{});
}

template <class From, class To>
INLINE void convert(const From* from, int64_t count, To* to) {
  if constexpr (std::is_same_v<From, To>) {
    std::copy_n(from, count, to);  // of nothing too, wherever that is
  } else {
    for_each_vector<From>(
        count, [&](int64_t i, auto n) { store_part(to + i, load_part(from + i, n), n); });
  }
}

// Rows lie on pages of their own, where no prefetcher of the processor foresees them.
template <class T>
INLINE void prefetch(const T* from, int64_t count) {
  const char* p = reinterpret_cast<const char*>(from);
  for (const char* end = p + count * sizeof(T); p < end; p += 64) __builtin_prefetch(p);
}

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// `to` gets `count` numbers, then zeros up to `padded`.
template <class T>
INLINE void copy_padded(const T* from, int64_t count, int64_t padded, Wide<T>* to) {
  convert(from, count, to);
  std::fill(to + count, to + padded, Wide<T>(0));
}

// sums[m][r] += x[m] * a_r, lane by lane.
template <int kRows, int kRanks, class S>
INLINE void shrink_tile(const S* const* x, const S* a, int64_t columns, Vec<S>* sums) {
  Vec<S> sum[kRows][kRanks];
  for (int m = 0; m < kRows; ++m) {
    for (int r = 0; r < kRanks; ++r) sum[m][r] = sums[m * kBlockRanks + r];
  }
  for (int64_t i = 0; i < columns; i += kWidth<S>) {
    Vec<S> x_i[kRows];
    for (int m = 0; m < kRows; ++m) x_i[m] = load(x[m] + i);
    for (int r = 0; r < kRanks; ++r) {
      const Vec<S> a_i = load(a + r * kBlockColumns + i);
      for (int m = 0; m < kRows; ++m) sum[m][r] = x_i[m] * a_i + sum[m][r];
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int r = 0; r < kRanks; ++r) sums[m * kBlockRanks + r] = sum[m][r];
  }
}

// Not inlined: one copy serves all types that widen to S.
template <class S>
__attribute__((noinline)) void shrink_tiles(
    const S* const* x, int64_t rows, const S* a, int64_t ranks, int64_t columns, Vec<S>* sums) {
  with_constant<kShrinkRows>(rows, [&](auto kRows) {
    for (int64_t r = 0; r < ranks; r += kShrinkRanks) {
      with_constant<kShrinkRanks>(ranks - r, [&](auto kRanks) {
        shrink_tile<kRows, kRanks>(x, a + r * kBlockColumns, columns, sums + r);
      });
    }
  });
}

// z_NR[n, r] = scale * <x_N[n], a_RI[r]> for N <= kBlockRows. A block of columns at a time, A's are
// copied once for all rows; a row is read in place unless it must be widened or padded.
template <class X, class A>
void shrink(const X* const* x_N,
            int64_t N,
            const A* a_RI,
            int64_t R,
            int64_t I,
            Wide<X> scale,
            Wide<X>* z_NR) {
  using S = Wide<X>;
  alignas(64) S a[kBlockRanks * kBlockColumns], x_copy[kShrinkRows * kBlockColumns];
  Vec<S> sums[kBlockRows * kBlockRanks];
  for (int64_t r0 = 0; r0 < R; r0 += kBlockRanks) {
    const int64_t ranks = std::min<int64_t>(kBlockRanks, R - r0);
    std::fill(sums, sums + N * kBlockRanks, Vec<S>{});
    for (int64_t i0 = 0; i0 < I; i0 += kBlockColumns) {
      const int64_t columns = std::min<int64_t>(kBlockColumns, I - i0);
      const int64_t padded = round_up(columns, kWidth<S>);
      for (int64_t r = 0; r < ranks; ++r) {
        copy_padded(a_RI + (r0 + r) * I + i0, columns, padded, a + r * kBlockColumns);
      }
      for (int64_t n = 0; n < N; n += kShrinkRows) {
        const int64_t rows = std::min<int64_t>(kShrinkRows, N - n);
        for (int64_t m = n + kShrinkRows; m < std::min<int64_t>(n + 2 * kShrinkRows, N); ++m) {
          prefetch(x_N[m] + i0, columns);
        }
        const S* x[kShrinkRows] = {};
        for (int64_t m = 0; m < rows; ++m) {
          if constexpr (std::is_same_v<X, S>) {
            x[m] = x_N[n + m] + i0;
            if (columns == padded) continue;
          }
          copy_padded(x_N[n + m] + i0, columns, padded, x_copy + m * kBlockColumns);
          x[m] = x_copy + m * kBlockColumns;
        }
        shrink_tiles(x, rows, a, ranks, padded, sums + n * kBlockRanks);
      }
    }
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t r = 0; r < ranks; ++r) {
        z_NR[n * R + r0 + r] = scale * sum(sums[n * kBlockRanks + r]);
      }
    }
  }
}

// The numbers c(m, j) = at[m * row_stride + j * term_stride].
template <class S>
struct Coefficients {
  const S* at;
  int64_t row_stride, term_stride;

  Coefficients from(int64_t m, int64_t j) const {
    return {at + m * row_stride + j * term_stride, row_stride, term_stride};
  }
};

// y[m][i] = old[m][i] + sum_j c(m, j) a[j][i] for kVectors vectors of i.
template <int kRows, int kVectors, class S>
INLINE void panel_tile(Coefficients<S> c,
                       const S* a,
                       int64_t a_stride,
                       int64_t terms,
                       const S* const* old,
                       int64_t i,
                       S* y,
                       int64_t y_stride) {
  Vec<S> sum[kRows][kVectors] = {};
  for (int64_t j = 0; j < terms; ++j) {
    Vec<S> a_j[kVectors];
    for (int v = 0; v < kVectors; ++v) a_j[v] = load(a + i + v * kWidth<S>);
    for (int m = 0; m < kRows; ++m) {
      const Vec<S> c_m = splat(c.at[m * c.row_stride]);
      for (int v = 0; v < kVectors; ++v) sum[m][v] = c_m * a_j[v] + sum[m][v];
    }
    a += a_stride;
    c.at += c.term_stride;
  }
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = i + v * kWidth<S>;
      store(y + m * y_stride + at, load(old[m] + at) + sum[m][v]);
    }
  }
}

template <int kRows, int kVectors, class S>
void panel_rows(Coefficients<S> c,
                const S* a,
                int64_t a_stride,
                int64_t J,
                int64_t i0,
                int64_t i1,
                const S* const* from,
                S* y,
                int64_t y_stride) {
  const S* old[kRows];
  for (int m = 0; m < kRows; ++m) old[m] = from != nullptr ? from[m] : y + m * y_stride;
  for (int64_t j = 0; j == 0 || j < J; j += kChain) {
    for (int64_t i = i0; i < i1; i += kVectors * kWidth<S>) {
      panel_tile<kRows, kVectors>(
          c.from(0, j), a + j * a_stride, a_stride, std::min(kChain, J - j), old, i, y, y_stride);
    }
    for (int m = 0; m < kRows; ++m) old[m] = y + m * y_stride;
  }
}

// y[m][i] = from[m][i] + sum_j c(m, j) a[j][i] for m < M, j < J and a multiple of kWidth columns;
// without `from`, y[m][i] is added to. Not inlined: one copy serves all types that widen to S.
template <class S>
__attribute__((noinline)) void panel(Coefficients<S> c,
                                     const S* a,
                                     int64_t a_stride,
                                     int64_t M,
                                     int64_t J,
                                     int64_t columns,
                                     S* y,
                                     int64_t y_stride,
                                     const S* const* from = nullptr) {
  const auto rows = [&](auto kVectors, int64_t i0, int64_t i1) {
    constexpr int kMost = kTileSums / kVectors;
    for (int64_t m = 0; m < M && i0 < i1; m += kMost) {
      with_constant<kMost>(M - m, [&](auto kRows) {
        panel_rows<kRows, kVectors>(c.from(m, 0),
                                    a,
                                    a_stride,
                                    J,
                                    i0,
                                    i1,
                                    from != nullptr ? from + m : nullptr,
                                    y + m * y_stride,
                                    y_stride);
      });
    }
  };
  const int64_t pairs = columns / (2 * kWidth<S>)*(2 * kWidth<S>);
  rows(std::integral_constant<int, 2>{}, 0, pairs);
  rows(std::integral_constant<int, 1>{}, pairs, columns);
}

// y_m[i] = sum_j c(m, j) row(j)[i] for m < M, j < J, i < columns <= kPanelColumns; store(m, y_m)
// takes each of them. The terms are summed kPanelRows at a time, which keeps long sums accurate.
template <class S, class Row, class Store>
void expand(
    Coefficients<S> c, int64_t M, int64_t J, int64_t columns, const Row& row, const Store& store) {
  alignas(64) S a[kPanelRows * kPanelColumns], y[kBlockRows * kPanelColumns];
  const int64_t padded = round_up(columns, kWidth<S>);
  for (int64_t m0 = 0; m0 < M; m0 += kBlockRows) {
    const int64_t rows = std::min<int64_t>(kBlockRows, M - m0);
    std::fill(y, y + rows * kPanelColumns, S(0));
    for (int64_t j0 = 0; j0 < J; j0 += kPanelRows) {
      const int64_t terms = std::min<int64_t>(kPanelRows, J - j0);
      for (int64_t j = 0; j < terms; ++j) {
        if (j0 + j + kAhead < J) prefetch(row(j0 + j + kAhead), columns);
        copy_padded(row(j0 + j), columns, padded, a + j * kPanelColumns);
      }
      panel(c.from(m0, j0), a, kPanelColumns, rows, terms, padded, y, kPanelColumns);
    }
    for (int64_t m = 0; m < rows; ++m) store(m0 + m, y + m * kPanelColumns);
  }
}

// Calls body(begin, columns) for the panels of `features` columns, one after the other.
template <class Body>
void for_each_panel(int64_t features, const Body& body) {
  for (int64_t begin = 0; begin < features; begin += kPanelColumns) {
    body(begin, std::min<int64_t>(kPanelColumns, features - begin));
  }
}

// y[j] = lane j of all x. Each round zips the first half of the vectors with the second.
template <class S>
INLINE void transpose_vectors(Vec<S>* x) {
  constexpr int kW = kWidth<S>;
  using Lanes = std::conditional_t<sizeof(S) == 4, Ints, Longs>;
  Lanes low, high;
  for (int i = 0; i < kW; ++i) low[i] = i / 2 + i % 2 * kW, high[i] = low[i] + kW / 2;
  for (int round = 1; round < kW; round *= 2) {
    Vec<S> y[kW];
    for (int i = 0; i < kW / 2; ++i) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + kW / 2], low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + kW / 2], high);
    }
    for (int i = 0; i < kW; ++i) x[i] = y[i];
  }
}

// to[j][i] = from[i][j]; the rest of a row of `to` is kept.
template <class S>
void transpose(
    const S* from, int64_t rows, int64_t columns, int64_t from_stride, S* to, int64_t to_stride) {
  constexpr int64_t kW = kWidth<S>;
  for (int64_t i = 0; i < rows; i += kW) {
    for (int64_t j = 0; j < columns; j += kW) {
      if (i + kW <= rows && j + kW <= columns) {
        Vec<S> tile[kW];
        for (int n = 0; n < kW; ++n) tile[n] = load(from + (i + n) * from_stride + j);
        transpose_vectors<S>(tile);
        for (int n = 0; n < kW; ++n) store(to + (j + n) * to_stride + i, tile[n]);
        continue;
      }
      for (int64_t n = j; n < std::min(j + kW, columns); ++n) {
        for (int64_t m = i; m < std::min(i + kW, rows); ++m) {
          to[n * to_stride + m] = from[m * from_stride + n];
        }
      }
    }
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
