// Forward: a warp sums kPacks * 32 packs of one token's K rows.
//
//   blockIdx.x, threadIdx.y      the token t
//   blockIdx.y, i, threadIdx.x   the pack: 16 bytes where all rows begin at such addresses
//
// Backward: a warp takes one token, whose dy_D its K slots share, and sums each slot's <dy, y> over
// its lanes.
//
// Both are bound by memory. Terms are added in slot order and rounded once.
#include "common/cuda.cuh"
#include "moe_scatter/moe_scatter.h"

namespace mixlora {
namespace {

constexpr int kWarps = 4, kPacks = 2;

template <class T, int kSize>
__global__ void scatter_kernel(MoeScatterParams p) {
  using S = Wide<T>;
  const int64_t t = int64_t{blockIdx.x} * kWarps + threadIdx.y;
  if (t >= p.T) return;
  const int64_t first = (int64_t{blockIdx.y} * kPacks * kLanes + threadIdx.x) * kSize;
  const S* weight_TK = static_cast<const S*>(p.weight_TK);

  S sum[kPacks][kSize] = {};
  for (int64_t slot = t * p.K; slot < (t + 1) * p.K; ++slot) {
    const int row = p.slot_row_TK[slot];
    CHECK_INDEX(row, -1, p.T * p.K);
    if (row < 0) continue;
    const S weight = weight_TK ? weight_TK[slot] : 1;
    const T* y_D = static_cast<const T*>(p.y_ND) + row * p.D;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int64_t d = first + i * kLanes * kSize;
      if (d >= p.D) continue;
      const auto y = load_pack<kSize>(y_D + d);
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum[i][j] += weight * widen(y.x[j]);
    }
  }

  T* y_D = static_cast<T*>(p.y_TD) + t * p.D;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t d = first + i * kLanes * kSize;
    if (d >= p.D) continue;
    Pack<T, kSize> y;
#pragma unroll
    for (int j = 0; j < kSize; ++j) narrow(sum[i][j], y.x[j]);
    store_pack(y_D + d, y);
  }
}

// dx_D = weight dy_D, and <dy_D, y_D> is returned to every lane.
template <int kSize, class T>
__device__ Wide<T> row_backward(Wide<T> weight, const T* dy_D, const T* y_D, int64_t D, T* dx_D) {
  Wide<T> sum = 0;
  for (int64_t d = threadIdx.x * kSize; d < D; d += kLanes * kSize) {
    const auto dy = load_pack<kSize>(dy_D + d);
    const auto y = load_pack<kSize>(y_D + d);
    Pack<T, kSize> dx;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      sum += widen(dy.x[j]) * widen(y.x[j]);
      narrow(weight * widen(dy.x[j]), dx.x[j]);
    }
    store_pack(dx_D + d, dx);
  }
  return sum_lanes(sum);
}

template <class T, int kSize>
__global__ void scatter_backward_kernel(MoeScatterBackwardParams p) {
  using S = Wide<T>;
  const int64_t t = int64_t{blockIdx.x} * kWarps + threadIdx.y;
  if (t >= p.T) return;
  const T* dy_D = static_cast<const T*>(p.dy_TD) + t * p.D;
  const T* y_ND = static_cast<const T*>(p.y_ND);
  const S* weight_TK = static_cast<const S*>(p.weight_TK);
  T* dy_ND = static_cast<T*>(p.dy_ND);
  S* dweight_TK = static_cast<S*>(p.dweight_TK);

  for (int64_t slot = t * p.K; slot < (t + 1) * p.K; ++slot) {
    const int row = p.slot_row_TK[slot];
    CHECK_INDEX(row, -1, p.T * p.K);
    S dweight = 0;
    if (row >= 0) {
      dweight =
          row_backward<kSize>(weight_TK[slot], dy_D, y_ND + row * p.D, p.D, dy_ND + row * p.D);
    }
    if (threadIdx.x == 0) dweight_TK[slot] = dweight;

    // There are as many rows as slots, and every row without a slot is zeroed by some warp.
    const int64_t n = slot;
    if (p.row_slot_N[n] >= 0) continue;
    for (int64_t d = threadIdx.x * kSize; d < p.D; d += kLanes * kSize) {
      store_pack(dy_ND + n * p.D + d, Pack<T, kSize>{});
    }
  }
}

}  // namespace

void moe_scatter_cuda(const MoeScatterParams& p, CudaQueue& queue) {
  if (p.T == 0 || p.D == 0) return;
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_pack_size<T>(p.D, {p.y_ND, p.y_TD}, [&](auto size) {
      constexpr int kSize = decltype(size)::value;
      const dim3 grid(divide_up(p.T, kWarps), divide_up(p.D, kPacks * kLanes * kSize));
      launch<scatter_kernel<T, kSize>>(grid, dim3(kLanes, kWarps), 0, queue, p);
    });
  });
}

void moe_scatter_backward_cuda(const MoeScatterBackwardParams& p, CudaQueue& queue) {
  if (p.T == 0) return;
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_pack_size<T>(p.D, {p.dy_TD, p.y_ND, p.dy_ND}, [&](auto size) {
      constexpr int kSize = decltype(size)::value;
      const dim3 grid(divide_up(p.T, kWarps));
      launch<scatter_backward_kernel<T, kSize>>(grid, dim3(kLanes, kWarps), 0, queue, p);
    });
  });
}

}  // namespace mixlora
