#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "vlfast/inline.h"

// Numbers one at a time, in code that vectorises.

namespace vlfast {

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

template <typename To, typename From>
VLFAST_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

VLFAST_INLINE float widen(float x) { return x; }

VLFAST_INLINE double widen(double x) { return x; }

VLFAST_INLINE float widen(BFloat16 x) {
  return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}

VLFAST_INLINE float widen(Float16 x) {
  const std::uint32_t sign = (x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  // Exponent and mantissa in place, the exponent's bias 112 too small: a product puts it right,
  // for denormals too. Infinity and NaN get the largest exponent.
  const float finite = bit_cast<float>(magnitude) * 0x1p112f;
  const std::uint32_t special = magnitude | 0x7f800000u;
  const bool is_special = magnitude >= 0x0f800000u;
  return bit_cast<float>(sign | (is_special ? special : bit_cast<std::uint32_t>(finite)));
}

VLFAST_INLINE void narrow(float x, BFloat16& to) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t to_nearest_even = bits + 0x7fffu + ((bits >> 16) & 1);
  to.bits = static_cast<std::uint16_t>(x != x ? 0x7fc0u : to_nearest_even >> 16);
}

VLFAST_INLINE void narrow(float x, Float16& to) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Half's exponent, from 2^-14 on: below it the steps stay as wide. A sum with 2^13 times that
  // power is rounded to such a step, and its low bits count them.
  const std::uint32_t least = 113u << 23;
  const std::uint32_t power = (magnitude < least ? least : magnitude) & 0x7f800000u;
  const float rounder = bit_cast<float>(power + (13u << 23));
  const float rounded = bit_cast<float>(magnitude) + rounder;
  const std::uint32_t steps = bit_cast<std::uint32_t>(rounded) - bit_cast<std::uint32_t>(rounder);
  const std::uint32_t finite = ((power - least) >> 13) + steps;
  // 65520, halfway to the next power of 2, is the least that rounds to infinity.
  const std::uint32_t value = magnitude < 0x477ff000u ? finite : 0x7c00u;
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  to.bits = static_cast<std::uint16_t>(sign | (x != x ? 0x7e00u : value));
}

VLFAST_INLINE void narrow(float x, float& to) { to = x; }

// exp(x) for x <= 0, to about 1 ulp; 0 where the result would be denormal, NaN for NaN.
VLFAST_INLINE float exp_negative(float x) {
  constexpr float kLowest = -87;
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693145752f;
  constexpr float kLn2Low = 1.42860677e-6f;
  // 1.5 * 2^23: a sum with it is rounded to an integer, which stands in its low bits.
  constexpr float kRounder = 12582912;
  const float clamped = x < kLowest ? kLowest : x;
  const float shifted = clamped * kLog2E + kRounder;
  const float n = shifted - kRounder;
  const float r = (clamped - n * kLn2High) - n * kLn2Low;
  // Of (exp(r) - 1 - r) / r^2, interpolated at Chebyshev's points: an error of 1e-8 in exp(r).
  float power = 0.0013926184f;
  power = power * r + 0.0083631789f;
  power = power * r + 0.041666556f;
  power = power * r + 0.16666576f;
  power = power * r + 0.5f;
  power = power * (r * r) + r;
  const float two_to_n = bit_cast<float>((bit_cast<std::uint32_t>(shifted) + 127) << 23);
  const float value = power * two_to_n + two_to_n;
  return x < kLowest ? 0 : value;
}

VLFAST_INLINE double exp_negative(double x) { return std::exp(x); }

}  // namespace vlfast
