// Memory for a kernel's intermediate numbers.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace mixlora::MIXLORA_ISA {

struct FreeAligned {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};
template <class S>
using Buffer = std::unique_ptr<S[], FreeAligned>;

// Not initialized; on a cache line, since a vector that straddles two takes twice as long.
template <class S>
Buffer<S> buffer(int64_t count) {
  return Buffer<S>(static_cast<S*>(::operator new(count * sizeof(S), std::align_val_t{64})));
}

}  // namespace mixlora::MIXLORA_ISA
