// Products of a matrix with few rows, which take as long as the matrix takes to be read: it is read
// in place, a vector at a time, and never copied. What is used more than once are the rows.
//
//   few_rows_shrink    y_n[o] = <x_n, w_o>       w_o is long: a sum for each lane, then one of them
//   few_rows_expand    y_n[o] += <a_n, w_o>      w_o is short: the sums of kWidth outputs at once
//   few_rows_add       either of them, to be added
//
// A row's sums are in one order, whatever rows are beside it.
#pragma once

#include "common/buffer.h"
#include "common/low_rank.h"

namespace mixlora::MIXLORA_ISA {

inline constexpr int64_t kFewRows = 32;  // for more, w is read again

// Copies of rows that lie anywhere. Where they lie a power of two apart they would push each other,
// and w's rows, out of the cache.
template <class T>
struct FewRows {
  int64_t stride;
  Buffer<Wide<T>> copies;
  std::vector<const Wide<T>*> rows;

  // row(n) points to the features of row n < N.
  template <class Row>
  FewRows(int64_t N, int64_t I, const Row& row)
      : stride(round_up(I, 16) + 16), copies(buffer<Wide<T>>(N * stride)), rows(N) {
    for (int64_t n = 0; n < N; ++n) {
      convert(row(n), I, copies.get() + n * stride);
      rows[n] = copies.get() + n * stride;
    }
  }
};

// Of a tile in registers; and the columns of w's rows that stay in the level-1 cache for all tiles,
// which has room for no more than 8 rows that lie a power of two apart.
inline constexpr int kFewTileRows = kVectorBytes == 64 ? 4 : 2, kFewTileOutputs = 6;
inline constexpr int64_t kFewTileColumns = 1024;

// Fetches p's line into the level-2 cache. In assembly, since gcc 12 takes a loop of nothing but
// __builtin_prefetch for an empty one.
INLINE void prefetch_line(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht1 (%0)" ::"r"(p));
#else
  __builtin_prefetch(p, 0, 2);
#endif
}

// sums[m][o] += x[m] * w_o, lane by lane, w's rows being `stride` apart. Beside it, what is next
// read from memory is fetched.
template <int kRows, int kOut, class W, class S, class Next>
INLINE void few_rows_tile(const S* const* x,
                          int64_t i0,
                          const W* w,
                          int64_t stride,
                          int64_t columns,
                          const Next& fetch,
                          Vec<S>* sums) {
  Vec<S> sum[kRows][kOut];
  for (int m = 0; m < kRows; ++m) {
    for (int o = 0; o < kOut; ++o) sum[m][o] = sums[m * kFewTileOutputs + o];
  }
  for_each_vector<W>(columns, [&](int64_t i, auto n) {
    fetch(i);
    Vec<S> x_i[kRows];
    for (int m = 0; m < kRows; ++m) x_i[m] = load_part(x[m] + i0 + i, n);
    for (int o = 0; o < kOut; ++o) {
      Vec<S> w_i = load_part(w + o * stride + i, n);
      in_register(w_i);
      for (int m = 0; m < kRows; ++m) sum[m][o] = x_i[m] * w_i + sum[m][o];
    }
  });
  for (int m = 0; m < kRows; ++m) {
    for (int o = 0; o < kOut; ++o) sums[m * kFewTileOutputs + o] = sum[m][o];
  }
}

// y_N[n][o] = <x_N[n], w_OI[o]>, w's rows being `stride` apart.
template <class W, class S>
void few_rows_shrink(const S* const* x_N,
                     int64_t N,
                     const W* w_OI,
                     int64_t O,
                     int64_t I,
                     int64_t stride,
                     S* const* y_N) {
  for (; N > kFewRows; N -= kFewRows, x_N += kFewRows, y_N += kFewRows) {
    few_rows_shrink(x_N, kFewRows, w_OI, O, I, stride, y_N);
  }
  Vec<S> sums[kFewRows * kFewTileOutputs];
  for (int64_t o0 = 0; o0 < O; o0 += kFewTileOutputs) {
    const int64_t outputs = std::min<int64_t>(kFewTileOutputs, O - o0);
    std::fill(sums, sums + N * kFewTileOutputs, Vec<S>{});
    with_constant<kFewTileOutputs>(outputs, [&](auto kOut) {
      for (int64_t i = 0; i < I; i += kFewTileColumns) {
        const int64_t columns = std::min(kFewTileColumns, I - i);
        const W* w = w_OI + o0 * stride + i;
        const W* next = i + kFewTileColumns < I ? w + kFewTileColumns : w_OI + (o0 + kOut) * stride;
        const int64_t tiles = (N + kFewTileRows - 1) / kFewTileRows;
        for (int64_t n = 0; n < N; n += kFewTileRows) {
          // each of the tiles its share: memory takes no more at once
          const int64_t tile = n / kFewTileRows;
          const int64_t first = tile * kOut / tiles, last = (tile + 1) * kOut / tiles;
          const auto fetch = [&](int64_t c) {
            if (c * sizeof(W) % 64 != 0) return;
            for (int64_t o = first; o < last; ++o) prefetch_line(next + o * stride + c);
          };
          with_constant<kFewTileRows>(N - n, [&](auto kRows) {
            few_rows_tile<kRows, kOut>(
                x_N + n, i, w, stride, columns, fetch, sums + n * kFewTileOutputs);
          });
        }
      }
      for (int64_t n = 0; n < N; ++n) {
        for (int64_t o = 0; o < kOut; o += kWidth<S>) {
          const int64_t count = std::min<int64_t>(kWidth<S>, kOut - o);
          const Vec<S> y = lane_sums<S>(sums + n * kFewTileOutputs + o, count);
          store_part(y_N[n] + o0 + o, y, count);
        }
      }
    });
  }
}

// y_N[n][o] += <a_N[n], w_OR[o]>; R is a multiple of kWidth, and a constant where it can be.
template <class A, class W, class S>
INLINE void few_rows_short(
    const A* const* a_N, int64_t N, const W* w_OR, int64_t O, auto R, S* const* y_N) {
  constexpr int kW = kWidth<S>;
  const auto dot = [&](const A* a, const W* w_R) {
    Vec<S> sum{};
    for (int64_t r = 0; r < R; r += kW) sum = load(a + r) * load(w_R + r) + sum;
    return sum;
  };
  int64_t o = 0;
  for (; o + kW <= O; o += kW) {
    for (int64_t n = 0; n < N; ++n) {
      Vec<S> sums[kW];
      for (int i = 0; i < kW; ++i) sums[i] = dot(a_N[n], w_OR + (o + i) * R);
      store(y_N[n] + o, load(y_N[n] + o) + lane_sums<S>(sums, kW));
    }
  }
  for (; o < O; ++o) {
    for (int64_t n = 0; n < N; ++n) y_N[n][o] += sum(dot(a_N[n], w_OR + o * R));
  }
}

// The same for any multiple of kWidth.
template <class A, class W, class S>
void few_rows_expand(
    const A* const* a_N, int64_t N, const W* w_OR, int64_t O, int64_t R, S* const* y_N) {
  constexpr int kMostVectors = 4;
  if (R == 0) return;
  with_constant<kMostVectors + 1>(R / kWidth<S>, [&](auto n) {
    constexpr std::integral_constant<int64_t, n * kWidth<S>> kRanks;
    if constexpr (n <= kMostVectors) {
      few_rows_short(a_N, N, w_OR, O, kRanks, y_N);
    } else {
      few_rows_short(a_N, N, w_OR, O, R, y_N);
    }
  });
}

inline constexpr int64_t kShort = 64;  // features, as the rank of a LoRA's B

// y_N[n][o] += <x_N[n], w_OI[o]>, whatever I.
template <class W, class S>
void few_rows_add(
    const S* const* x_N, int64_t N, const W* w_OI, int64_t O, int64_t I, S* const* y_N) {
  if (I <= kShort && I % kWidth<S> == 0) return few_rows_expand(x_N, N, w_OI, O, I, y_N);
  std::vector<S> more(N * O);
  std::vector<S*> more_N(N);
  for (int64_t n = 0; n < N; ++n) more_N[n] = more.data() + n * O;
  few_rows_shrink(x_N, N, w_OI, O, I, I, more_N.data());
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t o = 0; o < O; ++o) y_N[n][o] += more_N[n][o];
  }
}

}  // namespace mixlora::MIXLORA_ISA
