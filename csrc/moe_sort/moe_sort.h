// The maths are in mixlora/ops/moe_sort.py.
#pragma once

#include <cstdint>

#include "common/cuda.h"
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

DECLARE_CPU_KERNEL(void, moe_sort_cpu, const MoeSortParams& p)
DECLARE_CUDA_KERNEL(moe_sort_cuda, const MoeSortParams& p)

}  // namespace mixlora
