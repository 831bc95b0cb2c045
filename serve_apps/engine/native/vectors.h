// Registers of LANES floats, and bf16 numbers in memory: a Half is the upper half of a float.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#ifndef LANES
#define LANES 4
#endif

namespace openledger {

using Half = uint16_t;

typedef float F4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float F8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float F16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t U4 __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint32_t U8 __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t U16 __attribute__((vector_size(64), aligned(2), may_alias));

template <int L> struct Types;
template <> struct Types<4> { using F = F4; using U = U4; };
template <> struct Types<8> { using F = F8; using U = U8; };
template <> struct Types<16> { using F = F16; using U = U16; };

using F = Types<LANES>::F;
typedef int32_t I __attribute__((vector_size(4 * LANES), may_alias));

template <int L> inline typename Types<L>::F load(const float* p) {
  return *reinterpret_cast<const typename Types<L>::F*>(p);
}

// Numbers in bf16 that are multiplied lie in pairs, [k / 2][column][k % 2]: a shift and a mask widen both.
template <int L> inline typename Types<L>::F load_even(const Half* pairs) {
  return (typename Types<L>::F)(*reinterpret_cast<const typename Types<L>::U*>(pairs) << 16);
}
template <int L> inline typename Types<L>::F load_odd(const Half* pairs) {
  return (typename Types<L>::F)(*reinterpret_cast<const typename Types<L>::U*>(pairs) & 0xffff0000u);
}

// acc + even * even + odd * odd of pairs in bf16; the processor's own instruction rounds in its own way.
template <int L>
inline typename Types<L>::F dot(typename Types<L>::F acc, const Half* pairs, uint32_t x) {
#if defined(__AVX512BF16__)
  if constexpr (L == 16)
    return (F16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(pairs), (__m512bh)_mm512_set1_epi32(int(x)));
  if constexpr (L == 8)
    return (F8)_mm256_dpbf16_ps((__m256)acc, (__m256bh)_mm256_loadu_si256((const __m256i*)pairs),
                                (__m256bh)_mm256_set1_epi32(int(x)));
#endif
  const uint32_t even = x << 16, odd = x & 0xffff0000u;
  float x_even, x_odd;
  memcpy(&x_even, &even, 4), memcpy(&x_odd, &odd, 4);
  acc += load_even<L>(pairs) * x_even;
  acc += load_odd<L>(pairs) * x_odd;
  return acc;
}

// To the nearest bf16, to the even one of two; NaN stays NaN.
inline Half rounded(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return x != x ? 0x7fc0 : Half((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The first n numbers of a register, from and to memory.
inline F get(const float* p, int64_t n = LANES) {
  if (n == LANES) return load<LANES>(p);
  F v{};
  memcpy(&v, p, 4 * size_t(n));
  return v;
}
inline void put(float* p, F v, int64_t n = LANES) {
  if (n == LANES) *reinterpret_cast<F*>(p) = v;
  else memcpy(p, &v, 4 * size_t(n));
}
inline void put(Half* p, F v, int64_t n = LANES) {
#if defined(__AVX512BF16__)
  const __m256bh halves = _mm512_cvtneps_pbh((__m512)v);
  if (n == LANES) _mm256_storeu_si256((__m256i*)p, (__m256i)halves);
  else memcpy(p, &halves, 2 * size_t(n));
#else
  for (int i = 0; i < n; ++i) p[i] = rounded(v[i]);
#endif
}

// body(index, n) for whole registers of 0..width, then for the n that are left.
template <class Body>
inline void each_vector(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) body(i, LANES);
  if (i < width) body(i, width - i);
}

template <class A>
inline void convert(const float* from, A* to, int64_t width) {
  each_vector(width, [=](int64_t i, int64_t n) { put(to + i, get(from + i, n), n); });
}

inline float sum(F v) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
}

// exp to about 2 ulp between e^-87 and infinity, NaN of NaN: Cody-Waite reduction, polynomial of degree 7 as in Cephes.
inline F exp_of(F x) {
  const F high_enough = x < -87.0f ? F{} - 87.0f : x, capped = x > 88.7f ? F{} + 88.7f : high_enough;
  const F magic = F{} + 12582912.0f;
  const F n = (capped * 1.44269504f + magic) - magic;
  const F r = (capped - n * 0.693359375f) - n * -2.12194440e-4f;
  F p = F{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const I whole = __builtin_convertvector(n, I), half = whole >> 1, rest = whole - half;  // n reaches 128
  const F low = (F)((half + 127) << 23), high = (F)((rest + 127) << 23);
  return x > 88.7f ? F{} + INFINITY : p * low * high;
}

}  // namespace openledger
