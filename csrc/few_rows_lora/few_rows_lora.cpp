#include "few_rows_lora/few_rows_lora.h"

#include "common/check.h"
#include "common/device.h"

namespace mixlora {
namespace {

Tensor few_rows_lora(const Tensor& y_TO,
                     const Tensor& x_TI,
                     const Tensor& lora_a,
                     const Tensor& lora_b,
                     double scaling) {
  CHECK_DEVICE("few_rows_lora", y_TO, x_TI, lora_a, lora_b);
  const Dtype dtype = FLOAT_DTYPE("few_rows_lora", x_TI);
  check_dtype("few_rows_lora", "y_TO", y_TO, x_TI.scalar_type());
  check_dtype("few_rows_lora", "lora_a", lora_a, x_TI.scalar_type());
  check_dtype("few_rows_lora", "lora_b", lora_b, x_TI.scalar_type());
  CHECK_DIMS("few_rows_lora", x_TI, T, I);
  CHECK_DIMS("few_rows_lora", y_TO, T, O);
  CHECK_DIMS("few_rows_lora", lora_a, R, I);
  const int64_t T = x_TI.size(0), I = x_TI.size(1), O = y_TO.size(1), R = lora_a.size(0);
  CHECK_SHAPE("few_rows_lora", y_TO, T, O);
  CHECK_SHAPE("few_rows_lora", lora_a, R, I);
  CHECK_SHAPE("few_rows_lora", lora_b, O, R);
  const Tensor y = torch::stable::contiguous(y_TO), x = torch::stable::contiguous(x_TI),
               a = torch::stable::contiguous(lora_a), b = torch::stable::contiguous(lora_b);
  Tensor sum_TO = torch::stable::empty_like(y);
  CPU_KERNEL(few_rows_lora_cpu)
  (FewRowsLoraParams{.y_TO = y.const_data_ptr(),
                     .x_TI = x.const_data_ptr(),
                     .lora_a_RI = a.const_data_ptr(),
                     .lora_b_OR = b.const_data_ptr(),
                     .sum_TO = sum_TO.mutable_data_ptr(),
                     .T = T,
                     .I = I,
                     .O = O,
                     .R = R,
                     .scaling = scaling,
                     .dtype = dtype});
  return sum_TO;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixlora, CPU, m) { m.impl("few_rows_lora", TORCH_BOX(&few_rows_lora)); }

}  // namespace mixlora
