// The maths are in mixlora/ops/moe_scatter.py.
#pragma once

#include <cstdint>

#include "common/cuda.h"
#include "common/dtype.h"
#include "common/isa.h"

namespace mixlora {

// Weights are fp64 where the rows are, else fp32.
struct MoeScatterParams {
  const void* y_ND;
  const int32_t* slot_row_TK;
  const void* weight_TK;  // null: 1
  void* y_TD;
  int64_t T, K, D;
  Dtype dtype;
};

struct MoeScatterBackwardParams {
  const void* dy_TD;
  const void* y_ND;
  const int32_t* row_slot_N;
  const int32_t* slot_row_TK;
  const void* weight_TK;
  void* dy_ND;
  void* dweight_TK;
  int64_t T, K, D;
  Dtype dtype;
};

DECLARE_CPU_KERNEL(void, moe_scatter_cpu, const MoeScatterParams& p)
DECLARE_CUDA_KERNEL(moe_scatter_cuda, const MoeScatterParams& p)
DECLARE_CPU_KERNEL(void, moe_scatter_backward_cpu, const MoeScatterBackwardParams& p)
DECLARE_CUDA_KERNEL(moe_scatter_backward_cuda, const MoeScatterBackwardParams& p)

}  // namespace mixlora
