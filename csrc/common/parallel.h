// torch's own thread pool for kernel sources, which include no torch header.
//
// The caller cuts the work into items by the problem's size alone, never by the number of threads:
// that is what makes results equal to the bit for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

// As in torch/csrc/stable/c/shim.h.
extern "C" int32_t torch_parallel_for(int64_t begin,
                                      int64_t end,
                                      int64_t grain_size,
                                      void (*run)(int64_t, int64_t, void*),
                                      void* context);

namespace mixlora {

// Calls body(i) once for each i in [0, count). The body must not throw.
template <class Body>
void parallel_for(int64_t count, const Body& body) {
  auto run = [](int64_t begin, int64_t end, void* context) {
    for (int64_t i = begin; i < end; ++i) (*static_cast<const Body*>(context))(i);
  };
  torch_parallel_for(0, count, 1, run, const_cast<Body*>(&body));
}

// Calls body(begin, end) for each chunk of `size` items of [0, count); the last may be shorter.
template <class Body>
void parallel_chunks(int64_t count, int64_t size, const Body& body) {
  parallel_for((count + size - 1) / size,
               [&](int64_t chunk) { body(chunk * size, std::min(count, (chunk + 1) * size)); });
}

// How many rows of so many elements make a chunk long enough to pay for waking a thread.
inline int64_t rows_per_chunk(int64_t row_elements) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, row_elements));
}

}  // namespace mixlora
