// Dropout masks as a pure function of a seed: mixlora/ops/philox.py has the definition.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/vec.h"

namespace mixlora::MIXLORA_ISA {

typedef uint64_t Bits64 __attribute__((vector_size(kVectorBytes)));

// Two vectors of counters at once, so that one's multiplications do not wait for their results.
inline constexpr int kCounters = kVectorBytes / 8, kVectors = 2;
inline constexpr int kDrawn = 4 * kCounters * kVectors;

// Of the low halves of every lane. Compilers would multiply the high halves too.
INLINE Bits64 low_product(Bits64 a, uint32_t b) {
  const Bits64 b_lanes = Bits64{} + b;
#if defined(__AVX512F__)
  return (Bits64)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b_lanes);
#elif defined(__AVX2__)
  return (Bits64)_mm256_mul_epu32((__m256i)a, (__m256i)b_lanes);
#elif defined(__SSE2__)
  return (Bits64)_mm_mul_epu32((__m128i)a, (__m128i)b_lanes);
#else
  return (a & 0xffffffff) * b_lanes;
#endif
}

// The words of columns first .. first + kDrawn - 1 of a row; `first` is a multiple of 4. A lane
// holds a word in its low half, and anything in its high one.
INLINE void philox(uint64_t seed, uint64_t row, int64_t first, uint32_t* words) {
  Bits64 lane, c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
  for (int i = 0; i < kCounters; ++i) lane[i] = i;
  for (int v = 0; v < kVectors; ++v) {
    c0[v] = lane + static_cast<uint64_t>(first / 4 + v * kCounters);
    c1[v] = Bits64{};
    c2[v] = Bits64{} + row;
    c3[v] = Bits64{} + (row >> 32);
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int v = 0; v < kVectors; ++v) {
      const Bits64 product0 = low_product(c0[v], 0xD2511F53);
      const Bits64 product1 = low_product(c2[v], 0xCD9E8D57);
      c0[v] = (product1 >> 32) ^ c1[v] ^ key0;
      c1[v] = product1;
      c2[v] = (product0 >> 32) ^ c3[v] ^ key1;
      c3[v] = product0;
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  Bits64 low, high;  // the lanes of two vectors in turns
  for (int i = 0; i < kCounters; ++i) low[i] = i / 2 + i % 2 * kCounters;
  high = low + kCounters / 2;
  for (int v = 0; v < kVectors; ++v, words += 4 * kCounters) {
    const Bits64 words01 = (c0[v] & 0xffffffff) | c1[v] << 32;
    const Bits64 words23 = (c2[v] & 0xffffffff) | c3[v] << 32;
    const Bits64 turns[] = {__builtin_shuffle(words01, words23, low),
                            __builtin_shuffle(words01, words23, high)};
    memcpy(words, turns, sizeof turns);
  }
}

// y[i] = x[i] / (1 - p) where column first + i of the row is kept, else 0 x[i]; y may be x.
// `first` is a multiple of 4.
template <class T>
void philox_dropout(
    const T* x, int64_t n, uint64_t seed, uint64_t row, int64_t first, double p, T* y) {
  using S = Wide<T>;
  const uint32_t threshold = static_cast<uint32_t>(p * 4294967296.0);
  const S kept = static_cast<S>(1 / (1 - p));
  for (int64_t i = 0; i < n; i += kDrawn) {
    uint32_t words[kDrawn];
    S factors[kDrawn];
    philox(seed, row, first + i, words);
    for (int j = 0; j < kDrawn; ++j) factors[j] = words[j] >= threshold ? kept : 0;
    for_each_vector<T>(std::min<int64_t>(kDrawn, n - i), [&](int64_t j, auto count) {
      store_part(y + i + j, load_part(x + i + j, count) * load(factors + j), count);
    });
  }
}

}  // namespace mixlora::MIXLORA_ISA
