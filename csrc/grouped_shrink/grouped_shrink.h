// The maths are in mixlora/ops/grouped_shrink.py.
#pragma once

#include <cstdint>

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
DECLARE_CPU_KERNEL(void, grouped_expand_cpu, const GroupedShrinkParams& p)  // x
DECLARE_CPU_KERNEL(void, grouped_outer_cpu, const GroupedShrinkParams& p)   // w

}  // namespace mixlora
