// The maths are in mixlora/ops/grouped_shrink.py.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace mixlora {

struct GroupedShrinkParams {
  const void* x_TI;
  const void* lora_a_ERI;
  const int32_t* expert_TK;
  const int32_t* expert_start_E1;
  const int32_t* row_slot_N;
  void* a_TKR;
  int64_t T, K, E, R, I;
  Dtype dtype;
};

struct GroupedShrinkBackwardParams {
  const void* da_TKR;
  const void* x_TI;
  const void* lora_a_ERI;
  const int32_t* expert_TK;
  const int32_t* expert_start_E1;
  const int32_t* row_slot_N;
  const int32_t* token_order_T;
  void* dx_TI;
  void* dlora_a_ERI;
  int64_t T, K, E, R, I;
  Dtype dtype;
};

DECLARE_CPU_KERNEL(void, grouped_shrink_cpu, const GroupedShrinkParams& p)
DECLARE_CPU_KERNEL(void, grouped_shrink_backward_cpu, const GroupedShrinkBackwardParams& p)

}  // namespace mixlora
