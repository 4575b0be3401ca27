// x[t, i] = sum of the token's slots, by expert: sum_r w_e[r, i] a[slot, r], for w [E, R, I] or
// turned [E, I, R].
#include "grouped_shrink/tiles.cuh"

namespace mixlora {
namespace {

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

}  // namespace

void grouped_expand_cuda(const GroupedShrinkParams& p, int num_parts, CudaQueue& queue) {
  with_parts(p.dtype, num_parts, [&](auto zero, auto parts) {
    expand<decltype(parts)::value, decltype(zero)>(p, queue);
  });
}

void grouped_expand_cuda(const GroupedShrinkParams& p, CudaQueue& queue) {
  grouped_expand_cuda(p, 1, queue);
}

}  // namespace mixlora
