// What an op asks of the routing plan it is given (mixlora/ops/moe_sort.py).
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/check.h"

namespace mixlora {

struct PlanRows {
  Tensor row_slot_N, slot_row_TK;
  int64_t T, K, N;
};

inline PlanRows check_plan(const char* op, const Tensor& row_slot_N, const Tensor& slot_row_TK) {
  CHECK_DTYPE(op, row_slot_N, Int);
  CHECK_DTYPE(op, slot_row_TK, Int);
  CHECK_DIMS(op, slot_row_TK, T, K);
  const int64_t T = slot_row_TK.size(0), K = slot_row_TK.size(1), N = T * K;
  CHECK_SHAPE(op, row_slot_N, N);
  const PlanRows plan{
      torch::stable::contiguous(row_slot_N), torch::stable::contiguous(slot_row_TK), T, K, N};
  check_indices(op, "row_slot_N", plan.row_slot_N, -1, N);
  check_indices(op, "slot_row_TK", plan.slot_row_TK, -1, N);
  return plan;
}

struct PlanExperts {
  Tensor expert_TK, expert_start_E1, row_slot_N;
  int64_t T, K, E;
};

inline void check_rows(const char* op, PlanExperts& plan) {
  if (!plan.row_slot_N.is_cpu()) return;
  const int32_t *start_E1 = plan.expert_start_E1.const_data_ptr<int32_t>(),
                *slot_N = plan.row_slot_N.const_data_ptr<int32_t>();
  const Tensor rows = torch::stable::narrow(plan.row_slot_N, 0, 0, start_E1[plan.E]);
  check_indices(op, "row_slot_N", rows, 0, plan.T * plan.K);
  for (int64_t e = 0; e < plan.E; ++e) {
    CHECK(op,
          std::is_sorted(slot_N + start_E1[e], slot_N + start_E1[e + 1]),
          "row_slot_N must ascend among the rows of expert ",
          e);
  }
}

inline PlanExperts check_plan_experts(const char* op,
                                      const Tensor& expert_TK,
                                      const Tensor& expert_start_E1,
                                      const Tensor& row_slot_N) {
  CHECK_DTYPE(op, expert_TK, Int);
  CHECK_DTYPE(op, expert_start_E1, Int);
  CHECK_DTYPE(op, row_slot_N, Int);
  CHECK_DIMS(op, expert_TK, T, K);
  CHECK_DIMS(op, expert_start_E1, E1);
  const int64_t T = expert_TK.size(0), K = expert_TK.size(1), N = T * K;
  CHECK_SHAPE(op, row_slot_N, N);
  PlanExperts plan{torch::stable::contiguous(expert_TK),
                   torch::stable::contiguous(expert_start_E1),
                   torch::stable::contiguous(row_slot_N),
                   T,
                   K,
                   expert_start_E1.size(0) - 1};
  check_starts(op, "expert_start_E1", plan.expert_start_E1, N);
  check_indices(op, "expert_TK", plan.expert_TK, -1, plan.E);
  check_rows(op, plan);
  return plan;
}

}  // namespace mixlora
