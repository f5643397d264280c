#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  std::uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  return __uint_as_float(std::uint32_t(x.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const std::uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {std::uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
