// Argument checks of the op entries. Each message names the op, the argument, wanted and got:
//
//   CHECK_DTYPE("moe_sort", expert_TK, Int)      moe_sort: expert_TK must be int32, got int64
//   CHECK_DIMS("moe_sort", expert_TK, T, K)      moe_sort: expert_TK must be [T, K], got [3]
//   CHECK_SHAPE("foo", lora_a, E, R, I)          foo: lora_a must be [E, R, I] = [8, 16, 64],
//                                                got [8, 16, 32]
//   CHECK("foo", K >= 1, "K must be at least 1, got ", K)
//
// CHECK_DIMS fixes the number of dimensions only, and comes before the letters are read from the
// sizes; the letters of CHECK_SHAPE are variables that hold the sizes wanted.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace mixlora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string shape_text(const std::vector<int64_t>& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

inline std::vector<int64_t> shape(const Tensor& tensor) {
  return {tensor.sizes().begin(), tensor.sizes().end()};
}

// STD_TORCH_CHECK would put the source file's path before the message.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace mixlora

#define CHECK(op, condition, ...)                           \
  do {                                                      \
    if (!(condition)) mixlora::fail(op, ": ", __VA_ARGS__); \
  } while (0)

#define CHECK_DTYPE(op, tensor, dtype)                                  \
  CHECK(op,                                                             \
        (tensor).scalar_type() == torch::headeronly::ScalarType::dtype, \
        #tensor " must be ",                                            \
        mixlora::dtype_name(torch::headeronly::ScalarType::dtype),      \
        ", got ",                                                       \
        mixlora::dtype_name((tensor).scalar_type()))

#define CHECK_DIMS(op, tensor, ...)                                  \
  CHECK(op,                                                          \
        (tensor).dim() == 1 + std::ranges::count(#__VA_ARGS__, ','), \
        #tensor " must be [" #__VA_ARGS__ "], got ",                 \
        mixlora::shape_text(mixlora::shape(tensor)))

#define CHECK_SHAPE(op, tensor, ...)                                   \
  CHECK(op,                                                            \
        (mixlora::shape(tensor) == std::vector<int64_t>{__VA_ARGS__}), \
        #tensor " must be [" #__VA_ARGS__ "] = ",                      \
        mixlora::shape_text({__VA_ARGS__}),                            \
        ", got ",                                                      \
        mixlora::shape_text(mixlora::shape(tensor)))
