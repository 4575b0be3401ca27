// The gated feed-forward's activations on vectors, and their derivatives.
#pragma once

#include <cmath>

#include "common/activations.h"
#include "common/vec.h"

namespace mixlora::MIXLORA_ISA {

// value = act(x), slope = act'(x)
template <Activation kAct, class V>
INLINE void activate(V x, V& value, V& slope) {
  using S = std::remove_cvref_t<decltype(x[0])>;
  const V one = splat(S{1});
  if constexpr (kAct == Activation::kSilu) {
    const V power = exp(x), sigmoid = power / (one + power);
    value = x * sigmoid;
    slope = sigmoid + value * (one - sigmoid);
  } else if constexpr (kAct == Activation::kGelu) {
    const V half = splat(S(0.5)), root_half = splat(S(0.70710678118654752));
    const V cdf = half * (one + each_lane(x * root_half, [](S y) { return std::erf(y); }));
    value = x * cdf;
    slope = cdf + x * S(0.39894228040143268) * exp(x * x * -half);
  } else if constexpr (kAct == Activation::kGeluTanh) {
    const V root = splat(S(0.79788456080286536)), cubic = splat(S(0.044715));
    const V inner = root * (x + cubic * x * x * x);
    const V tanh = one - (one + one) / (exp(inner + inner) + one);
    const V half = splat(S(0.5));
    value = half * x * (one + tanh);
    const V inner_slope = root * (one + splat(S(3)) * cubic * x * x);
    slope = half * (one + tanh) + half * x * (one - tanh * tanh) * inner_slope;
  } else {
    const V zero = splat(S{0});
    value = x > zero ? x : zero;
    slope = x > zero ? one : zero;
  }
}

}  // namespace mixlora::MIXLORA_ISA
