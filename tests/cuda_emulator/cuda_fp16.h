#pragma once

#include "cuda_runtime.h"

struct __half {
  std::uint16_t bits;
};

inline float __half2float(__half x) {
  const std::uint32_t sign = std::uint32_t(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = std::uint32_t(x.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return __uint_as_float(sign | magnitude | 0x7f800000u);
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * 0x1p112f));
}

inline __half __float2half_rn(float x) {
  const std::uint32_t sign = __float_as_uint(x) >> 16 & 0x8000u;
  const float magnitude = fabsf(x);
  if (!(magnitude <= HUGE_VALF)) return {0x7fff};
  if (magnitude >= 65520.0f) return {std::uint16_t(sign | 0x7c00u)};
  // Adding this power of two rounds to what half precision resolves around the number.
  const float rounder =
      __uint_as_float(std::max(__float_as_uint(magnitude) & 0x7f800000u, 0x38800000u)) * 8192.0f;
  const float rounded = (magnitude + rounder) - rounder;
  const bool denormal = rounded < 0x1p-14f;
  const std::uint32_t bits =
      denormal ? std::uint32_t(rounded * 0x1p24f) : (__float_as_uint(rounded) - 0x38000000u) >> 13;
  return {std::uint16_t(sign | bits)};
}
