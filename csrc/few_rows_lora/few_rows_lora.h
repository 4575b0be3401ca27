// The maths are in mixlora/ops/few_rows_lora.py.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace mixlora {

struct FewRowsLoraParams {
  const void *y_TO, *x_TI, *lora_a_RI, *lora_b_OR;
  void* sum_TO;
  int64_t T, I, O, R;
  double scaling;
  Dtype dtype;
};

DECLARE_CPU_KERNEL(void, few_rows_lora_cpu, const FewRowsLoraParams& p)

}  // namespace mixlora
