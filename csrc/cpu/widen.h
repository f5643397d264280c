#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "scalar.h"
#include "scratch.h"

// Rows of half precision in fp32. Each source that includes it has these functions to itself, since
// functions compiled for several instruction sets can't be inline.

namespace vlfast {
namespace {

VLFAST_DISPATCH void widen_row(const BFloat16* from, std::int64_t size, float* to) {
  for (std::int64_t i = 0; i < size; ++i) to[i] = widen(from[i]);
}

VLFAST_DISPATCH void widen_row(const Float16* from, std::int64_t size, float* to) {
  for (std::int64_t i = 0; i < size; ++i) to[i] = widen(from[i]);
}

// The row in fp32: itself, or a copy in `scratch`.
template <typename T>
const float* in_float(const T* row, std::int64_t size, std::vector<float>& scratch) {
  if constexpr (std::is_same_v<T, float>) {
    return row;
  } else {
    float* const widened = at_least(scratch, size);
    widen_row(row, size, widened);
    return widened;
  }
}

}  // namespace
}  // namespace vlfast
