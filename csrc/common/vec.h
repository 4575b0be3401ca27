// Vectors of the compiler's own kind (GCC and clang), as wide as the instruction set that the file
// is compiled for: +, -, *, / and comparisons work on them, and a * b + c becomes one instruction.
//
// Numbers in memory are of any type, those in vectors are Wide:
//
//   using V = Vec<Wide<T>>;                        T = Bf16: V is kWidth<float> floats
//   V x = load(p);  store(q, x * x + splat(2.f));     p, q point to T, wherever they point
//   load_part(p, n), store_part(p, x, n)            the first n <= kWidth; the rest is 0, or kept
//   for_each_vector<T>(D, [&](int64_t d, auto n) {  elements d .. d + n - 1 of D: n is the constant
//     ... load_part(p + d, n) ...                   kWidth<T>, and less for what is left at the end
//   });
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"

namespace mixlora::MIXLORA_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T>
inline constexpr int kWidth = kVectorBytes / sizeof(Wide<T>);

template <class S>
struct VecOf {
  typedef S type __attribute__((vector_size(kVectorBytes)));
};
template <class S>
using Vec = typename VecOf<S>::type;

typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef int64_t Longs __attribute__((vector_size(kVectorBytes)));
template <class S>
using Lanes = std::conditional_t<sizeof(S) == 4, Ints, Longs>;  // their numbers, to shuffle by

#define INLINE inline __attribute__((always_inline))

INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }
INLINE float widen(Bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

// Rounds to the nearest, ties to even; a NaN stays one.
template <class T>
INLINE T narrow(Wide<T> x) {
  if constexpr (std::is_same_v<T, Bf16>) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (std::isnan(x)) return Bf16{static_cast<uint16_t>((bits >> 16) | 0x40)};
    return Bf16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  } else {
    return x;
  }
}

template <class S>
INLINE Vec<S> splat(S x) {
  return x - Vec<S>{};
}

INLINE Vec<float> load(const float* p) {
  Vec<float> x;
  memcpy(&x, p, sizeof x);
  return x;
}
INLINE Vec<double> load(const double* p) {
  Vec<double> x;
  memcpy(&x, p, sizeof x);
  return x;
}
// By hand, since gcc 12 would widen each half of a vector and put them together.
INLINE Bits32 widen_bits(Bits16 x) {
#if defined(__AVX512F__)
  return (Bits32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x);
#elif defined(__AVX2__)
  return (Bits32)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Bits32);
#endif
}
INLINE Vec<float> load(const Bf16* p) {
  Bits16 narrow_bits;
  memcpy(&narrow_bits, p, sizeof narrow_bits);
  return (Vec<float>)(widen_bits(narrow_bits) << 16);
}
// What is below 2^-14 has no leading one: it counts units of 2^-24.
INLINE Vec<float> load(const Fp16* p) {
  Bits16 narrow_bits;
  memcpy(&narrow_bits, p, sizeof narrow_bits);
  const Bits32 bits = widen_bits(narrow_bits);
  const Bits32 sign = (bits & 0x8000) << 16, size = bits & 0x7fff;
  const Bits32 small = (Bits32)(__builtin_convertvector((Ints)size, Vec<float>) * 0x1p-24f);
  const Bits32 normal = (size << 13) + (112 << 23);
  const Bits32 infinite_or_nan = normal + (112 << 23);
  return (Vec<float>)(sign | (size < 0x400 ? small : size < 0x7c00 ? normal : infinite_or_nan));
}

// For what several multiplications use: the compiler would rather load it for each.
template <class V>
INLINE void in_register(V& x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#endif
}

INLINE void store(float* p, Vec<float> x) { memcpy(p, &x, sizeof x); }
INLINE void store(double* p, Vec<double> x) { memcpy(p, &x, sizeof x); }
INLINE void store(Bf16* p, Vec<float> x) {
  const Bits32 bits = (Bits32)x;
  const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits32 is_nan = (Bits32)(x != x);
  const Bits32 chosen = (is_nan & ((bits >> 16) | 0x40)) | (~is_nan & rounded);
  const Bits16 narrow_bits = __builtin_convertvector(chosen, Bits16);
  memcpy(p, &narrow_bits, sizeof narrow_bits);
}
// Below 2^-14, adding 0.5 makes the processor round to units of 2^-24.
INLINE void store(Fp16* p, Vec<float> x) {
  const Bits32 bits = (Bits32)x;
  const Bits32 sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
  const Bits32 small = (Bits32)((Vec<float>)size + 0.5f) - (126 << 23);
  const Bits32 rounded = (size - (112 << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
  const Bits32 infinite = Bits32{} + 0x7c00, nan = Bits32{} + 0x7e00;
  const Bits32 normal = rounded > infinite ? infinite : rounded;
  const Bits32 chosen = size < (113 << 23) ? small : size > 0x7f800000 ? nan : normal;
  const Bits16 narrow_bits = __builtin_convertvector(sign | chosen, Bits16);
  memcpy(p, &narrow_bits, sizeof narrow_bits);
}

template <class T>
INLINE Vec<Wide<T>> load_part(const T* p, int64_t n) {
  if (n == kWidth<T>) return load(p);
  T whole[kWidth<T>] = {};
  memcpy(whole, p, n * sizeof(T));
  return load(whole);
}
template <class T>
INLINE void store_part(T* p, Vec<Wide<T>> x, int64_t n) {
  if (n == kWidth<T>) return store(p, x);
  T whole[kWidth<T>];
  store(whole, x);
  memcpy(p, whole, n * sizeof(T));
}

template <class T, class Body>
INLINE void for_each_vector(int64_t D, const Body& body) {
  int64_t d = 0;
  for (; d + kWidth<T> <= D; d += kWidth<T>) {
    body(d, std::integral_constant<int64_t, kWidth<T>>{});
  }
  if (d < D) body(d, D - d);
}

template <class From, class To>
INLINE void convert(const From* from, int64_t count, To* to) {
  if constexpr (std::is_same_v<From, To>) {
    std::copy_n(from, count, to);  // of nothing too, wherever that is
  } else {
    for_each_vector<From>(
        count, [&](int64_t i, auto n) { store_part(to + i, load_part(from + i, n), n); });
  }
}

// All lanes as one by op(a, b), in a fixed order.
template <class V, class Op>
INLINE auto reduce(V x, const Op& op) {
  using S = std::remove_cvref_t<decltype(x[0])>;
  constexpr int kLanes = kVectorBytes / sizeof(S);
  S lanes[kLanes];
  memcpy(lanes, &x, sizeof x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] = op(lanes[i], lanes[i + width]);
  }
  return lanes[0];
}
template <class V>
INLINE auto sum(V x) {
  return reduce(x, [](auto a, auto b) { return a + b; });
}
template <class V>
INLINE auto max(V x) {
  return reduce(x, [](auto a, auto b) { return a > b ? a : b; });
}

// y[j] = lane j of all x. Each round zips the first half of the vectors with the second.
template <class S>
INLINE void transpose_vectors(Vec<S>* x) {
  constexpr int kW = kWidth<S>;
  Lanes<S> low, high;
  for (int i = 0; i < kW; ++i) low[i] = i / 2 + i % 2 * kW, high[i] = low[i] + kW / 2;
  for (int round = 1; round < kW; round *= 2) {
    Vec<S> y[kW];
    for (int i = 0; i < kW / 2; ++i) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + kW / 2], low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + kW / 2], high);
    }
    for (int i = 0; i < kW; ++i) x[i] = y[i];
  }
}

// Adds the halves, kHalf lanes each, of every block of lanes: what is left of two vectors is one.
template <class S, int kHalf>
INLINE void add_halves(Vec<S>* x) {
  Lanes<S> low, high;
  for (int i = 0; i < kWidth<S>; ++i) low[i] = i + i / kHalf * kHalf, high[i] = low[i] + kHalf;
  for (int i = 0; i < kHalf; ++i) {
    const Vec<S> a = x[2 * i], b = x[2 * i + 1];
    x[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  }
  if constexpr (kHalf > 1) add_halves<S, kHalf / 2>(x);
}

// Lane i is the sum of all lanes of x[i], as `sum` has it, for i < count.
template <class S>
INLINE Vec<S> lane_sums(const Vec<S>* x, int64_t count) {
  Vec<S> sums[kWidth<S>];
  for (int i = 0; i < kWidth<S>; ++i) sums[i] = i < count ? x[i] : Vec<S>{};
  add_halves<S, kWidth<S> / 2>(sums);
  return sums[0];
}

// e^x, clamped to what a normal number holds; within 3 units in the last place.
INLINE Vec<float> exp(Vec<float> x) {
  const Vec<float> least = splat(-87.33654f), most = splat(88.02969f);
  x = x < least ? least : x;
  x = x > most ? most : x;
  const Vec<float> magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Vec<float> shifted = x * 1.44269504f + magic, whole = shifted - magic;
  const Vec<float> rest = x - whole * 0.693359375f + whole * 2.12194440e-4f, square = rest * rest;
  // least error of its degree on [-log(2) / 2, log(2) / 2]; the sums do not wait for one another
  const Vec<float> high = rest * 8.3125015e-3f + 4.1890332e-2f;
  const Vec<float> middle = rest * 1.6667116e-1f + 4.9999230e-1f, low = rest + 1.f;
  const Vec<float> y = (high * square + middle) * square + low;
  // The whole number, in the last bits of `shifted`, goes to y's exponent.
  return (Vec<float>)((Ints)y + ((Ints)shifted << 23));
}
INLINE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = std::exp(std::min(std::max(x[i], -708.0), 709.0));
  return x;
}

template <class V, class Function>
INLINE V each_lane(V x, const Function& function) {
  for (int i = 0; i < static_cast<int>(sizeof x / sizeof x[0]); ++i) x[i] = function(x[i]);
  return x;
}

}  // namespace mixlora::MIXLORA_ISA
