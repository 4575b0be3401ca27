// Tensor cores, and the copies that feed them while they work.
//
//   copy_async(to, from, valid)   16 bytes of global memory to shared memory; zeros unless valid,
//                                 and `from` is not read then
//   commit_copies()               ends a group of copies
//   wait_for_copies<n>()          this thread's copies have landed, but for its last n groups;
//   other
//                                 threads see them behind a barrier
//   load_a, load_b                tiles of 16-bit numbers from shared memory
//   multiply<T>(sum, a, b)        sum += a b, summed in fp32
//   pack_pair<T>(low, high)       two numbers, rounded, in a word
//   as_a<T>(left, right)          two tiles of sums, rounded, as the left factor of another product
//
// Products are of 16 x 16 and 16 x 8 numbers of Bf16 or Fp16. A warp holds them together, as the
// PTX ISA says for mma.m16n8k16; blocks are kLanes wide, and with g = lane / 4, q = lane % 4 a lane
// has, by (row, column), the lower half of a word first:
//
//   TileA  x[0]  (g, 2q) (g, 2q + 1)          x[1]  (g + 8, 2q) ..
//          x[2]  (g, 2q + 8) ..               x[3]  (g + 8, 2q + 8) ..
//   TileB  x[0]  (2q, g) (2q + 1, g)          x[1]  (2q + 8, g) ..
//   Sums   x[0], x[1]  (g, 2q) (g, 2q + 1)    x[2], x[3]  (g + 8, 2q) (g + 8, 2q + 1)
//
// Numbers of fp32 and fp64 are multiplied by ordinary arithmetic: to tensor cores an fp32 is a
// TF32, of 11 bits.
#pragma once

#include "common/cuda.cuh"

#if defined(__CUDACC__)

namespace mixlora {

inline __device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

inline __device__ void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)),
               "r"(valid ? 16 : 0)
               : "memory");
}

inline __device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kGroups>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Four matrices of 8 x 8 numbers: lane l gives where the row l % 8 of matrix l / 8 is. x[j] becomes
// (g, 2q) (g, 2q + 1) of matrix j, transposed (2q, g) (2q + 1, g).
template <bool kTransposed>
__device__ void load_matrices(uint32_t (&x)[4], const void* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

template <class T>
__device__ void mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, Bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, Fp16>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

template <class T>
__device__ uint32_t pack_pair(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, Bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, sizeof word);
  } else {
    static_assert(std::is_same_v<T, Fp16>);
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, sizeof word);
  }
  return word;
}

}  // namespace mixlora

#endif

namespace mixlora {

struct TileA {
  uint32_t x[4];
};
struct TileB {
  uint32_t x[2];
};
template <class S>
struct SumsOf {
  S x[4] = {};
};
using Sums = SumsOf<float>;

// Where x[i] of the sums is.
inline __device__ int sum_row(int i) { return threadIdx.x / 4 + i / 2 * 8; }
inline __device__ int sum_column(int i) { return threadIdx.x % 4 * 2 + i % 2; }

// The row m and column k are at p[m * stride + k], or with kTurned at p[k * stride + m]. Rows of
// the memory begin at multiples of 16 bytes.
template <bool kTurned, class T>
__device__ TileA load_a(const T* p, int stride) {
  const int lane = threadIdx.x;
  TileA a;
  if constexpr (kTurned) {
    load_matrices<true>(a.x, p + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
  } else {
    load_matrices<false>(a.x, p + lane % 16 * stride + lane / 16 * 8);
  }
  return a;
}

// Of two tiles side by side the row k and column n are at p[k * stride + n], or with kTurned at
// p[n * stride + k].
template <bool kTurned, class T>
__device__ void load_b(TileB (&b)[2], const T* p, int stride) {
  const int lane = threadIdx.x;
  uint32_t x[4];
  if constexpr (kTurned) {
    load_matrices<false>(x, p + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
  } else {
    load_matrices<true>(x, p + lane % 16 * stride + lane / 16 * 8);
  }
  b[0] = {{x[0], x[1]}};
  b[1] = {{x[2], x[3]}};
}

template <class T>
__device__ void multiply(Sums& sum, const TileA& a, const TileB& b) {
  mma<T>(sum.x, a.x, b.x);
}

// Columns 0 .. 7 and 8 .. 15. A lane has the same elements of both kinds of tiles.
template <class T>
__device__ TileA as_a(const Sums& left, const Sums& right) {
  return {{pack_pair<T>(left.x[0], left.x[1]),
           pack_pair<T>(left.x[2], left.x[3]),
           pack_pair<T>(right.x[0], right.x[1]),
           pack_pair<T>(right.x[2], right.x[3])}};
}

}  // namespace mixlora
