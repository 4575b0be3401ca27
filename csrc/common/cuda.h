// What a CUDA launcher is given, named without a header of CUDA or torch:
//
//   <op>.h        DECLARE_CUDA_KERNEL(foo_cuda, const FooParams& p)
//   <op>_cuda.cu  void foo_cuda(const FooParams& p, CudaQueue& queue) { ... launch<kernel>(...); }
//   <op>.cpp      RUN_KERNEL("foo", foo, x_TD, params);                          common/device.h
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace mixlora {

struct CudaQueue {
  void* stream;
  std::function<void*(int64_t)> allocate;  // so many bytes, until what is launched has run
  std::string error;                       // of a launch; nothing is launched after it
};

}  // namespace mixlora

#define DECLARE_CUDA_KERNEL(name, ...) void name(__VA_ARGS__, CudaQueue& queue);
