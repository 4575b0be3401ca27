#include "moe_gather/moe_gather.h"

#include "common/check.h"
#include "common/device.h"
#include "common/plan.h"

namespace mixlora {
namespace {

Tensor moe_gather(const Tensor& x_TD, const Tensor& row_slot_N, const Tensor& slot_row_TK) {
  CHECK_DEVICE("moe_gather", x_TD, row_slot_N, slot_row_TK);
  const Dtype dtype = FLOAT_DTYPE("moe_gather", x_TD);
  const PlanRows plan = check_plan("moe_gather", row_slot_N, slot_row_TK);
  CHECK_DIMS("moe_gather", x_TD, T, D);
  const int64_t T = plan.T, D = x_TD.size(1);
  CHECK_SHAPE("moe_gather", x_TD, T, D);

  const Tensor x = torch::stable::contiguous(x_TD);
  Tensor x_ND = torch::stable::new_empty(x, {plan.N, D});
  const MoeGatherParams params{.x_TD = static_cast<const char*>(x.const_data_ptr()),
                               .row_slot_N = plan.row_slot_N.const_data_ptr<int32_t>(),
                               .x_ND = static_cast<char*>(x_ND.mutable_data_ptr()),
                               .N = plan.N,
                               .K = plan.K,
                               .row_bytes = D * num_bytes(dtype)};
  RUN_KERNEL("moe_gather", moe_gather, x, params);
  return x_ND;
}

}  // namespace

REGISTER_KERNELS(m) { m.impl("moe_gather", TORCH_BOX(&moe_gather)); }

}  // namespace mixlora
