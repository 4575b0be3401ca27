// Products with the matrix of each row's group, for w [E, R, I] (or turned, [E, I, R]) and few
// ranks:
//
//   shrink   a[slot, r]  = sum_i w_e[r, i] x[t, i]
//   expand   x[t, i]     = sum of the token's slots, by expert: sum_r w_e[r, i] a[slot, r]
//   outer    w_e[r, i]   = sum of the group's rows: a[slot, r] x[t, i]
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
#include <utility>

#include "common/cuda.cuh"
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

struct RowTile {
  int group, begin, end;  // none: begin == end
};

// Groups have as many tiles of kTileRows as they need, one behind the other: which is the tile
// `index`? All lanes of a warp ask together.
__device__ RowTile find_tile(const GroupedRows& rows, int64_t index) {
  for (int64_t first = 0; first < rows.E; first += kLanes) {
    const int64_t e = first + threadIdx.x;
    const int begin = e < rows.E ? rows.start_E1[e] : 0,
              end = e < rows.E ? rows.start_E1[e + 1] : 0;
    CHECK_INDEX(begin, 0, end + 1);
    CHECK_INDEX(end, begin, rows.T * rows.K + 1);
    const int tiles = (end - begin + kTileRows - 1) / kTileRows;
    int behind = tiles;  // of this group and those before it
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const int other = __shfl_up_sync(kAllLanes, behind, distance);
      if (static_cast<int>(threadIdx.x) >= distance) behind += other;
    }
    const unsigned later = __ballot_sync(kAllLanes, index < behind);
    if (later) {
      const int lane = __popc(~later & (later - 1));  // the first of them
      const int tile_begin = begin + static_cast<int>(index - (behind - tiles)) * kTileRows;
      const int tile_end = smaller(tile_begin + kTileRows, end);
      return {static_cast<int>(first) + lane,
              __shfl_sync(kAllLanes, tile_begin, lane),
              __shfl_sync(kAllLanes, tile_end, lane)};
    }
    index -= __shfl_sync(kAllLanes, behind, kLanes - 1);
  }
  return {0, 0, 0};
}

template <class T>
struct Shrink {
  GroupedRows rows;
  const T *x_TI, *w;
  int64_t I, R;
  int64_t columns_of_split;
  bool aligned_x, aligned_w;
  Wide<T>* sums_ZNR;  // of each split of the columns, by slot
};

//   blockIdx.x       64 rows of one group, 16 for each warp
//   blockIdx.y       kMaxRanks ranks
//   blockIdx.z       the split of the columns i, in steps of 128 bytes
template <class T, bool kTransposed>
__global__ void shrink_kernel(Shrink<T> p) {
  const RowTile tile = find_tile(p.rows, blockIdx.x);
  if (tile.begin == tile.end) return;
  SHARED_ARRAY(int[kTileRows], slot_of_row);
  for (int r = thread(); r < kTileRows; r += kThreads) {
    slot_of_row[r] = tile.begin + r < tile.end ? p.rows.slot(tile.begin + r) : -1;
  }
  __syncthreads();

  const int first_rank = blockIdx.y * kMaxRanks<T>;
  const int ranks = smaller(p.R - first_rank, kMaxRanks<T>), tile_ranks = to_16(ranks);
  const int64_t begin = blockIdx.z * p.columns_of_split;
  const int64_t end = smaller(begin + p.columns_of_split, p.I);
  const int w_rows = kTransposed ? kStep<T> : tile_ranks;
  const int w_columns = kTransposed ? tile_ranks : kStep<T>;
  const int x_stride = stride<T>(kStep<T>), w_stride = stride<T>(w_columns);
  const int x_size = kTileRows * x_stride, size = x_size + w_rows * w_stride;
  const T* w = p.w + tile.group * p.R * p.I;
  DYNAMIC_SHARED(T, tiles);

  SumsOf<Wide<T>> sums[kMaxRanks<T> / 8];
  const auto load = [&](int step) {
    T* x_tile = tiles + step % kStages * size;
    const int64_t i0 = begin + step * kStep<T>;
    const auto x_row = [&](int r) -> const T* {
      const int slot = slot_of_row[r];
      return slot < 0 ? nullptr : p.x_TI + slot / static_cast<int>(p.rows.K) * p.I + i0;
    };
    load_tile(x_tile, kTileRows, kStep<T>, x_row, end - i0, p.aligned_x);
    const auto w_row = [&](int r) -> const T* {
      if constexpr (kTransposed) {
        return i0 + r < end ? w + (i0 + r) * p.R + first_rank : nullptr;
      } else {
        return r < ranks ? w + (first_rank + r) * p.I + i0 : nullptr;
      }
    };
    const int64_t columns = kTransposed ? ranks : end - i0;
    load_tile(x_tile + x_size, w_rows, w_columns, w_row, columns, p.aligned_w);
  };
  pipeline((end - begin + kStep<T> - 1) / kStep<T>, load, [&](int step) {
    if (tile.begin + 16 * static_cast<int>(threadIdx.y) >= tile.end) return;
    const T* x_tile = tiles + step % kStages * size;
    multiply_tiles<false, !kTransposed>(sums,
                                        to_16(smaller(end - begin - step * kStep<T>, kStep<T>)),
                                        ranks,
                                        x_tile + 16 * threadIdx.y * x_stride,
                                        x_stride,
                                        x_tile + x_size,
                                        w_stride);
  });

  Wide<T>* sums_NR = p.sums_ZNR + blockIdx.z * p.rows.T * p.rows.K * p.R;
#pragma unroll
  for (int j = 0; j < kMaxRanks<T> / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int slot = slot_of_row[16 * threadIdx.y + sum_row(i)], rank = 8 * j + sum_column(i);
      if (slot >= 0 && rank < ranks) sums_NR[slot * p.R + first_rank + rank] = sums[j].x[i];
    }
  }
}

// a = scaling times the sum of the splits, in kParts parts that lie N R apart; a thread for each.
template <class T, int kParts>
__global__ void add_splits_kernel(Shrink<T> p, int num_splits, Wide<T> scaling, T* a_NR) {
  const int64_t size = p.rows.T * p.rows.K * p.R;
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= size) return;
  const int64_t slot = at / p.R;
  Wide<T> sum = 0;
  if (p.rows.expert_TK ? p.rows.expert_TK[slot] >= 0 : slot < p.rows.start_E1[p.rows.E]) {
    for (int z = 0; z < num_splits; ++z) sum += p.sums_ZNR[z * size + at];
  }
  sum *= scaling;
  for (int part = 0; part < kParts; ++part) {
    narrow(sum, a_NR[part * size + at]);
    sum -= widen(a_NR[part * size + at]);
  }
}

// Tokens whose sums are in the making together.
template <class T>
inline constexpr int kTokens = sizeof(T) == 8 ? 64 : 128;
constexpr int kSumStride = kTileColumns + 8, kBuffers = 2;

template <class T>
struct Expand {
  GroupedRows rows;
  const T *a_NR, *w;
  int64_t I, R;
  const int32_t* bounds_CE;  // the first row of the group whose token is in the chunk, or behind it
  bool aligned_a, aligned_w, aligned_x;
  T* x_TI;
};

// A thread for each bound, of one chunk more than there are.
__global__ void find_bounds_kernel(GroupedRows rows,
                                   int64_t slots_of_chunk,
                                   int64_t num_bounds,
                                   int32_t* bounds_CE) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= num_bounds) return;
  const int64_t e = at % rows.E, first_slot = at / rows.E * slots_of_chunk;
  int low = rows.start_E1[e], high = rows.start_E1[e + 1];
  CHECK_INDEX(low, 0, high + 1);
  CHECK_INDEX(high, low, rows.T * rows.K + 1);
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (rows.slot(middle) < first_slot) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  bounds_CE[at] = low;
}

// What a step of expand takes: some rows of a group, and some of its ranks.
struct Item {
  int64_t group;
  int rows_begin, rows_end, first_rank, ranks;
};

// The items of a chunk of tokens, one after the other.
struct Items {
  static constexpr int kRows = kTileRows - 16;  // 16 rows from any of them on are within the tile

  const int32_t *begin_E, *end_E;
  int64_t E, R, max_ranks;

  __device__ bool has(const Item& item) const { return item.group < E; }

  __device__ Item first() const {
    return R == 0 || E == 0 ? Item{E, 0, 0, 0, 0} : at_or_behind(0, begin_E[0]);
  }
  __device__ Item next(Item item) const {
    item.first_rank += item.ranks;
    if (item.first_rank == R) return at_or_behind(item.group, item.rows_end);
    item.ranks = smaller(R - item.first_rank, max_ranks);
    return item;
  }

 private:
  __device__ Item at_or_behind(int64_t group, int row) const {
    while (row >= end_E[group]) {
      if (++group == E) return {E, 0, 0, 0, 0};
      row = begin_E[group];
    }
    const int rows_end = smaller(row + kRows, end_E[group]);
    return {group, row, rows_end, 0, static_cast<int>(smaller(R, max_ranks))};
  }
};

// x of some tokens and 64 columns, rounded.
template <class T>
__device__ void store_sums(
    const Wide<T>* sums, int num_tokens, T* x_TI, int64_t I, int64_t columns, bool aligned) {
  constexpr int kChunk = 16 / sizeof(T), kSumsAtOnce = 16 / sizeof(Wide<T>);
  for (int i = thread(); i < num_tokens * (kTileColumns / kChunk); i += kThreads) {
    const int t = i / (kTileColumns / kChunk), c = i % (kTileColumns / kChunk) * kChunk;
    Pack<T, kChunk> pack;
#pragma unroll
    for (int j = 0; j < kChunk; j += kSumsAtOnce) {
      const auto some = load_pack<kSumsAtOnce>(sums + t * kSumStride + c + j);
#pragma unroll
      for (int l = 0; l < kSumsAtOnce; ++l) narrow(some.x[l], pack.x[j + l]);
    }
    T* to = x_TI + t * I + c;
    if (aligned && c < columns) {
      store_pack(to, pack);
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (c + j < columns) to[j] = pack.x[j];
      }
    }
  }
}

//   blockIdx.x             the chunk of tokens
//   blockIdx.y             64 columns, 16 for each warp
//   item, 16 rows of them  added to the sums of their tokens, which are in shared memory
template <class T, bool kTransposed, int kParts>
__global__ void expand_kernel(Expand<T> p) {
  using S = Wide<T>;
  const int first_token = blockIdx.x * kTokens<T>;
  const int64_t column = int64_t{blockIdx.y} * kTileColumns;
  const int max_ranks = smaller(to_16(p.R), kMaxRanks<T>);
  const int w_rows = kTransposed ? kTileColumns : max_ranks;
  const int w_columns = kTransposed ? max_ranks : kTileColumns;
  const int a_stride = stride<T>(max_ranks), w_stride = stride<T>(w_columns);
  const int a_size = kTileRows * a_stride, size = kParts * a_size + w_rows * w_stride;
  DYNAMIC_SHARED(S, sums);
  T* const tiles = reinterpret_cast<T*>(sums + kTokens<T> * kSumStride);
  SHARED_ARRAY(int[kBuffers][kTileRows], token_of_row);

  const int num_tokens = smaller(p.rows.T - first_token, kTokens<T>);
  for (int i = thread(); i < num_tokens * kTileColumns; i += kThreads) {
    sums[i / kTileColumns * kSumStride + i % kTileColumns] = 0;
  }

  const int32_t* bounds_E = p.bounds_CE + blockIdx.x * p.rows.E;
  const Items items{bounds_E, bounds_E + p.rows.E, p.rows.E, p.R, max_ranks};
  const auto load = [&](const Item& item, int buffer) {
    if (items.has(item)) {
      T* a_tile = tiles + buffer * size;
      const auto slot_of = [&](int r) {
        return item.rows_begin + r < item.rows_end ? p.rows.slot(item.rows_begin + r) : -1;
      };
      for (int r = thread(); r < kTileRows; r += kThreads) {
        const int slot = slot_of(r);
        token_of_row[buffer][r] = slot < 0 ? -1 : slot / static_cast<int>(p.rows.K) - first_token;
      }
      for (int part = 0; part < kParts; ++part) {
        const T* a_NR = p.a_NR + part * p.rows.T * p.rows.K * p.R;
        const auto a_row = [&](int r) -> const T* {
          const int slot = slot_of(r);
          return slot < 0 ? nullptr : a_NR + slot * p.R + item.first_rank;
        };
        load_tile(a_tile + part * a_size, kTileRows, max_ranks, a_row, item.ranks, p.aligned_a);
      }
      const T* w = p.w + item.group * p.R * p.I;
      const auto w_row = [&](int r) -> const T* {
        if constexpr (kTransposed) {
          return column + r < p.I ? w + (column + r) * p.R + item.first_rank : nullptr;
        } else {
          return r < item.ranks ? w + (item.first_rank + r) * p.I + column : nullptr;
        }
      };
      const int64_t columns = kTransposed ? item.ranks : p.I - column;
      load_tile(a_tile + kParts * a_size, w_rows, w_columns, w_row, columns, p.aligned_w);
    }
    commit_copies();
  };

  Item item = items.first();
  load(item, 0);
  for (int step = 0; items.has(item); ++step) {
    const int buffer = step % kBuffers;
    const Item next = items.next(item);
    load(next, 1 - buffer);
    wait_for_copies<1>();
    __syncthreads();

    const T* a_tile = tiles + buffer * size;
    const T* w_tile = a_tile + kParts * a_size;
    const int warp_column = 16 * threadIdx.y;
    w_tile += kTransposed ? warp_column * w_stride : warp_column;
    const int num_rows = column + warp_column < p.I ? item.rows_end - item.rows_begin : 0;
    for (int row = 0, num_added; row < num_rows; row += num_added) {
      // As many rows as are of different tokens: an expert may be a token's more than once.
      const int lane = threadIdx.x, token = lane < 16 ? token_of_row[buffer][row + lane] : -1;
      const int before = __shfl_up_sync(kAllLanes, token, 1);
      const bool again = 0 < lane && lane < 16 && token == before;
      const unsigned stop = __ballot_sync(kAllLanes, again || row + lane >= num_rows || lane == 16);
      num_added = __popc(~stop & (stop - 1));

      SumsOf<S> added[2];
      for (int part = 0; part < kParts; ++part) {
        multiply_tiles<false, kTransposed>(added,
                                           to_16(item.ranks),
                                           16,
                                           a_tile + part * a_size + row * a_stride,
                                           a_stride,
                                           w_tile,
                                           w_stride);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = sum_row(i);
          if (r >= num_added) continue;
          S* sum = sums + token_of_row[buffer][row + r] * kSumStride + warp_column;
          sum[8 * j + sum_column(i)] += added[j].x[i];
        }
      }
      __syncwarp();  // other lanes add to the same tokens
    }
    __syncthreads();
    item = next;
  }
  __syncthreads();

  T* x_TI = p.x_TI + first_token * p.I + column;
  store_sums(sums, num_tokens, x_TI, p.I, p.I - column, p.aligned_x);
}

constexpr int kTerms = 32;

template <class T>
struct Outer {
  GroupedRows rows;
  const T *a_NR, *x_TI;
  int64_t I, R;
  bool aligned_a, aligned_x, transposed;
  T* w;
};

//   blockIdx.x   64 columns i, 16 for each warp: the rows of the sums
//   blockIdx.y   kMaxRanks ranks: their columns
//   blockIdx.z   the group, whose rows are the terms, kTerms at a time
template <class T, int kParts>
__global__ void outer_kernel(Outer<T> p) {
  const int64_t group = blockIdx.z, column = int64_t{blockIdx.x} * kTileColumns;
  const int begin = p.rows.start_E1[group], end = p.rows.start_E1[group + 1];
  CHECK_INDEX(begin, 0, end + 1);
  CHECK_INDEX(end, begin, p.rows.T * p.rows.K + 1);
  const int first_rank = blockIdx.y * kMaxRanks<T>;
  const int ranks = smaller(p.R - first_rank, kMaxRanks<T>), tile_ranks = to_16(ranks);
  const int x_stride = stride<T>(kTileColumns), a_stride = stride<T>(tile_ranks);
  const int x_size = kTerms * x_stride, a_size = kTerms * a_stride;
  const int size = x_size + kParts * a_size;
  DYNAMIC_SHARED(T, tiles);

  SumsOf<Wide<T>> sums[kMaxRanks<T> / 8];
  const auto load = [&](int step) {
    T* x_tile = tiles + step % kStages * size;
    const int first = begin + step * kTerms;
    const auto x_row = [&](int r) -> const T* {
      if (first + r >= end) return nullptr;
      return p.x_TI + p.rows.slot(first + r) / static_cast<int>(p.rows.K) * p.I + column;
    };
    load_tile(x_tile, kTerms, kTileColumns, x_row, p.I - column, p.aligned_x);
    for (int part = 0; part < kParts; ++part) {
      const T* a_NR = p.a_NR + part * p.rows.T * p.rows.K * p.R;
      const auto a_row = [&](int r) -> const T* {
        return first + r < end ? a_NR + p.rows.slot(first + r) * p.R + first_rank : nullptr;
      };
      load_tile(x_tile + x_size + part * a_size, kTerms, tile_ranks, a_row, ranks, p.aligned_a);
    }
  };
  pipeline((end - begin + kTerms - 1) / kTerms, load, [&](int step) {
    if (column + 16 * threadIdx.y >= p.I) return;
    const T* x_tile = tiles + step % kStages * size;
    const int terms = to_16(smaller(end - begin - step * kTerms, kTerms));
    for (int part = 0; part < kParts; ++part) {
      multiply_tiles<true, false>(sums,
                                  terms,
                                  ranks,
                                  x_tile + 16 * threadIdx.y,
                                  x_stride,
                                  x_tile + x_size + part * a_size,
                                  a_stride);
    }
  });

  T* w = p.w + group * p.R * p.I;
#pragma unroll
  for (int j = 0; j < kMaxRanks<T> / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t c = column + 16 * threadIdx.y + sum_row(i);
      const int rank = 8 * j + sum_column(i);
      if (c >= p.I || rank >= ranks) continue;
      const int64_t at = p.transposed ? c * p.R + first_rank + rank : (first_rank + rank) * p.I + c;
      narrow(sums[j].x[i], w[at]);
    }
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

// The columns are split where rows alone would make few blocks: shapes say how.
template <int kParts, class T>
void shrink(const GroupedShrinkParams& p, double scaling, CudaQueue& queue) {
  constexpr int64_t kManyBlocks = 256, kFewSteps = 4;
  const int64_t N = p.T * p.K;
  if (N * p.R == 0) return;
  const int64_t tiles = N / kTileRows + std::min(p.E, N);
  const int64_t rank_blocks = divide_up(p.R, kMaxRanks<T>);
  const int64_t steps = std::max<int64_t>(1, divide_up(p.I, kStep<T>));
  const int64_t wanted = divide_up(kManyBlocks, std::max<int64_t>(1, tiles * rank_blocks));
  const int64_t steps_of_split = divide_up(steps, std::min(wanted, divide_up(steps, kFewSteps)));
  const int64_t splits = divide_up(steps, steps_of_split);
  const T *x_TI = static_cast<const T*>(p.x_TI), *w = static_cast<const T*>(p.w);
  const Shrink<T> shrink{rows_of(p),
                         x_TI,
                         w,
                         p.I,
                         p.R,
                         steps_of_split * kStep<T>,
                         aligned(x_TI, p.I),
                         aligned(w, p.transposed ? p.R : p.I),
                         static_cast<Wide<T>*>(queue.allocate(splits * N * p.R * sizeof(Wide<T>)))};
  if (tiles > 0) {
    const int64_t ranks = padded_ranks<T>(p.R);
    const int64_t w_rows = p.transposed ? kStep<T> : ranks;
    const int64_t w_columns = p.transposed ? ranks : kStep<T>;
    const int64_t bytes = kStages * tile_bytes<T>({{kTileRows, kStep<T>}, {w_rows, w_columns}});
    const dim3 grid(tiles, rank_blocks, splits), block(kLanes, kWarps);
    if (p.transposed) {
      launch<shrink_kernel<T, true>>(grid, block, bytes, queue, shrink);
    } else {
      launch<shrink_kernel<T, false>>(grid, block, bytes, queue, shrink);
    }
  }
  launch<add_splits_kernel<T, kParts>>(dim3(divide_up(N * p.R, kThreads)),
                                       dim3(kThreads),
                                       0,
                                       queue,
                                       shrink,
                                       static_cast<int>(splits),
                                       static_cast<Wide<T>>(scaling),
                                       static_cast<T*>(p.result));
}

template <int kParts, class T>
void expand(const GroupedShrinkParams& p, CudaQueue& queue) {
  if (p.T * p.I == 0) return;
  const int64_t chunks = divide_up(p.T, kTokens<T>), num_bounds = (chunks + 1) * p.E;
  int32_t* bounds_CE = static_cast<int32_t*>(queue.allocate(num_bounds * sizeof(int32_t)));
  if (num_bounds > 0) {
    const dim3 grid(divide_up(num_bounds, kThreads)), block(kThreads);
    launch<find_bounds_kernel>(
        grid, block, 0, queue, rows_of(p), kTokens<T> * p.K, num_bounds, bounds_CE);
  }
  const T *a_TKR = static_cast<const T*>(p.a_TKR), *w = static_cast<const T*>(p.w);
  T* x_TI = static_cast<T*>(p.result);
  const Expand<T> expand{rows_of(p),
                         a_TKR,
                         w,
                         p.I,
                         p.R,
                         bounds_CE,
                         aligned(a_TKR, p.R),
                         aligned(w, p.transposed ? p.R : p.I),
                         aligned(x_TI, p.I),
                         x_TI};
  const int64_t ranks = padded_ranks<T>(p.R), sums = kTokens<T> * kSumStride * sizeof(Wide<T>);
  const int64_t w_rows = p.transposed ? kTileColumns : ranks;
  const int64_t w_columns = p.transposed ? ranks : kTileColumns;
  const int64_t bytes =
      sums + kBuffers * tile_bytes<T>({{kParts * kTileRows, ranks}, {w_rows, w_columns}});
  const dim3 grid(chunks, divide_up(p.I, kTileColumns)), block(kLanes, kWarps);
  if (p.transposed) {
    launch<expand_kernel<T, true, kParts>>(grid, block, bytes, queue, expand);
  } else {
    launch<expand_kernel<T, false, kParts>>(grid, block, bytes, queue, expand);
  }
}

template <int kParts, class T>
void outer(const GroupedShrinkParams& p, CudaQueue& queue) {
  if (p.E * p.I * p.R == 0) return;
  const T *a_TKR = static_cast<const T*>(p.a_TKR), *x_TI = static_cast<const T*>(p.x_TI);
  const Outer<T> outer{rows_of(p),
                       a_TKR,
                       x_TI,
                       p.I,
                       p.R,
                       aligned(a_TKR, p.R),
                       aligned(x_TI, p.I),
                       p.transposed,
                       static_cast<T*>(p.result)};
  const int64_t bytes =
      kStages * tile_bytes<T>({{kTerms, kTileColumns}, {kParts * kTerms, padded_ranks<T>(p.R)}});
  const dim3 grid(divide_up(p.I, kTileColumns), divide_up(p.R, kMaxRanks<T>), p.E);
  launch<outer_kernel<T, kParts>>(grid, dim3(kLanes, kWarps), bytes, queue, outer);
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

void grouped_shrink_cuda(const GroupedShrinkParams& p,
                         int num_parts,
                         double scaling,
                         CudaQueue& queue) {
  with_parts(p.dtype, num_parts, [&](auto zero, auto parts) {
    shrink<decltype(parts)::value, decltype(zero)>(p, scaling, queue);
  });
}

void grouped_expand_cuda(const GroupedShrinkParams& p, int num_parts, CudaQueue& queue) {
  with_parts(p.dtype, num_parts, [&](auto zero, auto parts) {
    expand<decltype(parts)::value, decltype(zero)>(p, queue);
  });
}

void grouped_outer_cuda(const GroupedShrinkParams& p, int num_parts, CudaQueue& queue) {
  with_parts(p.dtype, num_parts, [&](auto zero, auto parts) {
    outer<decltype(parts)::value, decltype(zero)>(p, queue);
  });
}

void grouped_shrink_cuda(const GroupedShrinkParams& p, CudaQueue& queue) {
  grouped_shrink_cuda(p, 1, 1, queue);
}

void grouped_expand_cuda(const GroupedShrinkParams& p, CudaQueue& queue) {
  grouped_expand_cuda(p, 1, queue);
}

void grouped_outer_cuda(const GroupedShrinkParams& p, CudaQueue& queue) {
  grouped_outer_cuda(p, 1, queue);
}

}  // namespace mixlora
