#include "topk_router/topk_router.h"

#include <tuple>

#include "common/check.h"
#include "common/device.h"

namespace mixlora {
namespace {

Optional check_mask(const char* op, const Optional& mask, int64_t T) {
  if (!mask) return std::nullopt;
  const Tensor& mask_T = *mask;
  CHECK_DTYPE(op, mask_T, Bool);
  CHECK_SHAPE(op, mask_T, T);
  return torch::stable::contiguous(mask_T);
}

Tensor check_experts(const char* op, const Tensor& expert_TK, int64_t T, int64_t K, int64_t E) {
  CHECK_DTYPE(op, expert_TK, Int);
  CHECK_SHAPE(op, expert_TK, T, K);
  const Tensor dense_TK = torch::stable::contiguous(expert_TK);
  check_indices(op, "expert_TK", dense_TK, 0, E);
  return dense_TK;
}

const bool* mask_pointer(const Optional& mask_T) {
  return mask_T ? static_cast<const bool*>(mask_T->const_data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topk_router(
    const Tensor& logits_TE, int64_t top_k, const Optional& mask_T, const Optional& expert_TK) {
  CHECK_DEVICE("topk_router", logits_TE, mask_T, expert_TK);
  const Dtype dtype = FLOAT_DTYPE("topk_router", logits_TE);
  CHECK_DIMS("topk_router", logits_TE, T, E);
  const int64_t T = logits_TE.size(0), E = logits_TE.size(1), K = top_k;
  CHECK("topk_router", 1 <= K && K <= E, "top_k must be in [1, ", E, "], got ", K);
  const Optional mask = check_mask("topk_router", mask_T, T);
  Optional given;
  if (expert_TK) given = check_experts("topk_router", *expert_TK, T, K, E);

  const Tensor logits = torch::stable::contiguous(logits_TE);
  const auto wide = wide_dtype(dtype);
  Tensor chosen_TK = torch::stable::new_empty(logits, {T, K}, ScalarType::Int);
  Tensor weight_TK = torch::stable::new_empty(logits, {T, K}, wide);
  Tensor count_E = torch::stable::new_empty(logits, {E}, wide);
  Tensor prob_E = torch::stable::new_empty(logits, {E}, wide);
  Tensor entropy = torch::stable::new_empty(logits, {}, wide);
  Tensor z = torch::stable::new_empty(logits, {}, wide);
  Tensor num_tokens = torch::stable::new_empty(logits, {}, wide);
  const TopkRouterParams params{.logits_TE = logits.const_data_ptr(),
                                .mask_T = mask_pointer(mask),
                                .given_TK = given ? given->const_data_ptr<int32_t>() : nullptr,
                                .expert_TK = chosen_TK.mutable_data_ptr<int32_t>(),
                                .weight_TK = weight_TK.mutable_data_ptr(),
                                .count_E = count_E.mutable_data_ptr(),
                                .prob_E = prob_E.mutable_data_ptr(),
                                .entropy = entropy.mutable_data_ptr(),
                                .z = z.mutable_data_ptr(),
                                .num_tokens = num_tokens.mutable_data_ptr(),
                                .T = T,
                                .E = E,
                                .K = K,
                                .dtype = dtype};
  RUN_KERNEL("topk_router", topk_router, logits, params);
  return {weight_TK, prob_E, z, chosen_TK, count_E, entropy, num_tokens};
}

Tensor topk_router_backward(const Tensor& dweight_TK,
                            const Tensor& dprob_E,
                            const Tensor& dz,
                            const Tensor& logits_TE,
                            const Tensor& expert_TK,
                            const Optional& mask_T) {
  CHECK_DEVICE("topk_router_backward", logits_TE, dweight_TK, dprob_E, dz, expert_TK, mask_T);
  const Dtype dtype = FLOAT_DTYPE("topk_router_backward", logits_TE);
  CHECK_DIMS("topk_router_backward", logits_TE, T, E);
  CHECK_DIMS("topk_router_backward", expert_TK, T, K);
  const int64_t T = logits_TE.size(0), E = logits_TE.size(1), K = expert_TK.size(1);
  check_dtype("topk_router_backward", "dweight_TK", dweight_TK, wide_dtype(dtype));
  check_dtype("topk_router_backward", "dprob_E", dprob_E, wide_dtype(dtype));
  check_dtype("topk_router_backward", "dz", dz, wide_dtype(dtype));
  CHECK_SHAPE("topk_router_backward", dweight_TK, T, K);
  CHECK_SHAPE("topk_router_backward", dprob_E, E);
  CHECK("topk_router_backward", dz.dim() == 0, "dz must be [], got ", shape_text(shape(dz)));
  const Tensor expert = check_experts("topk_router_backward", expert_TK, T, K, E);
  const Optional mask = check_mask("topk_router_backward", mask_T, T);

  const Tensor logits = torch::stable::contiguous(logits_TE);
  const Tensor dweight = torch::stable::contiguous(dweight_TK);
  const Tensor dprob = torch::stable::contiguous(dprob_E);
  Tensor dlogits_TE = torch::stable::new_empty(logits, {T, E});
  const TopkRouterBackwardParams params{.dweight_TK = dweight.const_data_ptr(),
                                        .dprob_E = dprob.const_data_ptr(),
                                        .dz = dz.const_data_ptr(),
                                        .logits_TE = logits.const_data_ptr(),
                                        .expert_TK = expert.const_data_ptr<int32_t>(),
                                        .mask_T = mask_pointer(mask),
                                        .dlogits_TE = dlogits_TE.mutable_data_ptr(),
                                        .T = T,
                                        .E = E,
                                        .K = K,
                                        .dtype = dtype};
  RUN_KERNEL("topk_router_backward", topk_router_backward, logits, params);
  return dlogits_TE;
}

}  // namespace

REGISTER_KERNELS(m) {
  m.impl("topk_router", TORCH_BOX(&topk_router));
  m.impl("topk_router_backward", TORCH_BOX(&topk_router_backward));
}

}  // namespace mixlora
