// The maths are in mixlora/ops/grouped_lora.py.
#pragma once

#include <cstdint>

#include "common/cuda.h"
#include "common/dtype.h"
#include "common/isa.h"

namespace mixlora {

struct GroupedLoraParams {
  const void* x_NI;
  const void* lora_a_GRI;
  const void* lora_b_GOR;
  const int32_t* group_start_G1;
  int64_t N, G, R, I, O;
  double scaling;
  Dtype dtype;
  // forward
  void* y_NO;
  // backward
  const void* dy_NO;
  void *dx_NI, *dlora_a_GRI, *dlora_b_GOR;
};

DECLARE_CPU_KERNEL(void, grouped_lora_cpu, const GroupedLoraParams& p)
DECLARE_CUDA_KERNEL(grouped_lora_cuda, const GroupedLoraParams& p)
DECLARE_CPU_KERNEL(void, grouped_lora_backward_cpu, const GroupedLoraParams& p)
DECLARE_CUDA_KERNEL(grouped_lora_backward_cuda, const GroupedLoraParams& p)

}  // namespace mixlora
