#pragma once

#include <cstdint>
#include <vector>

namespace vlfast {

inline std::int64_t round_up(std::int64_t count, std::int64_t step) {
  return (count + step - 1) / step * step;
}

// Room for so many floats, kept for the next call.
inline float* at_least(std::vector<float>& scratch, std::int64_t size) {
  if (scratch.size() < static_cast<std::size_t>(size)) scratch.resize(size);
  return scratch.data();
}

}  // namespace vlfast
