// The maths are in mixlora/ops/dropout.py.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace mixlora {

struct DropoutParams {
  const void* x_ND;
  void* y_ND;
  int64_t N, D, seed;
  double p;
  Dtype dtype;
};

DECLARE_CPU_KERNEL(void, dropout_cpu, const DropoutParams& p)

}  // namespace mixlora
