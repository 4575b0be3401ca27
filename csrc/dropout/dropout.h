// The maths are in mixlora/ops/dropout.py.
#pragma once

#include <cstdint>

#include "common/cuda.h"
#include "common/dtype.h"
#include "common/isa.h"

namespace mixlora {

struct DropoutParams {
  const void* x_ND;
  void* y_ND;
  const int64_t* seed;
  int64_t N, D;
  double p;
  Dtype dtype;
};

DECLARE_CPU_KERNEL(void, dropout_cpu, const DropoutParams& p)
DECLARE_CUDA_KERNEL(dropout_cuda, const DropoutParams& p)

}  // namespace mixlora
