// What the kernels need besides CUDA's own language, so that each reads as its algorithm.
//
// A kernel file is compiled by nvcc, and by a C++ compiler for the tests, which execute it on the
// CPU (tests/cuda_on_cpu.h). Therefore it has no <<<>>>, no __shared__ and no assembly of its own:
//
//   SHARED_ARRAY(float[4][32], sums);      __shared__ float sums[4][32]
//   DYNAMIC_SHARED(int, counts);           int* counts, as many bytes as launch says
//   CHECK_INDEX(index, low, end);          stops the kernel; an index is what addresses memory
//   launch<kernel>(grid, block, shared_bytes, queue, arguments...);
//
// A row's address is computed in int64.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "common/cuda.h"
#include "common/dtype.h"

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>

#define SHARED_ARRAY(type, name) \
  using name##_t = type;         \
  __shared__ name##_t name
#define DYNAMIC_SHARED(type, name)                               \
  extern __shared__ __align__(16) unsigned char shared_##name[]; \
  type* const name = reinterpret_cast<type*>(shared_##name)
#define CHECK_INDEX(index, low, end) assert((low) <= (index) && (index) < (end))
#define CHECK_ALIGNED(p, bytes)  // the GPU does

namespace mixlora {

inline __device__ float widen(Bf16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }
inline __device__ float widen(Fp16 x) { return __half2float(__ushort_as_half(x.bits)); }
inline __device__ void narrow(float x, Bf16& y) {
  y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
inline __device__ void narrow(float x, Fp16& y) { y.bits = __half_as_ushort(__float2half_rn(x)); }

template <auto kKernel, class... Arguments>
void start(dim3 grid, dim3 block, int64_t shared_bytes, CudaQueue& queue, Arguments... arguments) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(
        kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    kKernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(queue.stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) queue.error = cudaGetErrorString(error);
}

}  // namespace mixlora

#else
#include "cuda_on_cpu.h"
#endif

namespace mixlora {

// What a block may have on every GPU since sm_80; sm_86 and sm_89 set the limit.
inline constexpr int64_t kMaxSharedBytes = 96 * 1024;

inline constexpr int kLanes = 32;
inline constexpr unsigned kAllLanes = 0xffffffff;

inline __device__ float widen(float x) { return x; }
inline __device__ double widen(double x) { return x; }
inline __device__ void narrow(float x, float& y) { y = x; }
inline __device__ void narrow(double x, double& y) { y = x; }

// Elements that one thread loads or stores at once.
template <class T, int kSize>
struct alignas(kSize * sizeof(T)) Pack {
  T x[kSize];
};

template <int kSize, class T>
__device__ Pack<T, kSize> load_pack(const T* p) {
  CHECK_ALIGNED(p, sizeof(Pack<T, kSize>));
  return *reinterpret_cast<const Pack<T, kSize>*>(p);
}
template <int kSize, class T>
__device__ void store_pack(T* p, const Pack<T, kSize>& pack) {
  CHECK_ALIGNED(p, sizeof(Pack<T, kSize>));
  *reinterpret_cast<Pack<T, kSize>*>(p) = pack;
}

// Of each group of `width` lanes, in a fixed order; every lane has the result.
template <class S>
__device__ S sum_lanes(S x, int width = kLanes) {
  for (int distance = width / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}
template <class S>
__device__ S max_lanes(S x, int width = kLanes) {
  for (int distance = width / 2; distance > 0; distance /= 2) {
    const S other = __shfl_xor_sync(kAllLanes, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

template <auto kKernel, class... Arguments>
void launch(dim3 grid, dim3 block, int64_t shared_bytes, CudaQueue& queue, Arguments... arguments) {
  if (!queue.error.empty()) return;
  if (shared_bytes > kMaxSharedBytes) {
    queue.error = "a block would need more than 96 KiB of shared memory";
    return;
  }
  start<kKernel>(grid, block, shared_bytes, queue, arguments...);
}

inline int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

inline bool all_aligned(int64_t bytes, int64_t row_bytes, std::initializer_list<const void*> rows) {
  const auto aligned = [=](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  return row_bytes % bytes == 0 && std::all_of(rows.begin(), rows.end(), aligned);
}

// Calls body(constant) with the size of Pack for rows of D elements: 16 bytes where every row
// begins at a multiple of them, else one element.
template <class T, class Body>
void with_pack_size(int64_t D, std::initializer_list<const void*> rows, const Body& body) {
  if (all_aligned(16, D * sizeof(T), rows)) {
    body(std::integral_constant<int, 16 / sizeof(T)>{});
  } else {
    body(std::integral_constant<int, 1>{});
  }
}

}  // namespace mixlora
