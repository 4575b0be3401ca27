// Sums over the columns of a range, of the rows of a tile: z, and the gradients of a and of the
// weights. Ranges are added one after the other by a last launch.
#pragma once

#include "shared_glu/copies.cuh"
#include "shared_glu/rows.cuh"

namespace mixlora {
namespace {

// What becomes of eight ranks' sums or more: y_NR = scale * sum.
template <class S>
struct RowOutput {
  S* y_NR;
  int64_t R;
  int count;  // groups of eight ranks
  S scale;
};

// Of each slot of a tile of 16 rows `count` groups of eight ranks. A block keeps them in shared
// memory where they fit, else where they are left for add_rows_kernel.
template <class S>
struct RowSums {
  S* left;  // [range, tile, K, count, lane, 4]
  int64_t tiles, ranges, count;
  int64_t shared_bytes;  // 0: they do not fit
  RowOutput<S> outputs[3];

  __device__ S* left_of_tile(const SharedGluParams& p, int64_t range, int64_t tile) const {
    return left + ((range * tiles + tile) * p.slots * count * kLanes + threadIdx.x) * 4;
  }

  // This lane's sums, zeroed.
  __device__ S* begin(const SharedGluParams& p, int64_t range, int64_t tile, S* shared) const {
    const int64_t size = p.slots * count;
    S* sums = shared_bytes ? shared + (threadIdx.y * size * kLanes + threadIdx.x) * 4
                           : left_of_tile(p, range, tile);
    for (int64_t i = 0; i < size; ++i) store_pack(sums + i * 4 * kLanes, Four<S>{});
    return sums;
  }

  __device__ void end(const SharedGluParams& p, int64_t range, int64_t tile, const S* sums) const {
    S* to = left_of_tile(p, range, tile);
    for (int64_t i = 0; shared_bytes && i < p.slots * count; ++i) {
      store_pack(to + i * 4 * kLanes, load_pack<4>(sums + i * 4 * kLanes));
    }
  }
};

// A warp adds one group's ranges.
template <class S>
__global__ void add_rows_kernel(const __grid_constant__ SharedGluParams p,
                                const __grid_constant__ RowSums<S> sums) {
  const int64_t groups = p.slots * sums.count, size = sums.tiles * groups;
  const int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.y;
  if (i >= size) return;
  Four<S> total = {};
  for (int64_t range = 0; range < sums.ranges; ++range) {
    const auto more = load_pack<4>(sums.left + ((range * size + i) * kLanes + threadIdx.x) * 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) total.x[j] += more.x[j];
  }
  const Rows rows = rows_from(p, i / groups * kRows);
  const int64_t k = i % groups / sums.count;
  int group = i % sums.count;
  const RowOutput<S>* output = sums.outputs;
  for (; group >= output->count; ++output) group -= output->count;
  for_each_place<2>([&](int h, int j) {
    const int r = 8 * group + 2 * lane_quarter() + j;
    if (rows.token[h] < 0 || r >= output->R) return;
    const int64_t slot = rows.token[h] * p.slots + k;
    output->y_NR[slot * output->R + r] = output->scale * total.x[2 * h + j];
  });
}

constexpr int64_t kSumsBytes = 32768;  // of shared memory, at most, for sums of rows

template <class S>
RowSums<S> row_sums_for(const SharedGluParams& p,
                        CudaQueue& queue,
                        int64_t ranges,
                        std::initializer_list<RowOutput<S>> outputs) {
  RowSums<S> sums = {};
  sums.tiles = divide_up(p.tokens, kBlockRows) * kWarps;
  sums.ranges = ranges;
  for (const auto& output : outputs) sums.count += output.count;
  std::copy(outputs.begin(), outputs.end(), sums.outputs);
  const int64_t size = p.slots * sums.count * 4 * kLanes;
  sums.left = allocate<S>(queue, ranges * sums.tiles * size);
  sums.shared_bytes = kWarps * size * sizeof(S);
  if (sums.shared_bytes > kSumsBytes) sums.shared_bytes = 0;
  return sums;
}

template <class S>
void add_rows(const SharedGluParams& p, const RowSums<S>& sums, CudaQueue& queue) {
  const int64_t size = sums.tiles * p.slots * sums.count;
  if (size == 0) return;
  launch<add_rows_kernel<S>>(
      dim3(divide_up(size, kWarps)), dim3(kLanes, kWarps), 0, queue, p, sums);
}

}  // namespace
}  // namespace mixlora
