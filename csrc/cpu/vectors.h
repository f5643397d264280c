#pragma once

#include <cstring>

#include "vlfast/inline.h"

// Vectors of floats, by their size in bytes. Compilers split those that a processor has not.

namespace vlfast {

using Vector16 = float __attribute__((vector_size(16)));
using Vector32 = float __attribute__((vector_size(32)));
using Vector64 = float __attribute__((vector_size(64)));

template <typename Vector>
VLFAST_INLINE void load(const float* from, Vector& to) {
  std::memcpy(&to, from, sizeof to);
}

template <typename Vector>
VLFAST_INLINE void store(const Vector& from, float* to) {
  std::memcpy(to, &from, sizeof from);
}

}  // namespace vlfast
