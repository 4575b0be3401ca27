// torch's own thread pool for kernel sources, which include no torch header.
//
// The caller cuts the work into items by the problem's size alone, never by the number of threads:
// that is what makes results equal to the bit for any number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

// As in torch/csrc/stable/c/shim.h.
extern "C" int32_t torch_parallel_for(int64_t begin,
                                      int64_t end,
                                      int64_t grain_size,
                                      void (*run)(int64_t, int64_t, void*),
                                      void* context);

namespace mixlora {

// Calls body(i) once for each i in [0, count), each of the threads the next that is left: they are
// seldom equally fast. The body must not throw.
template <class Body>
void parallel_for(int64_t count, const Body& body) {
  struct Work {
    const Body& body;
    const int64_t count;
    std::atomic<int64_t> next{0};
  } work{body, count};
  auto run = [](int64_t, int64_t, void* context) {
    Work& work = *static_cast<Work*>(context);
    for (int64_t i; (i = work.next++) < work.count;) work.body(i);
  };
  torch_parallel_for(0, count, 1, run, &work);
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
