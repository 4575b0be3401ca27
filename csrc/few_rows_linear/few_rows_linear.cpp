#include "few_rows_linear/few_rows_linear.h"

#include "common/check.h"
#include "common/device.h"

namespace mixlora {
namespace {

Tensor few_rows_linear(const Tensor& x, const Tensor& w_OI, const Optional& bias_O) {
  CHECK_DEVICE("few_rows_linear", x, w_OI, bias_O);
  const Dtype dtype = FLOAT_DTYPE("few_rows_linear", x);
  check_dtype("few_rows_linear", "w_OI", w_OI, x.scalar_type());
  CHECK("few_rows_linear", x.dim() >= 1, "x must be [..., I], got []");
  CHECK_DIMS("few_rows_linear", w_OI, O, I);
  const int64_t I = x.size(-1), O = w_OI.size(0);
  CHECK_SHAPE("few_rows_linear", w_OI, O, I);
  std::vector<int64_t> sizes = shape(x);
  sizes.back() = O;
  const int64_t T = rows_of(x);
  const Tensor x_TI = torch::stable::contiguous(x), w = torch::stable::contiguous(w_OI);
  Tensor y = torch::stable::new_empty(x, sizes), bias = x;
  if (bias_O) {
    check_dtype("few_rows_linear", "bias_O", *bias_O, x.scalar_type());
    CHECK_SHAPE("few_rows_linear", *bias_O, O);
    bias = torch::stable::contiguous(*bias_O);
  }
  CPU_KERNEL(few_rows_linear_cpu)
  (FewRowsLinearParams{.x_TI = x_TI.const_data_ptr(),
                       .w_OI = w.const_data_ptr(),
                       .bias_O = bias_O ? bias.const_data_ptr() : nullptr,
                       .y_TO = y.mutable_data_ptr(),
                       .T = T,
                       .I = I,
                       .O = O,
                       .dtype = dtype});
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixlora, CPU, m) {
  m.impl("few_rows_linear", TORCH_BOX(&few_rows_linear));
}

}  // namespace mixlora
