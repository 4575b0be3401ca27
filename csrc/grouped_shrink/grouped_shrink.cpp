#include "grouped_shrink/grouped_shrink.h"

#include "common/check.h"
#include "common/device.h"
#include "common/plan.h"

namespace mixlora {
namespace {

void check_w(const char* op, const Tensor& w, int64_t E, int64_t R, int64_t I, bool transposed) {
  if (transposed) {
    CHECK_SHAPE(op, w, E, I, R);
  } else {
    CHECK_SHAPE(op, w, E, R, I);
  }
}

GroupedShrinkParams params(
    const PlanExperts& plan, int64_t R, int64_t I, bool transposed, Dtype dtype) {
  return {.expert_TK = plan.expert_TK.const_data_ptr<int32_t>(),
          .expert_start_E1 = plan.expert_start_E1.const_data_ptr<int32_t>(),
          .row_slot_N = plan.row_slot_N.const_data_ptr<int32_t>(),
          .T = plan.T,
          .K = plan.K,
          .E = plan.E,
          .R = R,
          .I = I,
          .transposed = transposed,
          .dtype = dtype};
}

Tensor grouped_shrink(const Tensor& x_TI,
                      const Tensor& w,
                      bool transposed,
                      const Tensor& expert_TK,
                      const Tensor& expert_start_E1,
                      const Tensor& row_slot_N) {
  const char* op = "grouped_shrink";
  CHECK_DEVICE(op, x_TI, w, expert_TK, expert_start_E1, row_slot_N);
  const PlanExperts plan = check_plan_experts(op, expert_TK, expert_start_E1, row_slot_N);
  const Dtype dtype = FLOAT_DTYPE(op, x_TI);
  check_dtype(op, "w", w, x_TI.scalar_type());
  CHECK_DIMS(op, x_TI, T, I);
  CHECK_DIMS(op, w, E, R, I);
  const int64_t T = plan.T, I = x_TI.size(1), R = w.size(transposed ? 2 : 1);
  CHECK_SHAPE(op, x_TI, T, I);
  check_w(op, w, plan.E, R, I, transposed);
  const Tensor x = torch::stable::contiguous(x_TI), w_near = torch::stable::contiguous(w);
  Tensor a_TKR = torch::stable::new_empty(x, {T, plan.K, R});
  GroupedShrinkParams p = params(plan, R, I, transposed, dtype);
  p.x_TI = x.const_data_ptr(), p.w = w_near.const_data_ptr();
  p.result = a_TKR.mutable_data_ptr();
  RUN_KERNEL(op, grouped_shrink, plan.row_slot_N, p);
  return a_TKR;
}

Tensor grouped_expand(const Tensor& a_TKR,
                      const Tensor& w,
                      bool transposed,
                      const Tensor& expert_TK,
                      const Tensor& expert_start_E1,
                      const Tensor& row_slot_N) {
  const char* op = "grouped_expand";
  CHECK_DEVICE(op, a_TKR, w, expert_TK, expert_start_E1, row_slot_N);
  const PlanExperts plan = check_plan_experts(op, expert_TK, expert_start_E1, row_slot_N);
  const Dtype dtype = FLOAT_DTYPE(op, a_TKR);
  check_dtype(op, "w", w, a_TKR.scalar_type());
  CHECK_DIMS(op, a_TKR, T, K, R);
  CHECK_DIMS(op, w, E, R, I);
  const int64_t T = plan.T, K = plan.K, R = a_TKR.size(2), I = w.size(transposed ? 1 : 2);
  CHECK_SHAPE(op, a_TKR, T, K, R);
  check_w(op, w, plan.E, R, I, transposed);
  const Tensor a = torch::stable::contiguous(a_TKR), w_near = torch::stable::contiguous(w);
  Tensor x_TI = torch::stable::new_empty(a, {T, I});
  GroupedShrinkParams p = params(plan, R, I, transposed, dtype);
  p.a_TKR = a.const_data_ptr(), p.w = w_near.const_data_ptr();
  p.result = x_TI.mutable_data_ptr();
  RUN_KERNEL(op, grouped_expand, plan.row_slot_N, p);
  return x_TI;
}

Tensor grouped_outer(const Tensor& a_TKR,
                     const Tensor& x_TI,
                     bool transposed,
                     const Tensor& expert_TK,
                     const Tensor& expert_start_E1,
                     const Tensor& row_slot_N) {
  const char* op = "grouped_outer";
  CHECK_DEVICE(op, a_TKR, x_TI, expert_TK, expert_start_E1, row_slot_N);
  const PlanExperts plan = check_plan_experts(op, expert_TK, expert_start_E1, row_slot_N);
  const Dtype dtype = FLOAT_DTYPE(op, a_TKR);
  check_dtype(op, "x_TI", x_TI, a_TKR.scalar_type());
  CHECK_DIMS(op, a_TKR, T, K, R);
  CHECK_DIMS(op, x_TI, T, I);
  const int64_t T = plan.T, K = plan.K, E = plan.E, R = a_TKR.size(2), I = x_TI.size(1);
  CHECK_SHAPE(op, a_TKR, T, K, R);
  CHECK_SHAPE(op, x_TI, T, I);
  const Tensor a = torch::stable::contiguous(a_TKR), x = torch::stable::contiguous(x_TI);
  Tensor w = torch::stable::new_empty(x, {E, transposed ? I : R, transposed ? R : I});
  GroupedShrinkParams p = params(plan, R, I, transposed, dtype);
  p.a_TKR = a.const_data_ptr(), p.x_TI = x.const_data_ptr();
  p.result = w.mutable_data_ptr();
  RUN_KERNEL(op, grouped_outer, plan.row_slot_N, p);
  return w;
}

}  // namespace

REGISTER_KERNELS(m) {
  m.impl("grouped_shrink", TORCH_BOX(&grouped_shrink));
  m.impl("grouped_expand", TORCH_BOX(&grouped_expand));
  m.impl("grouped_outer", TORCH_BOX(&grouped_outer));
}

}  // namespace mixlora
