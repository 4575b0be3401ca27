#include "grouped_lora/grouped_lora.h"

#include <tuple>

#include "common/check.h"
#include "common/device.h"

namespace mixlora {
namespace {

struct Inputs {
  Tensor x_NI, lora_a_GRI, lora_b_GOR, group_start_G1;  // contiguous
  GroupedLoraParams params;
};

Inputs check_inputs(const char* op,
                    const Tensor& x_NI,
                    const Tensor& lora_a_GRI,
                    const Tensor& lora_b_GOR,
                    const Tensor& group_start_G1,
                    double scaling) {
  CHECK_DEVICE(op, x_NI, lora_a_GRI, lora_b_GOR, group_start_G1);
  const Dtype dtype = FLOAT_DTYPE(op, x_NI);
  check_dtype(op, "lora_a_GRI", lora_a_GRI, x_NI.scalar_type());
  check_dtype(op, "lora_b_GOR", lora_b_GOR, x_NI.scalar_type());
  CHECK_DTYPE(op, group_start_G1, Int);
  CHECK_DIMS(op, x_NI, N, I);
  CHECK_DIMS(op, lora_a_GRI, G, R, I);
  CHECK_DIMS(op, lora_b_GOR, G, O, R);
  const int64_t N = x_NI.size(0), I = x_NI.size(1), G = lora_a_GRI.size(0), R = lora_a_GRI.size(1),
                O = lora_b_GOR.size(1), G1 = G + 1;
  CHECK_SHAPE(op, lora_a_GRI, G, R, I);
  CHECK_SHAPE(op, lora_b_GOR, G, O, R);
  CHECK_SHAPE(op, group_start_G1, G1);
  Inputs in{torch::stable::contiguous(x_NI),
            torch::stable::contiguous(lora_a_GRI),
            torch::stable::contiguous(lora_b_GOR),
            torch::stable::contiguous(group_start_G1),
            {.N = N, .G = G, .R = R, .I = I, .O = O, .scaling = scaling, .dtype = dtype}};
  check_starts(op, "group_start_G1", in.group_start_G1, N);
  in.params.x_NI = in.x_NI.const_data_ptr();
  in.params.lora_a_GRI = in.lora_a_GRI.const_data_ptr();
  in.params.lora_b_GOR = in.lora_b_GOR.const_data_ptr();
  in.params.group_start_G1 = in.group_start_G1.const_data_ptr<int32_t>();
  return in;
}

Tensor grouped_lora(const Tensor& x_NI,
                    const Tensor& lora_a_GRI,
                    const Tensor& lora_b_GOR,
                    const Tensor& group_start_G1,
                    double scaling) {
  const char* op = "grouped_lora";
  Inputs in = check_inputs(op, x_NI, lora_a_GRI, lora_b_GOR, group_start_G1, scaling);
  Tensor y_NO = torch::stable::new_empty(in.x_NI, {in.params.N, in.params.O});
  in.params.y_NO = y_NO.mutable_data_ptr();
  RUN_KERNEL(op, grouped_lora, in.x_NI, in.params);
  return y_NO;
}

std::tuple<Tensor, Tensor, Tensor> grouped_lora_backward(const Tensor& dy_NO,
                                                         const Tensor& x_NI,
                                                         const Tensor& lora_a_GRI,
                                                         const Tensor& lora_b_GOR,
                                                         const Tensor& group_start_G1,
                                                         double scaling) {
  const char* op = "grouped_lora_backward";
  Inputs in = check_inputs(op, x_NI, lora_a_GRI, lora_b_GOR, group_start_G1, scaling);
  const int64_t N = in.params.N, O = in.params.O;
  CHECK_DEVICE(op, x_NI, dy_NO);
  check_dtype(op, "dy_NO", dy_NO, x_NI.scalar_type());
  CHECK_SHAPE(op, dy_NO, N, O);
  const Tensor dy = torch::stable::contiguous(dy_NO);
  Tensor dx_NI = torch::stable::new_empty(in.x_NI, in.x_NI.sizes());
  Tensor dlora_a_GRI = torch::stable::new_empty(in.lora_a_GRI, in.lora_a_GRI.sizes());
  Tensor dlora_b_GOR = torch::stable::new_empty(in.lora_b_GOR, in.lora_b_GOR.sizes());
  in.params.dy_NO = dy.const_data_ptr();
  in.params.dx_NI = dx_NI.mutable_data_ptr();
  in.params.dlora_a_GRI = dlora_a_GRI.mutable_data_ptr();
  in.params.dlora_b_GOR = dlora_b_GOR.mutable_data_ptr();
  RUN_KERNEL(op, grouped_lora_backward, in.x_NI, in.params);
  return {dx_NI, dlora_a_GRI, dlora_b_GOR};
}

}  // namespace

REGISTER_KERNELS(m) {
  m.impl("grouped_lora", TORCH_BOX(&grouped_lora));
  m.impl("grouped_lora_backward", TORCH_BOX(&grouped_lora_backward));
}

}  // namespace mixlora
