// Which lane of a warp has what of a tile, and products.
//
// A warp takes 16 tokens of token_order_T, which brings them few experts, and walks along F in
// steps of kColumns columns. Of a tile [16, kColumns] a lane has
//
//   rows      lane / 4 and lane / 4 + 8
//   columns   kPer that lie side by side, from lane % 4 * kPer on: one load of each row
//
// A product y[m][n] = sum_j left[m][j] right[n][j] is taken 16 rows, 8 columns and 16 terms at a
// time (common/mma.cuh). Terms lie side by side in both operands, and which of them is called the
// j-th does not matter where both agree: lane l has four terms of left's rows l / 4 and l / 4 + 8,
// and four of right's row l / 4. So a tile is a left operand as it lies in registers, its columns
// being the terms, and an operand in memory is loaded four numbers at a time.
#pragma once

#include <cstring>

#include "common/mma.cuh"

namespace mixlora {
namespace {

constexpr int kWarps = 4, kRows = 16, kBlockRows = kWarps * kRows;

template <class T>
constexpr int kPer = sizeof(T) == 2 ? 8 : 4;
template <class T>
constexpr int kColumns = 4 * kPer<T>;

template <class T>
using Four = Pack<T, 4>;

// sums[j].x[2 * h + i]: row h of the lane's two, column 2 * j + i of its kPer.
template <class T>
struct Tile {
  SumsOf<Wide<T>> sums[kPer<T> / 2];

  __device__ Wide<T>& at(int h, int c) { return sums[c / 2].x[2 * h + c % 2]; }
  __device__ const Wide<T>& at(int h, int c) const { return sums[c / 2].x[2 * h + c % 2]; }
};

// Calls body(h, c) for each of the lane's two rows and kSize columns.
template <int kSize, class Body>
__device__ void for_each_place(const Body& body) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int c = 0; c < kSize; ++c) body(h, c);
  }
}

template <class X>
__device__ X smaller(X a, X b) {
  return a < b ? a : b;
}
inline __device__ int lane_row() { return threadIdx.x / 4; }
inline __device__ int lane_quarter() { return threadIdx.x % 4; }

// 16 rows of 16 terms, of which a lane has four of its two rows.
template <class T>
struct Left {
  Four<T> rows[2];
};
template <>
struct Left<Bf16> {
  TileA x;
};

template <class T>
__device__ Left<T> left_of(const Four<T> (&rows)[2]) {
  if constexpr (std::is_same_v<T, Bf16>) {
    uint32_t words[2][2];
    memcpy(words, rows, sizeof words);
    return {{words[0][0], words[1][0], words[0][1], words[1][1]}};
  } else {
    return {rows[0], rows[1]};
  }
}

// Of rows in memory; `rows` are this lane's two.
template <class T>
__device__ Left<T> load_left(const T* row0, const T* row1) {
  const int j = 4 * lane_quarter();
  return left_of<T>({load_pack<4>(row0 + j), load_pack<4>(row1 + j)});
}

// sums += left right; at(n, quarter) points to four terms of right's row n. Where there are no
// tensor cores for T, lanes get each other's terms of left.
template <class T, class At>
__device__ void add_product(SumsOf<Wide<T>>& sums, const Left<T>& left, const At& at) {
  if constexpr (std::is_same_v<T, Bf16>) {
    const Four<T> row = load_pack<4>(at(lane_row(), lane_quarter()));
    TileB right;
    memcpy(right.x, row.x, sizeof right.x);
    multiply<T>(sums, left.x, right);
  } else {
#pragma unroll 1
    for (int d = 0; d < 4; ++d) {
      const int quarter = lane_quarter() ^ d;
      const Four<T> right[2] = {load_pack<4>(at(2 * lane_quarter(), quarter)),
                                load_pack<4>(at(2 * lane_quarter() + 1, quarter))};
      for_each_place<4>([&](int h, int j) {
        const T x = __shfl_xor_sync(kAllLanes, left.rows[h].x[j], d);
        sums.x[2 * h] += x * right[0].x[j];
        sums.x[2 * h + 1] += x * right[1].x[j];
      });
    }
  }
}

// y[row][column] = sum over r of a[row][r] b[column][r]; a0 and a1 are those of the lane's rows.
template <class T>
__device__ Tile<T> expand(const T* a0, const T* a1, const T* b_FR, int R) {
  Tile<T> y = {};
#pragma unroll 1
  for (int r = 0; r < R; r += 16) {
    const Left<T> left = load_left(a0 + r, a1 + r);
#pragma unroll
    for (int j = 0; j < kPer<T> / 2; ++j) {
      add_product(y.sums[j], left, [&](int n, int quarter) {
        const int column = n / 2 * kPer<T> + 2 * j + n % 2;
        return b_FR + column * R + r + 4 * quarter;
      });
    }
  }
  return y;
}

// sums[row][r] += sum over columns of x[row][column] a[r][column], in the rows that are `mine`.
// Eight ranks are kLanes groups of four sums.
template <class T>
__device__ void shrink(
    const Tile<T>& x, const T* a_RF, int64_t F, int R, const bool (&mine)[2], Wide<T>* sums) {
  Left<T> left[kPer<T> / 4];
#pragma unroll
  for (int j = 0; j < kPer<T> / 4; ++j) {
    Four<T> rows[2];
    for_each_place<4>([&](int h, int c) { narrow(x.at(h, 4 * j + c), rows[h].x[c]); });
    left[j] = left_of<T>(rows);
  }
#pragma unroll 1
  for (int r = 0; r < R; r += 8, sums += 4 * kLanes) {
    SumsOf<Wide<T>> y = {};
#pragma unroll
    for (int j = 0; j < kPer<T> / 4; ++j) {
      add_product(y, left[j], [&](int n, int quarter) {
        return a_RF + (r + n) * F + quarter * kPer<T> + 4 * j;
      });
    }
    auto total = load_pack<4>(sums);
    for_each_place<2>([&](int h, int i) { total.x[2 * h + i] += mine[h] ? y.x[2 * h + i] : 0; });
    store_pack(sums, total);
  }
}

}  // namespace
}  // namespace mixlora
