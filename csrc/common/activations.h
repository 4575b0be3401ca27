// In the order of mixlora/ops/shared_glu.py.
#pragma once

#include <type_traits>

#if defined(__CUDACC__)
#define ON_DEVICE __device__
#else
#define ON_DEVICE
#endif

namespace mixlora {

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu };

// Calls body(constant) with the Activation that `act` names: one branch for all that the body does.
template <class Body>
ON_DEVICE void with_activation(int act, const Body& body) {
  switch (static_cast<Activation>(act)) {
    case Activation::kSilu:
      return body(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kGelu:
      return body(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return body(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kRelu:
      return body(std::integral_constant<Activation, Activation::kRelu>{});
  }
}

}  // namespace mixlora
