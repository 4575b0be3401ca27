// The floating-point types of the kernels, without a torch header: numbers are stored as double,
// float, Bf16 or Fp16 and computed as double or float (Wide<T>).
#pragma once

#include <cstdint>
#include <type_traits>

namespace mixlora {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

enum class Dtype { kFloat64, kFloat32, kBfloat16, kFloat16 };

inline int64_t num_bytes(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// Calls body(zero) for the type that dtype names.
template <class Body>
void with_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat64:
      return body(double{});
    case Dtype::kFloat32:
      return body(float{});
    case Dtype::kBfloat16:
      return body(Bf16{});
    case Dtype::kFloat16:
      return body(Fp16{});
  }
}

}  // namespace mixlora
