// The maths are in mixlora/ops/shared_glu.py.
#pragma once

#include <cstdint>

#include "common/cuda.h"
#include "common/dtype.h"
#include "common/isa.h"

namespace mixlora {

// A pointer that may be null belongs to an adapter, scale or bias that is not there. T is the type
// that `dtype` names, W is Wide<T>.
struct SharedGluParams {
  Dtype dtype;  // of gate, up, hbar, never fp16; all else is wide
  int act;      // an Activation
  int64_t tokens, slots, experts, rank, ffn;
  const void *gate_TF, *up_TF;        // T
  const void *a_gate_TKR, *a_up_TKR;  // W, as all below
  const void *b_gate_EFR, *b_up_EFR;
  const void* a_down_ERF;
  const void* weight_TK;
  const void *scale_gate_EF, *scale_up_EF;
  const void *bias_gate_F, *bias_up_F;  // read only beside a scale
  const int32_t *expert_TK, *token_order_T;
  double scaling, dropout;
  const int64_t* seed;  // null without dropout
  // forward
  void *hbar_TF, *z_TKR;  // T, W
  // backward
  const void *dhbar_TF, *dz_TKR;               // T, W
  void *dgate_TF, *dup_TF;                     // T
  void *da_gate_TKR, *da_up_TKR, *dweight_TK;  // W, as all below
  void *db_gate_EFR, *db_up_EFR, *da_down_ERF;
  void *dscale_gate_EF, *dscale_up_EF;
};

DECLARE_CPU_KERNEL(void, shared_glu_cpu, const SharedGluParams& p)
DECLARE_CPU_KERNEL(void, shared_glu_backward_cpu, const SharedGluParams& p)
DECLARE_CUDA_KERNEL(shared_glu_cuda, const SharedGluParams& p)
DECLARE_CUDA_KERNEL(shared_glu_backward_cuda, const SharedGluParams& p)

}  // namespace mixlora
