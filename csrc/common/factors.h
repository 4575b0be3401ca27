// What a kernel's products multiply: numbers of S, or, where the processor adds the products of two
// pairs of bf16 to a float in one instruction, such pairs. So a sum over J terms is one over
// J / kTerms<P> factors P, and a matrix of factors has pairs along the dimension that is summed:
//
//   pack             to[x / kTerms][y] = from[x][y]
//   pack_transposed  to[y / kTerms][x] = from[x][y]
//
// Kept<P> is the type of one such number in memory: a row of them is a row of factors too. SumOf<P>
// is that of sums.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>

#include "common/vec.h"

namespace mixlora::MIXLORA_ISA {

struct Bf16Pair {
  Bf16 first, second;
};

template <class P>
inline constexpr int kTerms = std::is_same_v<P, Bf16Pair> ? 2 : 1;
template <class P>
using Kept = std::conditional_t<std::is_same_v<P, Bf16Pair>, Bf16, P>;
template <class P>
using SumOf = Wide<Kept<P>>;
// Of numbers of J terms in a row.
template <class P>
INLINE int64_t num_factors(int64_t J) {
  return (J + kTerms<P> - 1) / kTerms<P>;
}

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
// sum + x a, lane by lane.
template <class V>
INLINE V add_lanes(V x, V a, V sum) {
  return x * a + sum;
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
INLINE Vec<float> add_lanes(Bits32 x, Bits32 a, Vec<float> sum) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)a);
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
// whole vectors is written. row(x) points to Y numbers.
template <class P, class Row>
INLINE void pack_rows(int64_t X, int64_t Y, const Row& row, P* to, int64_t to_stride) {
  using From = std::remove_cvref_t<decltype(*row(0))>;
  for (int64_t x = 0; x < X; x += kTerms<P>, to += to_stride) {
    const From* from[kTerms<P>] = {};
    for (int i = 0; i < kTerms<P> && x + i < X; ++i) from[i] = row(x + i);
    for_each_vector<From>(Y, [&](int64_t y, auto n) {
      Vec<SumOf<P>> rows[kTerms<P>] = {};
      for (int i = 0; i < kTerms<P>; ++i) {
        if (from[i] != nullptr) rows[i] = load_part(from[i] + y, n);
      }
      store_factors(to + y, rows);
    });
  }
}
template <class P, class From>
void pack(const From* from, int64_t X, int64_t Y, int64_t from_stride, P* to, int64_t to_stride) {
  pack_rows(X, Y, [&](int64_t x) { return from + x * from_stride; }, to, to_stride);
}

// to[j][i] = from[i][j]; the rest of a row of `to` is kept.
template <class S>
void transpose(
    const S* from, int64_t rows, int64_t columns, int64_t from_stride, S* to, int64_t to_stride) {
  constexpr int64_t kW = kWidth<S>;
  for (int64_t i = 0; i < rows; i += kW) {
    for (int64_t j = 0; j < columns; j += kW) {
      if (i + kW <= rows && j + kW <= columns) {
        Vec<S> tile[kW];
        for (int n = 0; n < kW; ++n) tile[n] = load(from + (i + n) * from_stride + j);
        transpose_vectors<S>(tile);
        for (int n = 0; n < kW; ++n) store(to + (j + n) * to_stride + i, tile[n]);
        continue;
      }
      for (int64_t n = j; n < std::min(j + kW, columns); ++n) {
        for (int64_t m = i; m < std::min(i + kW, rows); ++m) {
          to[n * to_stride + m] = from[m * from_stride + n];
        }
      }
    }
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
