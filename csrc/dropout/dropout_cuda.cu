// A lane takes kQuads * 4 neighbouring columns of a row, each four of which share one counter:
//
//   blockIdx.x, threadIdx.y      the row n
//   blockIdx.y, threadIdx.x, q   the columns 4 * quad .. 4 * quad + 3
//
// They are 16 bytes (fp64: 32), and are loaded at once where all rows begin at such addresses.
#include "common/cuda.cuh"
#include "common/philox.cuh"
#include "dropout/dropout.h"

namespace mixlora {
namespace {

constexpr int kWarps = 4;

template <class T>
inline constexpr int kQuads = sizeof(T) == 2 ? 2 : 1;

template <class T, int kSize>
__global__ void dropout_kernel(DropoutParams p, DropoutMask<Wide<T>> mask) {
  constexpr int kColumns = 4 * kQuads<T>;
  const int64_t n = int64_t{blockIdx.x} * kWarps + threadIdx.y;
  const int64_t first = (int64_t{blockIdx.y} * kLanes + threadIdx.x) * kColumns;
  if (n >= p.N || first >= p.D) return;
  const T* x_D = static_cast<const T*>(p.x_ND) + n * p.D;
  T* y_D = static_cast<T*>(p.y_ND) + n * p.D;

  Pack<T, kSize> x[kColumns / kSize] = {};
#pragma unroll
  for (int i = 0; i < kColumns; i += kSize) {
    if (first + i < p.D) x[i / kSize] = load_pack<kSize>(x_D + first + i);
  }
#pragma unroll
  for (int q = 0; q < kQuads<T>; ++q) {
    const auto factors = mask.factors(n, first / 4 + q);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      T& number = x[(4 * q + j) / kSize].x[(4 * q + j) % kSize];
      narrow(widen(number) * factors.x[j], number);
    }
  }
#pragma unroll
  for (int i = 0; i < kColumns; i += kSize) {
    if (first + i < p.D) store_pack(y_D + first + i, x[i / kSize]);
  }
}

}  // namespace

void dropout_cuda(const DropoutParams& p, CudaQueue& queue) {
  if (p.N == 0 || p.D == 0) return;
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_pack_size<T>(p.D, {p.x_ND, p.y_ND}, [&](auto size) {
      const dim3 grid(divide_up(p.N, kWarps), divide_up(p.D, 4 * kQuads<T> * kLanes));
      const DropoutMask<Wide<T>> mask(p.seed, p.p);
      launch<dropout_kernel<T, decltype(size)::value>>(
          grid, dim3(kLanes, kWarps), 0, queue, p, mask);
    });
  });
}

}  // namespace mixlora
