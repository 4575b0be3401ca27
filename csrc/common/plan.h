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

}  // namespace mixlora
