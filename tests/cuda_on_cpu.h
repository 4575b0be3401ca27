// CUDA's language for a C++ compiler: a kernel file includes this in place of CUDA's own headers
// (csrc/common/cuda.cuh), and tests/cuda_on_cpu.cpp executes it.
//
// Blocks run in turn. Each thread of a block has a stack of its own and runs until it waits for
// others: at __syncthreads for the block, in a collective for the lanes of its mask.
#pragma once

#include <math.h>  // puts exp, log, isnan of both types where CUDA has them

#include <cstdint>
#include <cstring>
#include <string>

#include "common/cuda.h"
#include "common/dtype.h"

#define __global__
#define __host__
#define __device__
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace on_cpu {

// What lane l gave and what it will take; `lanes` are those that have come.
using Join = void (*)(uint32_t lanes, const void* const* given, void* const* taken);

[[noreturn]] void fail(const std::string& message);
void collective(uint32_t mask, int line, Join join, const void* given, void* taken);
void* shared_array(const char* file, int line, int64_t bytes);
void* dynamic_shared();
int atomic_add(int* p, int x);
void check_aligned(const void* p, int64_t bytes);
void copy_async(void* to, const void* from, bool valid);
void commit_copies();
void wait_for_copies(int groups);
void read_shared(void* to, const void* from, int64_t bytes);
void count_mma();
void run(const std::string& kernel,
         dim3 grid,
         dim3 block,
         int64_t shared_bytes,
         std::string& error,
         void (*thread)(const void*),
         const void* context);

// Each lane takes the value of the lane `source`.
template <class T>
T shuffle(uint32_t mask, T value, int source, int line) {
  struct Given {
    T value;
    int source;
  };
  const Given given{value, source};
  T taken;
  const Join join = [](uint32_t lanes, const void* const* given, void* const* taken) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      const int source = static_cast<const Given*>(given[lane])->source;
      if (source < 0 || source > 31 || !(lanes >> source & 1)) fail("shuffle from an absent lane");
      memcpy(taken[lane], &static_cast<const Given*>(given[source])->value, sizeof(T));
    }
  };
  collective(mask, line, join, &given, &taken);
  return taken;
}

inline int lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}

}  // namespace on_cpu

void __syncthreads(int line = __builtin_LINE());
void __syncwarp(uint32_t mask = 0xffffffff, int line = __builtin_LINE());

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int line = __builtin_LINE()) {
  return on_cpu::shuffle(mask, value, source, line);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int distance, int line = __builtin_LINE()) {
  return on_cpu::shuffle(mask, value, on_cpu::lane() ^ distance, line);
}

// Below the first lanes, a lane keeps its own value.
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int distance, int line = __builtin_LINE()) {
  const int lane = on_cpu::lane();
  return on_cpu::shuffle(mask, value, lane < distance ? lane : lane - distance, line);
}

inline uint32_t __match_any_sync(uint32_t mask, int value, int line = __builtin_LINE()) {
  uint32_t taken;
  const on_cpu::Join join = [](uint32_t lanes, const void* const* given, void* const* taken) {
    const auto value = [&](int lane) { return *static_cast<const int*>(given[lane]); };
    for (int lane = 0; lane < 32; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      uint32_t same = 0;
      for (int other = 0; other < 32; ++other) {
        if (lanes >> other & 1 && value(other) == value(lane)) same |= 1u << other;
      }
      *static_cast<uint32_t*>(taken[lane]) = same;
    }
  };
  on_cpu::collective(mask, line, join, &value, &taken);
  return taken;
}

inline uint32_t __ballot_sync(uint32_t mask, bool value, int line = __builtin_LINE()) {
  uint32_t taken;
  const on_cpu::Join join = [](uint32_t lanes, const void* const* given, void* const* taken) {
    uint32_t ballot = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes >> lane & 1 && *static_cast<const bool*>(given[lane])) ballot |= 1u << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes >> lane & 1) *static_cast<uint32_t*>(taken[lane]) = ballot;
    }
  };
  on_cpu::collective(mask, line, join, &value, &taken);
  return taken;
}

inline int atomicAdd(int* p, int x) { return on_cpu::atomic_add(p, x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

#define SHARED_ARRAY(type, name) \
  using name##_t = type;         \
  name##_t& name =               \
      *static_cast<name##_t*>(on_cpu::shared_array(__FILE__, __LINE__, sizeof(name##_t)))
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(on_cpu::dynamic_shared())
#define CHECK_ALIGNED(p, bytes) on_cpu::check_aligned(p, bytes)
#define CHECK_INDEX(index, low, end)                                                         \
  do {                                                                                       \
    if (!((low) <= (index) && (index) < (end))) {                                            \
      on_cpu::fail(#index " must be in [" #low ", " #end "), got " + std::to_string(index)); \
    }                                                                                        \
  } while (0)

namespace mixlora {

inline float widen(Bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}
inline float widen(Fp16 x) {
  _Float16 y;
  memcpy(&y, &x, sizeof y);
  return y;
}
inline void narrow(float x, Bf16& y) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  y.bits = isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline void narrow(float x, Fp16& y) {
  const _Float16 rounded = x;
  memcpy(&y, &rounded, sizeof y);
}

template <auto kKernel, class... Arguments>
void start(dim3 grid, dim3 block, int64_t shared_bytes, CudaQueue& queue, Arguments... arguments) {
  const auto thread = [=] { kKernel(arguments...); };
  on_cpu::run(
      __PRETTY_FUNCTION__,
      grid,
      block,
      shared_bytes,
      queue.error,
      [](const void* context) { (*static_cast<const decltype(thread)*>(context))(); },
      &thread);
}

// Of csrc/common/mma.cuh. The tables are those of the PTX ISA: "Matrix fragments for mma.m16n8k16
// with floating point type" and "Warp-level matrix load instruction: ldmatrix".
inline void copy_async(void* to, const void* from, bool valid) {
  on_cpu::copy_async(to, from, valid);
}
inline void commit_copies() { on_cpu::commit_copies(); }
template <int kGroups>
void wait_for_copies() {
  on_cpu::wait_for_copies(kGroups);
}

template <bool kTransposed>
void load_matrices(uint32_t (&x)[4], const void* row, int line = __builtin_LINE()) {
  uint16_t row_of_lane[8];
  on_cpu::read_shared(row_of_lane, row, sizeof row_of_lane);
  const on_cpu::Join join = [](uint32_t lanes, const void* const* given, void* const* taken) {
    if (lanes != 0xffffffff) on_cpu::fail("ldmatrix is without some lanes");
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const int row = lane / 4, column = lane % 4 * 2 + i % 2, matrix = i / 2 * 8;
        const int from = matrix + (kTransposed ? column : row), at = kTransposed ? row : column;
        static_cast<uint16_t*>(taken[lane])[i] = static_cast<const uint16_t*>(given[from])[at];
      }
    }
  };
  on_cpu::collective(0xffffffff, line, join, row_of_lane, x);
}

template <class T>
void mma(float (&sum)[4],
         const uint32_t (&a)[4],
         const uint32_t (&b)[2],
         int line = __builtin_LINE()) {
  struct Given {
    T a[8], b[4];
    float sum[4];
  } given;
  memcpy(given.a, a, sizeof a);
  memcpy(given.b, b, sizeof b);
  memcpy(given.sum, sum, sizeof sum);
  const on_cpu::Join join = [](uint32_t lanes, const void* const* given, void* const* taken) {
    if (lanes != 0xffffffff) on_cpu::fail("mma is without some lanes");
    float a_MK[16][16], b_KN[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Given& of_lane = *static_cast<const Given*>(given[lane]);
      const int group = lane / 4, in_group = lane % 4;
      for (int i = 0; i < 8; ++i) {
        const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
        const int column = i < 4 ? in_group * 2 + i % 2 : in_group * 2 + i % 2 + 8;
        a_MK[row][column] = widen(of_lane.a[i]);
      }
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? in_group * 2 + i % 2 : in_group * 2 + i % 2 + 8;
        b_KN[row][group] = widen(of_lane.b[i]);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? lane / 4 : lane / 4 + 8, column = lane % 4 * 2 + i % 2;
        float sum = static_cast<const Given*>(given[lane])->sum[i];
        for (int k = 0; k < 16; ++k) sum += a_MK[row][k] * b_KN[k][column];
        static_cast<float*>(taken[lane])[i] = sum;
      }
    }
    on_cpu::count_mma();
  };
  on_cpu::collective(0xffffffff, line, join, &given, sum);
}

template <class T>
uint32_t pack_pair(float low, float high) {
  T pair[2];
  narrow(low, pair[0]);
  narrow(high, pair[1]);
  uint32_t word;
  memcpy(&word, pair, sizeof word);
  return word;
}

}  // namespace mixlora
