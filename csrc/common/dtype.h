// The floating-point types of the kernels, named without a torch header.
#pragma once

#include <cstdint>

namespace mixlora {

enum class Dtype { kFloat64, kFloat32, kBfloat16, kFloat16 };

inline int64_t num_bytes(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

}  // namespace mixlora
