#include "dropout/dropout.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/check.h"

namespace mixlora {
namespace {

Tensor dropout(const Tensor& x_ND, double p, const Tensor& seed) {
  const Dtype dtype = FLOAT_DTYPE("dropout", x_ND);
  CHECK_DIMS("dropout", x_ND, N, D);
  CHECK("dropout", 0 <= p && p < 1, "p must be in [0, 1), got ", p);
  CHECK_DTYPE("dropout", seed, Long);
  CHECK("dropout", seed.dim() == 0, "seed must be one number, got ", shape_text(shape(seed)));

  const Tensor x = torch::stable::contiguous(x_ND);
  Tensor y_ND = torch::stable::new_empty(x, x.sizes());
  CPU_KERNEL(dropout_cpu)
  ({.x_ND = x.const_data_ptr(),
    .y_ND = y_ND.mutable_data_ptr(),
    .N = x.size(0),
    .D = x.size(1),
    .seed = *seed.const_data_ptr<int64_t>(),
    .p = p,
    .dtype = dtype});
  return y_ND;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixlora, CPU, m) { m.impl("dropout", TORCH_BOX(&dropout)); }

}  // namespace mixlora
