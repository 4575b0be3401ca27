// The gated feed-forward's activations on vectors, and their derivatives.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>

#include "common/activations.h"
#include "common/vec.h"

namespace mixlora::MIXLORA_ISA {

// 1 / (1 + e^-x) for what becomes a T: an error of 1e-4 is lost in the rounding to bf16.
template <class T>
INLINE Vec<Wide<T>> sigmoid(Vec<Wide<T>> x) {
  [[maybe_unused]] constexpr bool kCoarse = std::is_same_v<T, Bf16>;
#if defined(__AVX512F__)
  if constexpr (!std::is_same_v<T, double>) {
    // e^-x = 2^y = 2^whole 2^rest: no bounds are needed, since `rest` is 0 where y is infinite. All
    // are masked, because gcc 12 warns of its own header for those that are not.
    const __m512 y = (__m512)(x * -1.44269504f);
    const __m512 whole = _mm512_maskz_roundscale_ps(0xffff, y, 8);
    const Vec<float> rest = (Vec<float>)_mm512_maskz_reduce_ps(0xffff, y, 8), square = rest * rest;
    Vec<float> power;  // the least relative error of its degree on [-1/2, 1/2]: 8e-8, or 8e-5
    if constexpr (kCoarse) {
      const Vec<float> high = rest * 5.5171669e-2f + 2.4261114e-1f;
      power = high * square + (rest * 6.9326097e-1f + 9.9992806e-1f);
    } else {
      const Vec<float> high = rest * 1.3276472e-3f + 9.6755419e-3f;
      const Vec<float> middle = rest * 5.5507131e-2f + 2.4022120e-1f;
      power = (high * square + middle) * square + (rest * 6.9314694e-1f + 1.f);
    }
    power = (Vec<float>)_mm512_maskz_scalef_ps(0xffff, (__m512)power, whole);
    // the largest number whose estimate below is none of 0; a NaN stays one
    const __m512 most = (__m512)splat(1.7e38f), sum = (__m512)(power + 1.f);
    const Vec<float> bounded = (Vec<float>)_mm512_maskz_min_ps(0xffff, most, sum);
    const Vec<float> estimate = (Vec<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)bounded);
    return kCoarse ? estimate : estimate + estimate * (1.f - bounded * estimate);
  }
#endif
  return 1 / (exp(-x) + 1);
}

// value = act(x), slope = act'(x)
template <Activation kAct, class T, class V>
INLINE void activate(V x, V& value, V& slope) {
  using S = Wide<T>;
  const V one = splat(S{1});
  if constexpr (kAct == Activation::kSilu) {
    const V y = sigmoid<T>(x);
    value = x * y;
    slope = y + value * (one - y);
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
