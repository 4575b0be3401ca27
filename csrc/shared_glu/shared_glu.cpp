#include "shared_glu/shared_glu.h"

#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/device.h"

namespace mixlora {
namespace {

constexpr const char* kOp = "shared_glu";
constexpr int64_t kActivations = 4;

Dtype glu_dtype(const Tensor& gate_TF) {
  switch (gate_TF.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBfloat16;
    default:
      fail(kOp,
           ": gate_TF must be float32, float64 or bfloat16, got ",
           dtype_name(gate_TF.scalar_type()));
  }
}

// The inputs of the forward, checked and contiguous; null pointers where there is none.
struct Inputs {
  std::vector<Tensor> kept;
  SharedGluParams params{};

  Inputs(const Tensor& gate_TF,
         const Tensor& up_TF,
         const Optional& a_gate_TKR,
         const Optional& a_up_TKR,
         const Optional& b_gate_EFR,
         const Optional& b_up_EFR,
         const Optional& a_down_ERF,
         const Tensor& expert_TK,
         const Tensor& token_order_T,
         const Tensor& weight_TK,
         const Optional& scale_gate_EF,
         const Optional& scale_up_EF,
         const Optional& bias_gate_F,
         const Optional& bias_up_F,
         int64_t experts,
         double scaling,
         int64_t act,
         double dropout,
         const Optional& seed) {
    CHECK_DEVICE(kOp,
                 gate_TF,
                 up_TF,
                 a_gate_TKR,
                 a_up_TKR,
                 b_gate_EFR,
                 b_up_EFR,
                 a_down_ERF,
                 expert_TK,
                 token_order_T,
                 weight_TK,
                 scale_gate_EF,
                 scale_up_EF,
                 bias_gate_F,
                 bias_up_F,
                 seed);
    CHECK_DIMS(kOp, gate_TF, T, F);
    CHECK_DIMS(kOp, expert_TK, T, K);
    const int64_t T = gate_TF.size(0), F = gate_TF.size(1), K = expert_TK.size(1), E = experts;
    int64_t R = 0;
    for (const Optional* x : {&a_gate_TKR, &a_up_TKR}) {
      if (x->has_value()) R = (*x)->size((*x)->dim() - 1);
    }
    if (a_down_ERF.has_value()) {
      CHECK_DIMS(kOp, (*a_down_ERF), E, R, F);
      R = a_down_ERF->size(1);
    }
    params = {.dtype = glu_dtype(gate_TF),
              .act = static_cast<int>(act),
              .tokens = T,
              .slots = K,
              .experts = E,
              .rank = R,
              .ffn = F,
              .scaling = scaling,
              .dropout = dropout};
    CHECK(kOp, 0 <= act && act < kActivations, "act must be in [0, 4), got ", act);
    CHECK(kOp,
          up_TF.scalar_type() == gate_TF.scalar_type(),
          "up_TF must have gate_TF's dtype ",
          dtype_name(gate_TF.scalar_type()),
          ", got ",
          dtype_name(up_TF.scalar_type()));
    CHECK(kOp,
          a_gate_TKR.has_value() == b_gate_EFR.has_value() &&
              a_up_TKR.has_value() == b_up_EFR.has_value(),
          "a and b of a projection must both be given, or neither");
    CHECK(kOp,
          a_gate_TKR.has_value() || !scale_gate_EF.has_value(),
          "scale_gate_EF needs a_gate_TKR");
    CHECK(kOp, a_up_TKR.has_value() || !scale_up_EF.has_value(), "scale_up_EF needs a_up_TKR");
    CHECK(kOp, dropout == 0 || seed.has_value(), "dropout needs a seed");
    CHECK_DTYPE(kOp, expert_TK, Int);
    CHECK_DTYPE(kOp, token_order_T, Int);
    CHECK_SHAPE(kOp, up_TF, T, F);
    CHECK_SHAPE(kOp, expert_TK, T, K);
    CHECK_SHAPE(kOp, token_order_T, T);
    CHECK_SHAPE(kOp, weight_TK, T, K);
    if (seed.has_value()) {
      CHECK_DTYPE(kOp, (*seed), Long);
      params.seed = dense(*seed).const_data_ptr<int64_t>();
    }
    params.gate_TF = dense(gate_TF).const_data_ptr();
    params.up_TF = dense(up_TF).const_data_ptr();
    params.expert_TK = indices("expert_TK", expert_TK, -1, E);
    params.token_order_T = indices("token_order_T", token_order_T, 0, T);
    params.weight_TK = wide("weight_TK", weight_TK, {T, K});
    params.a_gate_TKR = wide("a_gate_TKR", a_gate_TKR, {T, K, R});
    params.a_up_TKR = wide("a_up_TKR", a_up_TKR, {T, K, R});
    params.b_gate_EFR = wide("b_gate_EFR", b_gate_EFR, {E, F, R});
    params.b_up_EFR = wide("b_up_EFR", b_up_EFR, {E, F, R});
    params.a_down_ERF = wide("a_down_ERF", a_down_ERF, {E, R, F});
    params.scale_gate_EF = wide("scale_gate_EF", scale_gate_EF, {E, F});
    params.scale_up_EF = wide("scale_up_EF", scale_up_EF, {E, F});
    params.bias_gate_F = wide("bias_gate_F", bias_gate_F, {F});
    params.bias_up_F = wide("bias_up_F", bias_up_F, {F});
  }

  const Tensor& dense(const Tensor& tensor) {
    kept.push_back(torch::stable::contiguous(tensor));
    return kept.back();
  }

  const int32_t* indices(const char* name, const Tensor& tensor, int64_t low, int64_t end) {
    check_indices(kOp, name, dense(tensor), low, end);
    return kept.back().const_data_ptr<int32_t>();
  }

  ScalarType wide_dtype() const {
    return params.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
  }

  const void* wide(const char* name, const Optional& tensor, std::vector<int64_t> sizes) {
    if (!tensor.has_value()) return nullptr;
    CHECK(kOp,
          shape(*tensor) == sizes,
          name,
          " must be ",
          shape_text(sizes),
          ", got ",
          shape_text(shape(*tensor)));
    CHECK(kOp,
          tensor->scalar_type() == wide_dtype(),
          name,
          " must be ",
          dtype_name(wide_dtype()),
          " beside this gate_TF, got ",
          dtype_name(tensor->scalar_type()));
    return dense(*tensor).const_data_ptr();
  }
};

#define FORWARD_ARGUMENTS                                                                   \
  const Tensor &gate_TF, const Tensor &up_TF, Optional a_gate_TKR, Optional a_up_TKR,       \
      Optional b_gate_EFR, Optional b_up_EFR, Optional a_down_ERF, const Tensor &expert_TK, \
      const Tensor &token_order_T, const Tensor &weight_TK, Optional scale_gate_EF,         \
      Optional scale_up_EF, Optional bias_gate_F, Optional bias_up_F, int64_t experts,      \
      double scaling, int64_t act, double dropout, Optional seed
#define FORWARD_VALUES                                                                       \
  gate_TF, up_TF, a_gate_TKR, a_up_TKR, b_gate_EFR, b_up_EFR, a_down_ERF, expert_TK,         \
      token_order_T, weight_TK, scale_gate_EF, scale_up_EF, bias_gate_F, bias_up_F, experts, \
      scaling, act, dropout, seed

std::tuple<Tensor, Tensor> shared_glu(FORWARD_ARGUMENTS) {
  Inputs inputs(FORWARD_VALUES);
  SharedGluParams& p = inputs.params;
  Tensor hbar_TF = torch::stable::new_empty(gate_TF, {p.tokens, p.ffn});
  const int64_t rank = a_down_ERF.has_value() ? p.rank : 0;
  Tensor z_TKR = torch::stable::new_empty(gate_TF, {p.tokens, p.slots, rank}, inputs.wide_dtype());
  p.hbar_TF = hbar_TF.mutable_data_ptr();
  p.z_TKR = z_TKR.mutable_data_ptr();
  RUN_KERNEL(kOp, shared_glu, gate_TF, p);
  return {hbar_TF, z_TKR};
}

// Gradients of what is not there have no elements.
std::vector<Tensor> shared_glu_backward(const Tensor& dhbar_TF,
                                        Optional dz_TKR,
                                        FORWARD_ARGUMENTS) {
  Inputs inputs(FORWARD_VALUES);
  SharedGluParams& p = inputs.params;
  CHECK_DEVICE(kOp, gate_TF, dhbar_TF, dz_TKR);
  CHECK_SHAPE(kOp, dhbar_TF, p.tokens, p.ffn);
  CHECK(kOp, dhbar_TF.scalar_type() == gate_TF.scalar_type(), "dhbar_TF must have gate_TF's dtype");
  CHECK(kOp, dz_TKR.has_value() == a_down_ERF.has_value(), "dz_TKR is given with a_down_ERF");
  p.dhbar_TF = inputs.dense(dhbar_TF).const_data_ptr();
  p.dz_TKR = inputs.wide("dz_TKR", dz_TKR, {p.tokens, p.slots, p.rank});

  std::vector<Tensor> gradients;
  const auto gradient = [&](const Optional& of, std::vector<int64_t> sizes, ScalarType dtype) {
    if (!of.has_value()) sizes = {0};
    gradients.push_back(torch::stable::new_empty(gate_TF, sizes, dtype));
    return of.has_value() ? gradients.back().mutable_data_ptr() : nullptr;
  };
  const int64_t T = p.tokens, K = p.slots, E = p.experts, R = p.rank, F = p.ffn;
  const ScalarType dtype = gate_TF.scalar_type(), wide = inputs.wide_dtype();
  p.dgate_TF = gradient(gate_TF, {T, F}, dtype);
  p.dup_TF = gradient(up_TF, {T, F}, dtype);
  p.da_gate_TKR = gradient(a_gate_TKR, {T, K, R}, wide);
  p.da_up_TKR = gradient(a_up_TKR, {T, K, R}, wide);
  p.db_gate_EFR = gradient(b_gate_EFR, {E, F, R}, wide);
  p.db_up_EFR = gradient(b_up_EFR, {E, F, R}, wide);
  p.da_down_ERF = gradient(a_down_ERF, {E, R, F}, wide);
  p.dweight_TK = gradient(weight_TK, {T, K}, wide);
  p.dscale_gate_EF = gradient(scale_gate_EF, {E, F}, wide);
  p.dscale_up_EF = gradient(scale_up_EF, {E, F}, wide);
  RUN_KERNEL(kOp, shared_glu_backward, gate_TF, p);
  return gradients;
}

}  // namespace

REGISTER_KERNELS(m) {
  m.impl("shared_glu", TORCH_BOX(&shared_glu));
  m.impl("shared_glu_backward", TORCH_BOX(&shared_glu_backward));
}

}  // namespace mixlora
