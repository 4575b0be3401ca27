// The maths are in mixlora/ops/topk_router.py.
#pragma once

#include <cstdint>

#include "common/cuda.h"
#include "common/dtype.h"
#include "common/isa.h"

namespace mixlora {

// `void` outputs are fp64 where the logits are, else fp32.
struct TopkRouterParams {
  const void* logits_TE;
  const bool* mask_T;       // null: every token is real
  const int32_t* given_TK;  // null: the kernel chooses
  int32_t* expert_TK;
  void* weight_TK;
  void* count_E;
  void* prob_E;
  void* entropy;
  void* z;
  void* num_tokens;
  int64_t T, E, K;
  Dtype dtype;
};

struct TopkRouterBackwardParams {
  const void* dweight_TK;
  const void* dprob_E;
  const void* dz;
  const void* logits_TE;
  const int32_t* expert_TK;
  const bool* mask_T;
  void* dlogits_TE;  // as the logits
  int64_t T, E, K;
  Dtype dtype;
};

DECLARE_CPU_KERNEL(void, topk_router_cpu, const TopkRouterParams& p)
DECLARE_CUDA_KERNEL(topk_router_cuda, const TopkRouterParams& p)
DECLARE_CPU_KERNEL(void, topk_router_backward_cpu, const TopkRouterBackwardParams& p)
DECLARE_CUDA_KERNEL(topk_router_backward_cuda, const TopkRouterBackwardParams& p)

}  // namespace mixlora
