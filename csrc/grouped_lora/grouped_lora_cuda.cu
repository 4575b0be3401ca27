// Every row is the one slot of its own token, so that forward is
//
//   z = s shrink(x, A)     y = expand(z, B)
//
// and backward
//
//   z = s shrink(x, A)     dz = s shrink(dy, B)     dx = expand(dz, A)
//   dA = outer(dz, x)      dB = outer(z, dy)
//
// by the kernels of grouped_shrink. z and dz are fp32: of 16-bit numbers there are two for each.
#include "common/cuda.cuh"
#include "grouped_lora/grouped_lora.h"
#include "grouped_shrink/grouped_shrink.h"

namespace mixlora {
namespace {

// The products of rows x [N, I] and matrices w [G, R, I], or transposed [G, I, R].
class Products {
 public:
  Products(const GroupedLoraParams& p, CudaQueue& queue)
      : p_(p), num_parts_(num_bytes(p.dtype) == 2 ? 2 : 1), queue_(queue) {}

  // Scaled, in memory of its own.
  const void* shrink(const void* x_NI, const void* w, bool transposed, int64_t I) {
    void* z_NR = queue_.allocate(num_parts_ * p_.N * p_.R * num_bytes(p_.dtype));
    const auto p = params(x_NI, w, nullptr, z_NR, transposed, I);
    grouped_shrink_cuda(p, num_parts_, p_.scaling, queue_);
    return z_NR;
  }
  void expand(const void* z_NR, const void* w, bool transposed, int64_t I, void* x_NI) {
    grouped_expand_cuda(params(nullptr, w, z_NR, x_NI, transposed, I), num_parts_, queue_);
  }
  void outer(const void* z_NR, const void* x_NI, bool transposed, int64_t I, void* w) {
    grouped_outer_cuda(params(x_NI, nullptr, z_NR, w, transposed, I), num_parts_, queue_);
  }

 private:
  GroupedShrinkParams params(const void* x_NI,
                             const void* w,
                             const void* z_NR,
                             void* result,
                             bool transposed,
                             int64_t I) const {
    return {x_NI,
            w,
            z_NR,
            result,
            nullptr,
            p_.group_start_G1,
            nullptr,
            p_.N,
            1,
            p_.G,
            p_.R,
            I,
            transposed,
            p_.dtype};
  }

  const GroupedLoraParams& p_;
  int num_parts_;
  CudaQueue& queue_;
};

}  // namespace

void grouped_lora_cuda(const GroupedLoraParams& p, CudaQueue& queue) {
  Products products(p, queue);
  const void* z_NR = products.shrink(p.x_NI, p.lora_a_GRI, false, p.I);
  products.expand(z_NR, p.lora_b_GOR, true, p.O, p.y_NO);
}

void grouped_lora_backward_cuda(const GroupedLoraParams& p, CudaQueue& queue) {
  Products products(p, queue);
  const void* z_NR = products.shrink(p.x_NI, p.lora_a_GRI, false, p.I);
  const void* dz_NR = products.shrink(p.dy_NO, p.lora_b_GOR, true, p.O);
  products.expand(dz_NR, p.lora_a_GRI, false, p.I, p.dx_NI);
  products.outer(dz_NR, p.x_NI, false, p.I, p.dlora_a_GRI);
  products.outer(z_NR, p.dy_NO, true, p.O, p.dlora_b_GOR);
}

}  // namespace mixlora
