// The product that every low-rank kernel is made of, on a panel small enough for the L1 cache:
//
//   c[m][j] += sum_i a[m][i] b[i][j]        m < rows, i < inner, j < columns
//
// a[m][i] stands at a[m * a_row + i * a_step], so it may be read either way round; b and c have
// contiguous columns, a multiple of kWidth of them. Each c[m][j] is summed in the order of i,
// whatever the panel around it: its bits do not depend on how the work was cut.
#pragma once

#include "common/vec.h"

namespace mixlora::MIXLORA_ISA {

inline constexpr int kPanelRows = 6;   // 6 x 2 sums, 2 columns of b and one a: 15 registers
inline constexpr int64_t kChain = 16;  // a longer sum is one of shorter ones: less rounding error

template <int kRows, int kVectors, class S>
INLINE void panel_block(const S* a,
                        int64_t a_row,
                        int64_t a_step,
                        const S* b,
                        int64_t b_row,
                        int64_t inner,
                        S* c,
                        int64_t c_row) {
  constexpr int kW = kWidth<S>;
  for (int64_t begin = 0; begin < inner; begin += kChain) {
    const int64_t end = begin + kChain < inner ? begin + kChain : inner;
    Vec<S> sum[kRows][kVectors] = {};
    for (int64_t i = begin; i < end; ++i) {
      Vec<S> column[kVectors];
      for (int v = 0; v < kVectors; ++v) column[v] = load(b + i * b_row + v * kW);
      for (int m = 0; m < kRows; ++m) {
        const Vec<S> factor = splat(a[m * a_row + i * a_step]);
        for (int v = 0; v < kVectors; ++v) sum[m][v] += factor * column[v];
      }
    }
    for (int m = 0; m < kRows; ++m) {
      for (int v = 0; v < kVectors; ++v) {
        S* at = c + m * c_row + v * kW;
        store(at, load(at) + sum[m][v]);
      }
    }
  }
}

template <int kRows, class S>
void panel_rows(const S* a,
                int64_t a_row,
                int64_t a_step,
                const S* b,
                int64_t b_row,
                int64_t inner,
                S* c,
                int64_t c_row,
                int64_t columns) {
  constexpr int kW = kWidth<S>;
  int64_t j = 0;
  for (; j + 2 * kW <= columns; j += 2 * kW) {
    panel_block<kRows, 2>(a, a_row, a_step, b + j, b_row, inner, c + j, c_row);
  }
  if (j < columns) panel_block<kRows, 1>(a, a_row, a_step, b + j, b_row, inner, c + j, c_row);
}

template <class S>
void panel(const S* a,
           int64_t a_row,
           int64_t a_step,
           const S* b,
           int64_t b_row,
           int64_t inner,
           S* c,
           int64_t c_row,
           int64_t rows,
           int64_t columns) {
  for (; rows >= kPanelRows; rows -= kPanelRows, a += kPanelRows * a_row, c += kPanelRows * c_row) {
    panel_rows<kPanelRows>(a, a_row, a_step, b, b_row, inner, c, c_row, columns);
  }
  switch (rows) {
    case 5:
      return panel_rows<5>(a, a_row, a_step, b, b_row, inner, c, c_row, columns);
    case 4:
      return panel_rows<4>(a, a_row, a_step, b, b_row, inner, c, c_row, columns);
    case 3:
      return panel_rows<3>(a, a_row, a_step, b, b_row, inner, c, c_row, columns);
    case 2:
      return panel_rows<2>(a, a_row, a_step, b, b_row, inner, c, c_row, columns);
    case 1:
      return panel_rows<1>(a, a_row, a_step, b, b_row, inner, c, c_row, columns);
  }
}

// dst[j][i] = src[i][j], the rows of dst being padded with zeros to dst_row.
template <class S>
void transpose(const S* src, int64_t rows, int64_t columns, S* dst, int64_t dst_row) {
  constexpr int64_t kTile = 16;  // a cache line of each side
  for (int64_t j0 = 0; j0 < columns; j0 += kTile) {
    const int64_t j1 = j0 + kTile < columns ? j0 + kTile : columns;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = j0; j < j1; ++j) dst[j * dst_row + i] = src[i * columns + j];
    }
    for (int64_t j = j0; j < j1; ++j) {
      for (int64_t i = rows; i < dst_row; ++i) dst[j * dst_row + i] = 0;
    }
  }
}

template <class T>
constexpr int64_t padded(int64_t n) {
  return (n + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}

}  // namespace mixlora::MIXLORA_ISA
