#include "moe_sort/moe_sort.h"

#include <limits>
#include <tuple>

#include "common/check.h"
#include "common/device.h"

namespace mixlora {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_sort(const Tensor& expert_TK, int64_t num_experts) {
  CHECK_DEVICE("moe_sort", expert_TK);
  CHECK_DTYPE("moe_sort", expert_TK, Int);
  CHECK_DIMS("moe_sort", expert_TK, T, K);
  const int64_t T = expert_TK.size(0), K = expert_TK.size(1), E = num_experts, N = T * K;
  CHECK("moe_sort", K >= 1, "expert_TK must have K >= 1 slots, got ", shape_text({T, K}));
  CHECK("moe_sort", E >= 1, "num_experts must be at least 1, got ", E);
  constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
  CHECK("moe_sort", N <= kMaxInt32 && E < kMaxInt32, "T * K and num_experts must fit int32");

  const Tensor dense_TK = torch::stable::contiguous(expert_TK);
  check_indices("moe_sort", "expert_TK", dense_TK, -1, E);
  Tensor expert_start_E1 = torch::stable::new_empty(dense_TK, {E + 1});
  Tensor row_slot_N = torch::stable::new_empty(dense_TK, {N});
  Tensor slot_row_TK = torch::stable::new_empty(dense_TK, {T, K});
  Tensor token_order_T = torch::stable::new_empty(dense_TK, {T});

  const MoeSortParams params{.expert_TK = dense_TK.const_data_ptr<int32_t>(),
                             .expert_start_E1 = expert_start_E1.mutable_data_ptr<int32_t>(),
                             .row_slot_N = row_slot_N.mutable_data_ptr<int32_t>(),
                             .slot_row_TK = slot_row_TK.mutable_data_ptr<int32_t>(),
                             .token_order_T = token_order_T.mutable_data_ptr<int32_t>(),
                             .T = T,
                             .K = K,
                             .E = E};
  RUN_KERNEL("moe_sort", moe_sort, dense_TK, params);
  return {expert_start_E1, row_slot_N, slot_row_TK, token_order_T};
}

}  // namespace

REGISTER_KERNELS(m) { m.impl("moe_sort", TORCH_BOX(&moe_sort)); }

}  // namespace mixlora
