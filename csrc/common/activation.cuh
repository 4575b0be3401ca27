// The gated feed-forward's activations on a GPU, and their derivatives.
#pragma once

#include "common/activations.h"
#include "common/cuda.cuh"

namespace mixlora {

// value = act(x), slope = act'(x)
template <Activation kAct, class S>
__device__ void activate(S x, S& value, S& slope) {
  if constexpr (kAct == Activation::kSilu) {
    const S sigmoid = 1 / (1 + exp(-x));
    value = x * sigmoid;
    slope = sigmoid + value * (1 - sigmoid);
  } else if constexpr (kAct == Activation::kGelu) {
    const S cdf = S(0.5) * (1 + erf(x * S(0.70710678118654752)));
    value = x * cdf;
    slope = cdf + x * S(0.39894228040143268) * exp(x * x * S(-0.5));
  } else if constexpr (kAct == Activation::kGeluTanh) {
    const S root = S(0.79788456080286536), cubic = S(0.044715);
    const S y = tanh(root * (x + cubic * x * x * x));
    value = S(0.5) * x * (1 + y);
    slope = S(0.5) * (1 + y) + S(0.5) * x * (1 - y * y) * root * (1 + 3 * cubic * x * x);
  } else {
    value = x > 0 ? x : 0;
    slope = x > 0 ? 1 : 0;
  }
}

}  // namespace mixlora
