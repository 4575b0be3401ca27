// Dropout masks as a pure function of a seed: mixlora/ops/philox.py has the definition.
#pragma once

#include "common/cuda.cuh"

namespace mixlora {

// The words of columns 4 * quad .. 4 * quad + 3 of a row.
inline __device__ Pack<uint32_t, 4> philox(uint64_t seed, uint64_t row, uint32_t quad) {
  uint32_t c0 = quad, c1 = 0, c2 = static_cast<uint32_t>(row),
           c3 = static_cast<uint32_t>(row >> 32);
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{c0} * 0xD2511F53, product1 = uint64_t{c2} * 0xCD9E8D57;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// What an input is multiplied by: 1 / (1 - p) where it is kept, else 0. The seed stays on the GPU.
template <class S>
struct DropoutMask {
  const int64_t* seed;
  uint32_t threshold;
  S kept;

  DropoutMask(const int64_t* seed, double p)
      : seed(seed),
        threshold(static_cast<uint32_t>(p * 4294967296.0)),
        kept(static_cast<S>(1 / (1 - p))) {}

  __device__ Pack<S, 4> factors(int64_t row, int64_t quad) const {
    const auto words = philox(*seed, row, static_cast<uint32_t>(quad));
    Pack<S, 4> factors;
#pragma unroll
    for (int j = 0; j < 4; ++j) factors.x[j] = words.x[j] >= threshold ? kept : 0;
    return factors;
  }
};

}  // namespace mixlora
