// Table of contents: the schema of every op, and the module that loads them and says how it was
// built. What an op computes is in mixlora/ops/<op>.py, its checks in csrc/<op>/<op>.cpp.

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "common/isa.h"

STABLE_TORCH_LIBRARY(mixlora, m) {
  // The routing plan: rows sorted by expert, tokens sorted by their tuple of experts.
  m.def(
      "moe_sort(Tensor expert_TK, int num_experts) -> (Tensor expert_start_E1, "
      "Tensor row_slot_N, Tensor slot_row_TK, Tensor token_order_T)");

  // Tokens to routed rows, and back as a sum over a token's slots.
  m.def("moe_gather(Tensor x_TD, Tensor row_slot_N, Tensor slot_row_TK) -> Tensor");
  m.def(
      "moe_scatter(Tensor y_ND, Tensor row_slot_N, Tensor slot_row_TK, Tensor? weight_TK) -> "
      "Tensor");
  m.def(
      "moe_scatter_backward(Tensor dy_TD, Tensor y_ND, Tensor row_slot_N, Tensor slot_row_TK, "
      "Tensor weight_TK) -> (Tensor dy_ND, Tensor dweight_TK)");

  // A router's choice of experts, their weights, and the sums of its losses; what has a gradient
  // comes first.
  m.def(
      "topk_router(Tensor logits_TE, int top_k, Tensor? mask_T, Tensor? expert_TK) -> "
      "(Tensor weight_TK, Tensor prob_E, Tensor z, Tensor expert_TK, Tensor count_E, "
      "Tensor entropy, Tensor num_tokens)");
  m.def(
      "topk_router_backward(Tensor dweight_TK, Tensor dprob_E, Tensor dz, Tensor logits_TE, "
      "Tensor expert_TK, Tensor? mask_T) -> Tensor");

  // Rows with a mask that is drawn from the seed again wherever it is asked for.
  m.def("dropout(Tensor x_ND, float p, Tensor seed) -> Tensor");

  // A product with few rows, as in decoding: takes as long as W takes to be read.
  m.def("few_rows_linear(Tensor x, Tensor w_OI, Tensor? bias_O) -> Tensor");
  m.def(
      "few_rows_lora(Tensor y, Tensor x, Tensor lora_a, Tensor lora_b, float scaling) -> "
      "Tensor");

  // The matrix of each slot's expert, its transpose, and that matrix's gradient; and B A of rows
  // sorted by group.
#define PLAN "bool transposed, Tensor expert_TK, Tensor expert_start_E1, Tensor row_slot_N"
  m.def("grouped_shrink(Tensor x_TI, Tensor w, " PLAN ") -> Tensor");
  m.def("grouped_expand(Tensor a_TKR, Tensor w, " PLAN ") -> Tensor");
  m.def("grouped_outer(Tensor a_TKR, Tensor x_TI, " PLAN ") -> Tensor");
  m.def(
      "grouped_lora(Tensor x_NI, Tensor lora_a_GRI, Tensor lora_b_GOR, Tensor group_start_G1, "
      "float scaling) -> Tensor");
  m.def(
      "grouped_lora_backward(Tensor dy_NO, Tensor x_NI, Tensor lora_a_GRI, Tensor lora_b_GOR, "
      "Tensor group_start_G1, float scaling) -> "
      "(Tensor dx_NI, Tensor dlora_a_GRI, Tensor dlora_b_GOR)");

  // The mixture between the frozen projections: every token's experts, summed before W2.
#define SHARED_GLU                                                                           \
  "Tensor gate_TF, Tensor up_TF, Tensor? a_gate_TKR, Tensor? a_up_TKR, Tensor? b_gate_EFR, " \
  "Tensor? b_up_EFR, Tensor? a_down_ERF, Tensor expert_TK, Tensor token_order_T, "           \
  "Tensor weight_TK, Tensor? scale_gate_EF, Tensor? scale_up_EF, Tensor? bias_gate_F, "      \
  "Tensor? bias_up_F, int num_experts, float scaling, int act, float dropout, Tensor? seed"
  m.def("shared_glu(" SHARED_GLU ") -> (Tensor hbar_TF, Tensor z_TKR)");
  m.def("shared_glu_backward(Tensor dhbar_TF, Tensor? dz_TKR, " SHARED_GLU ") -> Tensor[]");
}

namespace py = pybind11;

py::dict build_info() {
  py::list isas;
  for (const char* name : mixlora::kIsaNames) isas.append(name);
  py::dict info;
  info["compiler"] = MIXLORA_COMPILER;
  info["torch"] = MIXLORA_TORCH;
  info["instruction_sets"] = isas;
  info["instruction_set"] = mixlora::kIsaNames[mixlora::chosen_isa()];
  info["cuda_architectures"] = py::str(MIXLORA_CUDA_ARCHS).attr("split")();
  return info;
}

PYBIND11_MODULE(_C, m) {
  m.def("build_info",
        &build_info,
        "How this module was built: compiler, torch, instruction sets built and chosen, "
        "CUDA architectures (empty for a CPU build).");
}
