// Experts' matrices and slots' rows are copied before anything else, in the type of the products:
// the terms of a product side by side, ranks and columns padded with zeros.
#pragma once

#include "shared_glu/products.cuh"
#include "shared_glu/shared_glu.h"

namespace mixlora {
namespace {

constexpr int kCopyThreads = 256, kMaxCopies = 8;

// dst[b][i][j] = src[b][i][j] in T, 0 where src has no such row or column.
template <class T>
struct Copy {
  const Wide<T>* src;
  T* dst;
  int64_t batches, rows, columns, row_stride, column_stride, padded_rows, padded_columns;

  __host__ __device__ int64_t size() const { return batches * padded_rows * padded_columns; }
};

template <class T>
struct Copies {
  Copy<T> copies[kMaxCopies];
};

template <class T>
__global__ void copy_kernel(const __grid_constant__ Copies<T> copies) {
  const Copy<T>& copy = copies.copies[blockIdx.y];
  const int64_t at = int64_t{blockIdx.x} * kCopyThreads + threadIdx.x;
  if (at >= copy.size()) return;
  const int64_t j = at % copy.padded_columns, i = at / copy.padded_columns % copy.padded_rows;
  const int64_t batch = at / copy.padded_columns / copy.padded_rows;
  Wide<T> x = 0;
  if (i < copy.rows && j < copy.columns) {
    x = copy.src[batch * copy.rows * copy.columns + i * copy.row_stride + j * copy.column_stride];
  }
  narrow(x, copy.dst[at]);
}

inline int64_t round_up(int64_t x, int64_t step) { return divide_up(x, step) * step; }

template <class T>
T* allocate(CudaQueue& queue, int64_t count) {
  return static_cast<T*>(queue.allocate(count * sizeof(T)));
}

// Collects copies, and makes them by one launch.
template <class T>
class Copier {
 public:
  const int64_t R, F;  // padded

  Copier(const SharedGluParams& p, CudaQueue& queue)
      : R(round_up(p.rank, 16)), F(round_up(p.ffn, kColumns<T>)), p(p), queue(queue) {}

  // [N, R]
  const T* rows(const void* src) {
    const int64_t N = p.tokens * p.slots;
    return add(src, 1, N, p.rank, p.rank, 1, N, R);
  }
  // [E, F, R], of a matrix whose neighbours of a column are `f_stride` apart
  const T* by_column(const void* src, int64_t f_stride, int64_t r_stride) {
    return add(src, p.experts, p.ffn, p.rank, f_stride, r_stride, F, R);
  }
  // [E, R, F]
  const T* by_rank(const void* src, int64_t f_stride, int64_t r_stride) {
    return add(src, p.experts, p.rank, p.ffn, r_stride, f_stride, R, F);
  }

  void run() {
    int64_t size = 0;
    for (int i = 0; i < count; ++i) size = std::max(size, copies.copies[i].size());
    if (size == 0) return;
    const dim3 grid(divide_up(size, kCopyThreads), count);
    launch<copy_kernel<T>>(grid, dim3(kCopyThreads), 0, queue, copies);
  }

 private:
  const SharedGluParams& p;
  CudaQueue& queue;
  Copies<T> copies = {};
  int count = 0;

  const T* add(const void* src,
               int64_t batches,
               int64_t rows,
               int64_t columns,
               int64_t row_stride,
               int64_t column_stride,
               int64_t padded_rows,
               int64_t padded_columns) {
    if (!src) return nullptr;
    Copy<T>& copy = copies.copies[count++];
    copy = {static_cast<const Wide<T>*>(src),
            nullptr,
            batches,
            rows,
            columns,
            row_stride,
            column_stride,
            padded_rows,
            padded_columns};
    return copy.dst = allocate<T>(queue, copy.size());
  }
};

}  // namespace
}  // namespace mixlora
