#include "moe_scatter/moe_scatter.h"

#include <tuple>

#include "common/check.h"
#include "common/device.h"
#include "common/plan.h"

namespace mixlora {
namespace {

// The weights as the kernels want them.
Tensor check_weight(
    const char* op, const Tensor& weight_TK, const Tensor& y_ND, int64_t T, int64_t K) {
  const ScalarType got = weight_TK.scalar_type(), rows = y_ND.scalar_type();
  CHECK(op,
        got == ScalarType::Float || got == rows,
        "weight_TK must be float32 or, as y_ND, ",
        dtype_name(rows),
        ", got ",
        dtype_name(got));
  CHECK_SHAPE(op, weight_TK, T, K);
  const ScalarType wide = wide_dtype(FLOAT_DTYPE(op, y_ND));
  return torch::stable::contiguous(torch::stable::to(weight_TK, wide));
}

Tensor moe_scatter(const Tensor& y_ND,
                   const Tensor& row_slot_N,
                   const Tensor& slot_row_TK,
                   const Optional& weight_TK) {
  CHECK_DEVICE("moe_scatter", y_ND, row_slot_N, slot_row_TK, weight_TK);
  const Dtype dtype = FLOAT_DTYPE("moe_scatter", y_ND);
  const PlanRows plan = check_plan("moe_scatter", row_slot_N, slot_row_TK);
  CHECK_DIMS("moe_scatter", y_ND, N, D);
  const int64_t T = plan.T, K = plan.K, N = plan.N, D = y_ND.size(1);
  CHECK_SHAPE("moe_scatter", y_ND, N, D);
  Optional weight;
  if (weight_TK) weight = check_weight("moe_scatter", *weight_TK, y_ND, T, K);

  const Tensor y = torch::stable::contiguous(y_ND);
  Tensor y_TD = torch::stable::new_empty(y, {T, D});
  const MoeScatterParams params{.y_ND = y.const_data_ptr(),
                                .slot_row_TK = plan.slot_row_TK.const_data_ptr<int32_t>(),
                                .weight_TK = weight ? weight->const_data_ptr() : nullptr,
                                .y_TD = y_TD.mutable_data_ptr(),
                                .T = T,
                                .K = K,
                                .D = D,
                                .dtype = dtype};
  RUN_KERNEL("moe_scatter", moe_scatter, y, params);
  return y_TD;
}

std::tuple<Tensor, Tensor> moe_scatter_backward(const Tensor& dy_TD,
                                                const Tensor& y_ND,
                                                const Tensor& row_slot_N,
                                                const Tensor& slot_row_TK,
                                                const Tensor& weight_TK) {
  CHECK_DEVICE("moe_scatter_backward", y_ND, dy_TD, row_slot_N, slot_row_TK, weight_TK);
  const Dtype dtype = FLOAT_DTYPE("moe_scatter_backward", y_ND);
  check_dtype("moe_scatter_backward", "dy_TD", dy_TD, y_ND.scalar_type());
  const PlanRows plan = check_plan("moe_scatter_backward", row_slot_N, slot_row_TK);
  CHECK_DIMS("moe_scatter_backward", y_ND, N, D);
  const int64_t T = plan.T, K = plan.K, N = plan.N, D = y_ND.size(1);
  CHECK_SHAPE("moe_scatter_backward", y_ND, N, D);
  CHECK_SHAPE("moe_scatter_backward", dy_TD, T, D);
  const Tensor weight = check_weight("moe_scatter_backward", weight_TK, y_ND, T, K);

  const Tensor y = torch::stable::contiguous(y_ND), dy = torch::stable::contiguous(dy_TD);
  Tensor dy_ND = torch::stable::new_empty(y, {N, D});
  Tensor dweight_TK = torch::stable::new_empty(weight, {T, K});
  const MoeScatterBackwardParams params{.dy_TD = dy.const_data_ptr(),
                                        .y_ND = y.const_data_ptr(),
                                        .row_slot_N = plan.row_slot_N.const_data_ptr<int32_t>(),
                                        .slot_row_TK = plan.slot_row_TK.const_data_ptr<int32_t>(),
                                        .weight_TK = weight.const_data_ptr(),
                                        .dy_ND = dy_ND.mutable_data_ptr(),
                                        .dweight_TK = dweight_TK.mutable_data_ptr(),
                                        .T = T,
                                        .K = K,
                                        .D = D,
                                        .dtype = dtype};
  RUN_KERNEL("moe_scatter_backward", moe_scatter_backward, y, params);
  return {dy_ND, torch::stable::to(dweight_TK, weight_TK.scalar_type())};
}

}  // namespace

REGISTER_KERNELS(m) {
  m.impl("moe_scatter", TORCH_BOX(&moe_scatter));
  m.impl("moe_scatter_backward", TORCH_BOX(&moe_scatter_backward));
}

}  // namespace mixlora
