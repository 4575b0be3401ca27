// a[slot, r] = sum_i w_e[r, i] x[t, i], for w [E, R, I] or turned [E, I, R].
#include "grouped_shrink/tiles.cuh"

namespace mixlora {
namespace {

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

}  // namespace

void grouped_shrink_cuda(const GroupedShrinkParams& p,
                         int num_parts,
                         double scaling,
                         CudaQueue& queue) {
  with_parts(p.dtype, num_parts, [&](auto zero, auto parts) {
    shrink<decltype(parts)::value, decltype(zero)>(p, scaling, queue);
  });
}

void grouped_shrink_cuda(const GroupedShrinkParams& p, CudaQueue& queue) {
  grouped_shrink_cuda(p, 1, 1, queue);
}

}  // namespace mixlora
