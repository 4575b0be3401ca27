// The maths are in mixlora/ops/moe_gather.py.
#pragma once

#include <cstdint>

#include "common/cuda.h"
#include "common/isa.h"

namespace mixlora {

struct MoeGatherParams {
  const char* x_TD;
  const int32_t* row_slot_N;
  char* x_ND;
  int64_t N, K, row_bytes;
};

DECLARE_CPU_KERNEL(void, moe_gather_cpu, const MoeGatherParams& p)
DECLARE_CUDA_KERNEL(moe_gather_cuda, const MoeGatherParams& p)

}  // namespace mixlora
