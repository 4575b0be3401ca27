// Where an op runs. Its entry, the same for all devices, says:
//
//   CHECK_DEVICE("foo", x_TD, row_slot_N);   all on one device, and the build has kernels for it
//   RUN_KERNEL("foo", foo, x_TD, params);    foo_cpu(params), or foo_cuda(params, queue)
//   REGISTER_KERNELS(m) { m.impl("foo", TORCH_BOX(&foo)); }
//
// A build has MIXLORA_CUDA where setup.py compiled the .cu files. In the tests' build, which has
// MIXLORA_CUDA_ON_CPU instead, entries give tensors of the CPU to the CUDA kernels, which a runtime
// of the tests executes there (tests/cuda_on_cpu.py).
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "common/check.h"
#include "common/cuda.h"

namespace mixlora {

using Optional = std::optional<Tensor>;

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(tensor.get_device_index());
}

inline void check_same_device(const char* op, const Tensor& first, const Optional& other) {
  if (!other || other->device() == first.device()) return;
  fail(op, ": all tensors must be on ", device_name(first), ", got one on ", device_name(*other));
}

template <class... Tensors>
void check_device(const char* op, const Tensor& first, const Tensors&... others) {
  (check_same_device(op, first, others), ...);
#if !defined(MIXLORA_CUDA)
  if (first.is_cuda()) {
    fail(op,
         ": this build of mixlora has no CUDA kernels, got a tensor on ",
         device_name(first),
         ": run `make kernels` where torch is a CUDA build and nvcc is found");
  }
#endif
}

#if defined(MIXLORA_CUDA)
// Not in torch's CPU build, which must load this too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}
#endif

#if defined(MIXLORA_CUDA) || defined(MIXLORA_CUDA_ON_CPU)
// What a kernel allocates goes back to torch at once: it is for what is launched later on the same
// stream.
template <class Launch>
void run_cuda(const char* op, const Tensor& tensor, const Launch& launch) {
  std::vector<Tensor> allocated;
  CudaQueue queue{};
#if defined(MIXLORA_CUDA)
  const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
  queue.stream = current_stream(tensor);
#endif
  queue.allocate = [&](int64_t bytes) {
    allocated.push_back(torch::stable::new_empty(tensor, {bytes}, ScalarType::Byte));
    return allocated.back().mutable_data_ptr();
  };
  launch(queue);
  if (!queue.error.empty()) fail(op, ": ", queue.error);
}
#endif

}  // namespace mixlora

#define CHECK_DEVICE(op, ...) mixlora::check_device(op, __VA_ARGS__)

#define RUN_CUDA_KERNEL(op, name, tensor, params) \
  mixlora::run_cuda(op, tensor, [&](mixlora::CudaQueue& queue) { name##_cuda(params, queue); })

#if defined(MIXLORA_CUDA_ON_CPU)
#define RUN_KERNEL(op, name, tensor, params) RUN_CUDA_KERNEL(op, name, tensor, params)
#elif defined(MIXLORA_CUDA)
#define RUN_KERNEL(op, name, tensor, params)     \
  do {                                           \
    if ((tensor).is_cuda()) {                    \
      RUN_CUDA_KERNEL(op, name, tensor, params); \
    } else {                                     \
      CPU_KERNEL(name##_cpu)(params);            \
    }                                            \
  } while (0)
#else
#define RUN_KERNEL(op, name, tensor, params) CPU_KERNEL(name##_cpu)(params)
#endif

#if defined(MIXLORA_CUDA_ON_CPU)
#define REGISTER_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(mixlora, PrivateUse1, m)
#else
#define REGISTER_KERNELS(m)                                                        \
  static void register_kernels(torch::stable::detail::StableLibrary&);             \
  STABLE_TORCH_LIBRARY_IMPL(mixlora, CPU, library) { register_kernels(library); }  \
  STABLE_TORCH_LIBRARY_IMPL(mixlora, CUDA, library) { register_kernels(library); } \
  static void register_kernels(torch::stable::detail::StableLibrary& m)
#endif
