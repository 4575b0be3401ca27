// The maths are in mixlora/ops/grouped_shrink.py.
#pragma once

#include <cstdint>

#include "common/cuda.h"
#include "common/dtype.h"
#include "common/isa.h"

namespace mixlora {

// Of x, w and a two are given, and the third is the result. w is [E, R, I], or transposed [E, I,
// R].
struct GroupedShrinkParams {
  const void* x_TI;
  const void* w;
  const void* a_TKR;
  void* result;
  const int32_t* expert_TK;
  const int32_t* expert_start_E1;
  const int32_t* row_slot_N;
  int64_t T, K, E, R, I;
  bool transposed;
  Dtype dtype;
};

DECLARE_CPU_KERNEL(void, grouped_shrink_cpu, const GroupedShrinkParams& p)  // a
DECLARE_CUDA_KERNEL(grouped_shrink_cuda, const GroupedShrinkParams& p)
DECLARE_CPU_KERNEL(void, grouped_expand_cpu, const GroupedShrinkParams& p)  // x
DECLARE_CUDA_KERNEL(grouped_expand_cuda, const GroupedShrinkParams& p)
DECLARE_CPU_KERNEL(void, grouped_outer_cpu, const GroupedShrinkParams& p)  // w
DECLARE_CUDA_KERNEL(grouped_outer_cuda, const GroupedShrinkParams& p)

// For grouped_lora: row_slot_N null is n for row n, expert_TK null leaves the slots behind the rows
// empty, and a, which is scaled, may be the sum of two parts [T, K, R] that lie one behind the
// other.
DECLARE_CUDA_KERNEL(grouped_shrink_cuda,
                    const GroupedShrinkParams& p,
                    int num_parts,
                    double scaling)
DECLARE_CUDA_KERNEL(grouped_expand_cuda, const GroupedShrinkParams& p, int num_parts)
DECLARE_CUDA_KERNEL(grouped_outer_cuda, const GroupedShrinkParams& p, int num_parts)

}  // namespace mixlora
