#include "grouped_shrink/grouped_shrink.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/check.h"
#include "common/plan.h"

namespace mixlora {
namespace {

struct Sizes {
  int64_t R, I;
  Dtype dtype;
};

Sizes check_inputs(const char* op,
                   const Tensor& x_TI,
                   const Tensor& lora_a_ERI,
                   const PlanExperts& plan) {
  const Dtype dtype = FLOAT_DTYPE(op, x_TI);
  check_dtype(op, "lora_a_ERI", lora_a_ERI, x_TI.scalar_type());
  CHECK_DIMS(op, x_TI, T, I);
  CHECK_DIMS(op, lora_a_ERI, E, R, I);
  const int64_t T = plan.T, E = plan.E, R = lora_a_ERI.size(1), I = x_TI.size(1);
  CHECK_SHAPE(op, x_TI, T, I);
  CHECK_SHAPE(op, lora_a_ERI, E, R, I);
  return {R, I, dtype};
}

Tensor grouped_shrink(const Tensor& x_TI,
                      const Tensor& lora_a_ERI,
                      const Tensor& expert_TK,
                      const Tensor& expert_start_E1,
                      const Tensor& row_slot_N,
                      const Tensor& token_order_T) {
  const char* op = "grouped_shrink";
  const PlanExperts plan =
      check_plan_experts(op, expert_TK, expert_start_E1, row_slot_N, token_order_T);
  const auto [R, I, dtype] = check_inputs(op, x_TI, lora_a_ERI, plan);
  const Tensor x = torch::stable::contiguous(x_TI), lora_a = torch::stable::contiguous(lora_a_ERI);
  Tensor a_TKR = torch::stable::new_empty(x, {plan.T, plan.K, R});
  CPU_KERNEL(grouped_shrink_cpu)
  ({.x_TI = x.const_data_ptr(),
    .lora_a_ERI = lora_a.const_data_ptr(),
    .expert_TK = plan.expert_TK.const_data_ptr<int32_t>(),
    .expert_start_E1 = plan.expert_start_E1.const_data_ptr<int32_t>(),
    .row_slot_N = plan.row_slot_N.const_data_ptr<int32_t>(),
    .a_TKR = a_TKR.mutable_data_ptr(),
    .T = plan.T,
    .K = plan.K,
    .E = plan.E,
    .R = R,
    .I = I,
    .dtype = dtype});
  return a_TKR;
}

std::tuple<Tensor, Tensor> grouped_shrink_backward(const Tensor& da_TKR,
                                                   const Tensor& x_TI,
                                                   const Tensor& lora_a_ERI,
                                                   const Tensor& expert_TK,
                                                   const Tensor& expert_start_E1,
                                                   const Tensor& row_slot_N,
                                                   const Tensor& token_order_T) {
  const char* op = "grouped_shrink_backward";
  const PlanExperts plan =
      check_plan_experts(op, expert_TK, expert_start_E1, row_slot_N, token_order_T);
  const auto [R, I, dtype] = check_inputs(op, x_TI, lora_a_ERI, plan);
  const int64_t T = plan.T, K = plan.K;
  check_dtype(op, "da_TKR", da_TKR, x_TI.scalar_type());
  CHECK_SHAPE(op, da_TKR, T, K, R);
  const Tensor da = torch::stable::contiguous(da_TKR), x = torch::stable::contiguous(x_TI),
               lora_a = torch::stable::contiguous(lora_a_ERI);
  Tensor dx_TI = torch::stable::new_empty(x, {T, I});
  Tensor dlora_a_ERI = torch::stable::new_empty(lora_a, {plan.E, R, I});
  CPU_KERNEL(grouped_shrink_backward_cpu)
  ({.da_TKR = da.const_data_ptr(),
    .x_TI = x.const_data_ptr(),
    .lora_a_ERI = lora_a.const_data_ptr(),
    .expert_TK = plan.expert_TK.const_data_ptr<int32_t>(),
    .expert_start_E1 = plan.expert_start_E1.const_data_ptr<int32_t>(),
    .row_slot_N = plan.row_slot_N.const_data_ptr<int32_t>(),
    .token_order_T = plan.token_order_T.const_data_ptr<int32_t>(),
    .dx_TI = dx_TI.mutable_data_ptr(),
    .dlora_a_ERI = dlora_a_ERI.mutable_data_ptr(),
    .T = T,
    .K = K,
    .E = plan.E,
    .R = R,
    .I = I,
    .dtype = dtype});
  return {dx_TI, dlora_a_ERI};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixlora, CPU, m) {
  m.impl("grouped_shrink", TORCH_BOX(&grouped_shrink));
  m.impl("grouped_shrink_backward", TORCH_BOX(&grouped_shrink_backward));
}

}  // namespace mixlora
