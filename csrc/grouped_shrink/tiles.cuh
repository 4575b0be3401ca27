// What the three products of grouped_shrink share: tiles in shared memory, and their products.
//
// Group e has the rows [start_E1[e], start_E1[e + 1]); row n is slot slot_N[n] (null: n) of the
// token t = slot / K, and ascends with n within a group. Grids are bounds that shapes give: which
// rows a block has is read by the block, and those without any leave.
//
// All three multiply 16 rows of one tile in shared memory by another: Bf16 and Fp16 on tensor
// cores, float and double by ordinary arithmetic, with the sums in the same lanes. Tiles come by
// copies that run some steps ahead, or where rows do not begin at multiples of 16 bytes element by
// element, and hold zeros behind the last row and column. Ranks beyond kMaxRanks take more blocks,
// or more steps.
//
// Numbers that were computed as fp32 are given to tensor cores as kParts = 2 of 16 bits, the second
// being what the first leaves.
#pragma once

#include <utility>

#include "common/mma.cuh"
#include "grouped_shrink/grouped_shrink.h"

namespace mixlora {
namespace {

struct GroupedRows {
  const int32_t* start_E1;
  const int32_t* slot_N;
  const int32_t* expert_TK;  // -1: an empty slot; null: those behind the rows are empty
  int64_t T, K, E;

  __device__ int slot(int64_t n) const {
    const int slot = slot_N ? slot_N[n] : static_cast<int>(n);
    CHECK_INDEX(slot, 0, T * K);
    return slot;
  }
};

constexpr int kWarps = 4, kThreads = kWarps * kLanes, kStages = 4;
constexpr int kTileRows = 64, kTileColumns = 64;

// 128 bytes of a row.
template <class T>
inline constexpr int kStep = 128 / sizeof(T);
template <class T>
inline constexpr int kMaxRanks = kStep<T>;

// Of a tile's rows: 16 bytes more than they hold, so that eight of them lie in different banks.
template <class T>
__host__ __device__ constexpr int stride(int columns) {
  return columns + 16 / sizeof(T);
}

__device__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ int64_t to_16(int64_t n) { return (n + 15) / 16 * 16; }

__device__ int thread() { return threadIdx.y * kLanes + threadIdx.x; }

// tile[r][c] = row(r)[c] for c < columns, and 0 behind them and where row(r) is null.
template <class T, class Row>
__device__ void load_tile(
    T* tile, int num_rows, int num_columns, const Row& row, int64_t columns, bool aligned) {
  constexpr int kChunk = 16 / sizeof(T);
  const int chunks = num_columns / kChunk;
  for (int i = thread(); i < num_rows * chunks; i += kThreads) {
    const int r = i / chunks, c = i % chunks * kChunk;
    const T* from = row(r);
    T* to = tile + r * stride<T>(num_columns) + c;
    if (aligned) {
      const bool valid = from && c < columns;
      copy_async(to, valid ? from + c : from, valid);
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) to[j] = from && c + j < columns ? from[c + j] : T{};
    }
  }
}

// sums[j] += a b_j of 16 rows, `depth` terms and the tiles of 8 columns below `columns`. The
// factors lie as load_a and load_b say.
template <bool kTurnedA, bool kTurnedB, int kTiles, class T>
__device__ void multiply_tiles(SumsOf<Wide<T>> (&sums)[kTiles],
                               int depth,
                               int columns,
                               const T* a,
                               int a_stride,
                               const T* b,
                               int b_stride) {
  if constexpr (sizeof(T) == 2) {
    for (int k = 0; k < depth; k += 16) {
      const TileA a_tile = load_a<kTurnedA>(a + (kTurnedA ? k * a_stride : k), a_stride);
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        if (8 * j >= columns) break;
        const int column = 8 * j;
        TileB b_tiles[2];
        load_b<kTurnedB>(
            b_tiles, b + (kTurnedB ? column * b_stride + k : k * b_stride + column), b_stride);
        multiply<T>(sums[j], a_tile, b_tiles[0]);
        multiply<T>(sums[j + 1], a_tile, b_tiles[1]);
      }
    }
  } else {
    for (int k = 0; k < depth; ++k) {
      T a_of_row[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = sum_row(2 * i);
        a_of_row[i] = kTurnedA ? a[k * a_stride + row] : a[row * a_stride + k];
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (8 * j >= columns) break;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = 8 * j + sum_column(i);
          const T b_of_column = kTurnedB ? b[column * b_stride + k] : b[k * b_stride + column];
          sums[j].x[i] += a_of_row[0] * b_of_column;
          sums[j].x[i + 2] += a_of_row[1] * b_of_column;
        }
      }
    }
  }
}

// Calls load(step) some steps ahead and multiply(step), for the steps below num_steps; both take
// the tiles of step % kStages.
template <class Load, class Multiply>
__device__ void pipeline(int num_steps, const Load& load, const Multiply& multiply) {
  const auto load_ahead = [&](int step) {
    if (step < num_steps) load(step);
    commit_copies();
  };
  for (int step = 0; step < kStages - 1; ++step) load_ahead(step);
  for (int step = 0; step < num_steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // all see this step's tiles, and have read those that are overwritten now
    load_ahead(step + kStages - 1);
    multiply(step);
  }
}

// Of tiles of so many rows and columns.
template <class T>
int64_t tile_bytes(std::initializer_list<std::pair<int64_t, int64_t>> rows_and_columns) {
  int64_t bytes = 0;
  for (const auto& [rows, columns] : rows_and_columns)
    bytes += rows * stride<T>(columns) * sizeof(T);
  return bytes;
}

template <class T>
bool aligned(const T* rows, int64_t columns) {
  return all_aligned(16, columns * sizeof(T), {rows});
}

template <class T>
int64_t padded_ranks(int64_t R) {
  return std::min<int64_t>(kMaxRanks<T>, to_16(R));
}

GroupedRows rows_of(const GroupedShrinkParams& p) {
  return {p.expert_start_E1, p.row_slot_N, p.expert_TK, p.T, p.K, p.E};
}

// Calls body(zero, constant) with the number of parts, which only 16-bit numbers have more than one
// of.
template <class Body>
void with_parts(Dtype dtype, int num_parts, const Body& body) {
  with_type(dtype, [&](auto zero) {
    if constexpr (sizeof zero == 2) {
      if (num_parts == 2) return body(zero, std::integral_constant<int, 2>{});
    }
    body(zero, std::integral_constant<int, 1>{});
  });
}

}  // namespace
}  // namespace mixlora
