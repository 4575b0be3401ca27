#include "few_rows_lora/few_rows_lora.h"

#include "common/check.h"
#include "common/device.h"

namespace mixlora {
namespace {

Tensor few_rows_lora(
    const Tensor& y, const Tensor& x, const Tensor& lora_a, const Tensor& lora_b, double scaling) {
  CHECK_DEVICE("few_rows_lora", y, x, lora_a, lora_b);
  const Dtype dtype = FLOAT_DTYPE("few_rows_lora", x);
  check_dtype("few_rows_lora", "y", y, x.scalar_type());
  check_dtype("few_rows_lora", "lora_a", lora_a, x.scalar_type());
  check_dtype("few_rows_lora", "lora_b", lora_b, x.scalar_type());
  CHECK("few_rows_lora", x.dim() >= 1, "x must be [..., I], got []");
  CHECK("few_rows_lora", y.dim() >= 1, "y must be [..., O], got []");
  CHECK_DIMS("few_rows_lora", lora_a, R, I);
  const int64_t T = rows_of(x), I = x.size(-1), O = y.size(-1), R = lora_a.size(0);
  std::vector<int64_t> sizes = shape(x);
  sizes.back() = O;
  CHECK("few_rows_lora",
        shape(y) == sizes,
        "y must be [..., O] = ",
        shape_text(sizes),
        ", got ",
        shape_text(shape(y)));
  CHECK_SHAPE("few_rows_lora", lora_a, R, I);
  CHECK_SHAPE("few_rows_lora", lora_b, O, R);
  const Tensor y_TO = torch::stable::contiguous(y), x_TI = torch::stable::contiguous(x),
               a = torch::stable::contiguous(lora_a), b = torch::stable::contiguous(lora_b);
  Tensor sum = torch::stable::empty_like(y_TO);
  CPU_KERNEL(few_rows_lora_cpu)
  (FewRowsLoraParams{.y_TO = y_TO.const_data_ptr(),
                     .x_TI = x_TI.const_data_ptr(),
                     .lora_a_RI = a.const_data_ptr(),
                     .lora_b_OR = b.const_data_ptr(),
                     .sum_TO = sum.mutable_data_ptr(),
                     .T = T,
                     .I = I,
                     .O = O,
                     .R = R,
                     .scaling = scaling,
                     .dtype = dtype});
  return sum;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixlora, CPU, m) { m.impl("few_rows_lora", TORCH_BOX(&few_rows_lora)); }

}  // namespace mixlora
