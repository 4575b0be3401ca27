// The maths are in mixlora/ops/moe_sort.py.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace mixlora {

struct MoeSortParams {
  const int32_t* expert_TK;
  int32_t* expert_start_E1;
  int32_t* row_slot_N;
  int32_t* slot_row_TK;
  int32_t* token_order_T;
  int64_t T, K, E;
};

// Returns -1, or the first slot whose expert is outside [-1, E); nothing is written then.
DECLARE_CPU_KERNEL(int64_t, moe_sort_cpu, const MoeSortParams& p)

}  // namespace mixlora
