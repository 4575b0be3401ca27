// Dropout masks as a pure function of a seed: mixlora/ops/philox.py has the definition.
#pragma once

#include <cstdint>

#include "common/vec.h"

namespace mixlora::MIXLORA_ISA {

// Multiplies x[0..n) by 1 / (1 - p) where column first + i of the row is kept, else by 0. `first`
// and the padded n are multiples of 4.
template <class S>
void philox_dropout(S* x, int64_t n, uint64_t seed, uint64_t row, int64_t first, double p) {
  const uint32_t threshold = static_cast<uint32_t>(p * 4294967296.0);
  const S kept = static_cast<S>(1 / (1 - p));
  for (int64_t i = 0; i < n; i += 4) {
    uint32_t c0 = static_cast<uint32_t>((first + i) / 4), c1 = 0;
    uint32_t c2 = static_cast<uint32_t>(row), c3 = static_cast<uint32_t>(row >> 32);
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t product0 = uint64_t{c0} * 0xD2511F53u, product1 = uint64_t{c2} * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
      c1 = static_cast<uint32_t>(product1);
      c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
      c3 = static_cast<uint32_t>(product0);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    x[i] *= c0 >= threshold ? kept : 0;
    x[i + 1] *= c1 >= threshold ? kept : 0;
    x[i + 2] *= c2 >= threshold ? kept : 0;
    x[i + 3] *= c3 >= threshold ? kept : 0;
  }
}

}  // namespace mixlora::MIXLORA_ISA
