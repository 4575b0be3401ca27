// What a kernel's products multiply: numbers of S, or, where the processor adds the products of two
// pairs of bf16 to a float in one instruction, such pairs. So a sum over J terms is one over
// J / kTerms<P> factors P, and a matrix of factors has pairs along the dimension that is summed:
//
//   pack             to[x / kTerms][y] = from[x][y]
//   pack_transposed  to[y / kTerms][x] = from[x][y]
//
// Kept<P> is the type of one such number in memory: a row of them is a row of factors too.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/low_rank.h"

namespace mixlora::MIXLORA_ISA {

struct Bf16Pair {
  Bf16 first, second;
};

template <class P>
inline constexpr int kTerms = std::is_same_v<P, Bf16Pair> ? 2 : 1;
template <class P>
using Kept = std::conditional_t<std::is_same_v<P, Bf16Pair>, Bf16, P>;

#if defined(__AVX512BF16__)
template <class T>
using FactorOf = std::conditional_t<std::is_same_v<T, Bf16>, Bf16Pair, Wide<T>>;
#else
template <class T>
using FactorOf = Wide<T>;
#endif

template <class S>
INLINE Vec<S> load_factors(const S* p) {
  return load(p);
}
// sum + c a, for every lane of a.
template <class S, class V>
INLINE V add_product(const S* c, V a, V sum) {
  return splat(*c) * a + sum;
}
template <class S, class V>
INLINE void store_factors(S* p, const V (&x)[1]) {
  store(p, x[0]);
}

// As `store`, but bf16 by the processor where it can: that takes one instruction, not ten, and
// makes 0 of what is too small for a normal number.
template <class T, class V>
INLINE void store_normal(T* p, V x) {
  store(p, x);
}

#if defined(__AVX512BF16__)
INLINE void store_normal(Bf16* p, Vec<float> x) {
  const auto narrow = _mm512_cvtneps_pbh((__m512)x);
  memcpy(p, &narrow, sizeof narrow);
}
INLINE Bits32 load_factors(const Bf16Pair* p) {
  Bits32 x;
  memcpy(&x, p, sizeof x);
  return x;
}
// In assembly, since gcc 12 would load and spread c by an instruction of its own.
INLINE Vec<float> add_product(const Bf16Pair* c, Bits32 a, Vec<float> sum) {
  asm("vdpbf16ps %1%{1to16%}, %2, %0" : "+v"(sum) : "m"(*c), "v"(a));
  return sum;
}
INLINE void store_factors(Bf16Pair* p, const Vec<float> (&x)[2]) {
  typedef uint16_t Words __attribute__((vector_size(kVectorBytes)));
  Words turns;
  for (int i = 0; i < 32; ++i) turns[i] = i / 2 + i % 2 * 16;
  const Words both = (Words)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
  const Words pairs = __builtin_shuffle(both, turns);
  memcpy(p, &pairs, sizeof pairs);
}
#endif

// Rows and columns that are not there count as zero: all of X rounded up to kTerms rows and Y to
// whole vectors is written.
template <class P, class S>
void pack(const S* from, int64_t X, int64_t Y, int64_t from_stride, P* to, int64_t to_stride) {
  for (int64_t x = 0; x < X; x += kTerms<P>, to += to_stride) {
    for_each_vector<S>(Y, [&](int64_t y, auto n) {
      Vec<S> rows[kTerms<P>] = {};
      for (int i = 0; i < kTerms<P> && x + i < X; ++i) {
        rows[i] = load_part(from + (x + i) * from_stride + y, n);
      }
      store_factors(to + y, rows);
    });
  }
}

inline constexpr int64_t kPackRows = 32;  // at once

template <class P, class S>
void pack_transposed(
    const S* from, int64_t X, int64_t Y, int64_t from_stride, P* to, int64_t to_stride) {
  alignas(64) S rows[kPackRows * kPackRows];
  for (int64_t y = 0; y < Y; y += kPackRows) {
    for (int64_t x = 0; x < X; x += kPackRows) {
      const int64_t columns = std::min(kPackRows, X - x), count = std::min(kPackRows, Y - y);
      transpose(from + x * from_stride + y, columns, count, from_stride, rows, kPackRows);
      pack(rows, count, columns, kPackRows, to + y / kTerms<P> * to_stride + x, to_stride);
    }
  }
}

// y[i][r] += sum_j c[i kRow + j kTerm] a[j][r] for i < kRows, j < J and r < R, a's and y's rows
// being R apart, whole vectors.
template <int kRows, int64_t kRow, int64_t kTerm, class P, class S>
INLINE void add_products(const P* c, const P* a, int64_t J, int64_t R, S* y) {
  const auto tile = [&](auto kVectors, int64_t r) {
    Vec<S> sum[kRows][kVectors] = {};
    const P *c_j = c, *a_j = a + r;
#pragma GCC unroll 4
    for (int64_t j = 0; j < J; ++j, c_j += kTerm, a_j += R) {
      decltype(load_factors(a)) terms[kVectors];
      for (int v = 0; v < kVectors; ++v) terms[v] = load_factors(a_j + v * kWidth<S>);
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          sum[i][v] = add_product(c_j + i * kRow, terms[v], sum[i][v]);
        }
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        S* to = y + i * R + r + v * kWidth<S>;
        store(to, load(to) + sum[i][v]);
      }
    }
  };
  int64_t r = 0;
  for (; r + 2 * kWidth<S> <= R; r += 2 * kWidth<S>) tile(std::integral_constant<int, 2>{}, r);
  if (r < R) tile(std::integral_constant<int, 1>{}, r);
}

}  // namespace mixlora::MIXLORA_ISA
