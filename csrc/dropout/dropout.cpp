#include "dropout/dropout.h"

#include "common/check.h"
#include "common/device.h"

namespace mixlora {
namespace {

Tensor dropout(const Tensor& x_ND, double p, const Tensor& seed) {
  CHECK_DEVICE("dropout", x_ND, seed);
  const Dtype dtype = FLOAT_DTYPE("dropout", x_ND);
  CHECK_DIMS("dropout", x_ND, N, D);
  CHECK("dropout", 0 <= p && p < 1, "p must be in [0, 1), got ", p);
  CHECK_DTYPE("dropout", seed, Long);
  CHECK("dropout", seed.dim() == 0, "seed must be one number, got ", shape_text(shape(seed)));

  const Tensor x = torch::stable::contiguous(x_ND);
  Tensor y_ND = torch::stable::new_empty(x, x.sizes());
  const DropoutParams params{.x_ND = x.const_data_ptr(),
                             .y_ND = y_ND.mutable_data_ptr(),
                             .seed = seed.const_data_ptr<int64_t>(),
                             .N = x.size(0),
                             .D = x.size(1),
                             .p = p,
                             .dtype = dtype};
  RUN_KERNEL("dropout", dropout, x, params);
  return y_ND;
}

}  // namespace

REGISTER_KERNELS(m) { m.impl("dropout", TORCH_BOX(&dropout)); }

}  // namespace mixlora
