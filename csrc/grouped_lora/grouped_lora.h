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
  void* y_NO;
  int64_t N, G, R, I, O;
  double scaling;
  Dtype dtype;
};

struct GroupedLoraBackwardParams {
  const void* dy_NO;
  const void* x_NI;
  const void* lora_a_GRI;
  const void* lora_b_GOR;
  const int32_t* group_start_G1;
  void* dx_NI;
  void* dlora_a_GRI;
  void* dlora_b_GOR;
  int64_t N, G, R, I, O;
  double scaling;
  Dtype dtype;
};

DECLARE_CPU_KERNEL(void, grouped_lora_cpu, const GroupedLoraParams& p)
DECLARE_CUDA_KERNEL(grouped_lora_cuda, const GroupedLoraParams& p)
DECLARE_CPU_KERNEL(void, grouped_lora_backward_cpu, const GroupedLoraBackwardParams& p)
DECLARE_CUDA_KERNEL(grouped_lora_backward_cuda, const GroupedLoraBackwardParams& p)

}  // namespace mixlora
