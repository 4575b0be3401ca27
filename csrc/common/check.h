// Argument checks of the op entries. Each message names the op, the argument, wanted and got:
//
//   CHECK_DTYPE("moe_sort", expert_TK, Int)      moe_sort: expert_TK must be int32, got int64
//   CHECK_DIMS("moe_sort", expert_TK, T, K)      moe_sort: expert_TK must be [T, K], got [3]
//   CHECK_SHAPE("foo", lora_a, E, R, I)          foo: lora_a must be [E, R, I] = [8, 16, 64],
//                                                got [8, 16, 32]
//   CHECK("foo", K >= 1, "K must be at least 1, got ", K)
//   FLOAT_DTYPE("foo", x_TD)                     foo: x_TD must be float64, float32, bfloat16 or
//                                                float16, got int64; returns which
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

#include "common/dtype.h"

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

// Of x [..., I].
inline int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

// STD_TORCH_CHECK would put the source file's path before the message.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType wanted) {
  const ScalarType got = tensor.scalar_type();
  if (got == wanted) return;
  fail(op, ": ", name, " must be ", dtype_name(wanted), ", got ", dtype_name(got));
}

inline Dtype float_dtype(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBfloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      fail(op,
           ": ",
           name,
           " must be float64, float32, bfloat16 or float16, got ",
           dtype_name(tensor.scalar_type()));
  }
}

// What a kernel computes in: fp64 for fp64, fp32 for all others.
inline ScalarType wide_dtype(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// `indices` is int32 and contiguous. On a GPU reading them here would wait for all that runs there:
// the kernels check each index that they use (CHECK_INDEX).
inline void check_indices(
    const char* op, const char* name, const Tensor& indices, int64_t low, int64_t end) {
  if (!indices.is_cpu()) return;
  const int32_t* first = indices.const_data_ptr<int32_t>();
  const int32_t* last = first + indices.numel();
  const auto outside = [&](int32_t index) { return index < low || index >= end; };
  const int32_t* bad = std::find_if(first, last, outside);
  if (bad == last) return;
  fail(op, ": ", name, " must be in [", low, ", ", end, "), got ", *bad, " at ", bad - first);
}

// `starts` is int32 and contiguous: where each group's rows start, and behind the last where they
// end. Checked on the CPU only, as indices are.
inline void check_starts(const char* op, const char* name, const Tensor& starts, int64_t rows) {
  if (!starts.is_cpu()) return;
  const int32_t* first = starts.const_data_ptr<int32_t>();
  const int32_t* last = first + starts.numel();
  const bool ascends = first != last && *first == 0 && std::is_sorted(first, last);
  if (ascends && last[-1] <= rows) return;
  fail(op, ": ", name, " must ascend from 0 to at most ", rows, " rows");
}

}  // namespace mixlora

#define CHECK(op, condition, ...)                           \
  do {                                                      \
    if (!(condition)) mixlora::fail(op, ": ", __VA_ARGS__); \
  } while (0)

#define CHECK_DTYPE(op, tensor, dtype) \
  mixlora::check_dtype(op, #tensor, tensor, torch::headeronly::ScalarType::dtype)

#define FLOAT_DTYPE(op, tensor) mixlora::float_dtype(op, #tensor, tensor)

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
