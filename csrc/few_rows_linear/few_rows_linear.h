// The maths are in mixlora/ops/few_rows_linear.py.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace mixlora {

struct FewRowsLinearParams {
  const void *x_TI, *w_OI;
  const void* bias_O;  // null: none
  void* y_TO;
  int64_t T, I, O;
  Dtype dtype;
};

DECLARE_CPU_KERNEL(void, few_rows_linear_cpu, const FewRowsLinearParams& p)

}  // namespace mixlora
