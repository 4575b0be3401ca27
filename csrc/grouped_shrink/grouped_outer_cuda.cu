// w_e[r, i] = sum of the group's rows: a[slot, r] x[t, i], for w [E, R, I] or turned [E, I, R].
#include "grouped_shrink/tiles.cuh"

namespace mixlora {
namespace {

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

}  // namespace

void grouped_outer_cuda(const GroupedShrinkParams& p, int num_parts, CudaQueue& queue) {
  with_parts(p.dtype, num_parts, [&](auto zero, auto parts) {
    outer<decltype(parts)::value, decltype(zero)>(p, queue);
  });
}

void grouped_outer_cuda(const GroupedShrinkParams& p, CudaQueue& queue) {
  grouped_outer_cuda(p, 1, queue);
}

}  // namespace mixlora
