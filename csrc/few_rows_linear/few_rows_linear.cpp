#include "few_rows_linear/few_rows_linear.h"

#include "common/check.h"
#include "common/device.h"

namespace mixlora {
namespace {

Tensor few_rows_linear(const Tensor& x_TI, const Tensor& w_OI, const Optional& bias_O) {
  CHECK_DEVICE("few_rows_linear", x_TI, w_OI, bias_O);
  const Dtype dtype = FLOAT_DTYPE("few_rows_linear", x_TI);
  check_dtype("few_rows_linear", "w_OI", w_OI, x_TI.scalar_type());
  CHECK_DIMS("few_rows_linear", x_TI, T, I);
  CHECK_DIMS("few_rows_linear", w_OI, O, I);
  const int64_t T = x_TI.size(0), I = x_TI.size(1), O = w_OI.size(0);
  CHECK_SHAPE("few_rows_linear", w_OI, O, I);
  const Tensor x = torch::stable::contiguous(x_TI), w = torch::stable::contiguous(w_OI);
  Tensor y_TO = torch::stable::new_empty(x, {T, O}), bias = x;
  if (bias_O) {
    check_dtype("few_rows_linear", "bias_O", *bias_O, x_TI.scalar_type());
    CHECK_SHAPE("few_rows_linear", *bias_O, O);
    bias = torch::stable::contiguous(*bias_O);
  }
  CPU_KERNEL(few_rows_linear_cpu)
  (FewRowsLinearParams{.x_TI = x.const_data_ptr(),
                       .w_OI = w.const_data_ptr(),
                       .bias_O = bias_O ? bias.const_data_ptr() : nullptr,
                       .y_TO = y_TO.mutable_data_ptr(),
                       .T = T,
                       .I = I,
                       .O = O,
                       .dtype = dtype});
  return y_TO;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixlora, CPU, m) {
  m.impl("few_rows_linear", TORCH_BOX(&few_rows_linear));
}

}  // namespace mixlora
