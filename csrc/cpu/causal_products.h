#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "dispatch.h"
#include "vectors.h"
#include "vlfast/inline.h"

// Products of a few short rows, in fp32, of which query q sees the keys up to offset + q. With an
// offset of at least the number of keys it sees them all. What a query does not see is never
// multiplied, not even by zero, so that no NaN gets through.
//
// Every sum is taken over its terms in one order, wherever the tile that it falls into begins.

namespace vlfast {

// Rows are so wide, or a multiple of it: the largest vector.
constexpr std::int64_t kWidthStep = 16;

struct CausalScores {
  const float* queries;  // [query_count, width]
  std::int64_t query_count;
  const float* keys;  // [key_count, width]
  std::int64_t key_count;
  std::int64_t offset;
  std::int64_t width;
  float* scores;  // [query_count, stride]; a few of what is not seen are written too
  std::int64_t stride;
};

struct CausalSums {
  const float* weights;  // [query_count, stride]
  std::int64_t stride;
  std::int64_t query_count;
  std::int64_t key_count;
  std::int64_t offset;
  std::int64_t width;
  const float* terms;  // [key_count, width]; the other way, [query_count, width]
  float* sums;         // [query_count, width]; the other way, [key_count, width]
};

namespace causal_products {

template <typename Vector>
struct Halves;
template <>
struct Halves<Vector64> {
  Vector32 low, high;
};
template <>
struct Halves<Vector32> {
  Vector16 low, high;
};

VLFAST_INLINE float total(const Vector16& x) { return (x[0] + x[2]) + (x[1] + x[3]); }

template <typename Vector>
VLFAST_INLINE float total(const Vector& x) {
  Halves<Vector> halves;
  std::memcpy(&halves, &x, sizeof x);
  halves.low += halves.high;
  return total(halves.low);
}

VLFAST_INLINE float largest(const Vector16& x) {
  const float even = x[0] < x[2] ? x[2] : x[0], odd = x[1] < x[3] ? x[3] : x[1];
  return even < odd ? odd : even;
}

template <typename Vector>
VLFAST_INLINE float largest(const Vector& x) {
  Halves<Vector> halves;
  std::memcpy(&halves, &x, sizeof x);
  halves.low = halves.low < halves.high ? halves.high : halves.low;
  return largest(halves.low);
}

template <typename Vector, int kQueries, int kKeys>
VLFAST_INLINE void score_tile(const CausalScores& by, std::int64_t query, std::int64_t key) {
  constexpr int kSize = sizeof(Vector) / sizeof(float);
  const std::int64_t width = by.width, stride = by.stride;
  const float* queries = by.queries + query * width;
  const float* keys = by.keys + key * width;
  Vector sums[kQueries][kKeys];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (int k = 0; k < kKeys; ++k) sums[q][k] = Vector{};
  }
  for (std::int64_t d = 0; d < width; d += kSize) {
    Vector of_keys[kKeys];
#pragma GCC unroll 4
    for (int k = 0; k < kKeys; ++k) load(keys + k * width + d, of_keys[k]);
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      Vector of_query;
      load(queries + q * width + d, of_query);
#pragma GCC unroll 4
      for (int k = 0; k < kKeys; ++k) sums[q][k] += of_query * of_keys[k];
    }
  }
  float* scores = by.scores + query * stride + key;
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (int k = 0; k < kKeys; ++k) scores[q * stride + k] = total(sums[q][k]);
  }
}

template <typename Vector, int kQueries, int kKeys>
VLFAST_INLINE void score_queries(const CausalScores& by, std::int64_t query) {
  const std::int64_t seen = std::min(by.key_count, by.offset + query + kQueries);
  std::int64_t key = 0;
  for (; key + kKeys <= seen; key += kKeys) score_tile<Vector, kQueries, kKeys>(by, query, key);
  for (; key < seen; ++key) score_tile<Vector, kQueries, 1>(by, query, key);
}

template <typename Vector, int kQueries, int kKeys>
VLFAST_INLINE void score(const CausalScores& by) {
  std::int64_t query = 0;
  for (; query + kQueries <= by.query_count; query += kQueries)
    score_queries<Vector, kQueries, kKeys>(by, query);
  for (; query < by.query_count; ++query) score_queries<Vector, 1, kKeys>(by, query);
}

template <typename Vector, int kVectors>
VLFAST_INLINE void add_term(float weight, const float* term, Vector (&sums)[kVectors]) {
  constexpr int kSize = sizeof(Vector) / sizeof(float);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    Vector part;
    load(term + v * kSize, part);
    sums[v] += weight * part;
  }
}

// Rows are queries and terms are keys, or (kByKey) the other way.
template <typename Vector, int kRows, int kVectors, bool kByKey>
VLFAST_INLINE void sum_tile(const CausalSums& by, std::int64_t row, std::int64_t column) {
  constexpr int kSize = sizeof(Vector) / sizeof(float);
  const std::int64_t width = by.width;
  const std::int64_t row_step = kByKey ? 1 : by.stride, term_step = kByKey ? by.stride : 1;
  const float* weights = by.weights + row * row_step;
  const float* terms = by.terms + column;
  float* to = by.sums + row * width + column;
  // All rows have the terms from `begin` to `end` in common. Some have those between `first` and
  // `begin` too, or between `end` and `last`.
  std::int64_t first = 0, begin = 0, end = by.query_count, last = by.query_count;
  if (kByKey) {
    first = std::clamp<std::int64_t>(row - by.offset, 0, end);
    begin = std::clamp<std::int64_t>(row + kRows - 1 - by.offset, 0, end);
  } else {
    end = std::min(by.offset + row + 1, by.key_count);
    last = std::min(by.offset + row + kRows, by.key_count);
  }
  Vector sums[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) load(to + r * width + v * kSize, sums[r][v]);
  }
  for (std::int64_t t = first; t < begin; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows - 1; ++r) {
      if (row + r <= by.offset + t)
        add_term(weights[r * row_step + t * term_step], terms + t * width, sums[r]);
    }
  }
  for (std::int64_t t = begin; t < end; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
      add_term(weights[r * row_step + t * term_step], terms + t * width, sums[r]);
  }
  for (std::int64_t t = end; t < last; ++t) {
#pragma GCC unroll 4
    for (int r = 1; r < kRows; ++r) {
      if (t <= by.offset + row + r)
        add_term(weights[r * row_step + t * term_step], terms + t * width, sums[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(sums[r][v], to + r * width + v * kSize);
  }
}

template <typename Vector, int kRows, int kVectors, bool kByKey>
VLFAST_INLINE void sum_columns(const CausalSums& by, std::int64_t column) {
  const std::int64_t rows = kByKey ? by.key_count : by.query_count;
  std::int64_t row = 0;
  for (; row + kRows <= rows; row += kRows)
    sum_tile<Vector, kRows, kVectors, kByKey>(by, row, column);
  for (; row < rows; ++row) sum_tile<Vector, 1, kVectors, kByKey>(by, row, column);
}

template <typename Vector, int kRows, int kVectors, bool kByKey>
VLFAST_INLINE void sum(const CausalSums& by) {
  constexpr std::int64_t kSize = sizeof(Vector) / sizeof(float);
  std::int64_t column = 0;
  for (; column + kVectors * kSize <= by.width; column += kVectors * kSize)
    sum_columns<Vector, kRows, kVectors, kByKey>(by, column);
  for (; column < by.width; column += kSize) sum_columns<Vector, kRows, 1, kByKey>(by, column);
}

inline void score_default(const CausalScores& by) { score<Vector16, 2, 4>(by); }
inline void sum_default(const CausalSums& by) { sum<Vector16, 4, 2, false>(by); }
inline void sum_by_key_default(const CausalSums& by) { sum<Vector16, 4, 2, true>(by); }

#if VLFAST_X86_LEVEL >= 3
#define VLFAST_V3 __attribute__((target("arch=x86-64-v3"))) inline
VLFAST_V3 void score_v3(const CausalScores& by) { score<Vector32, 2, 4>(by); }
VLFAST_V3 void sum_v3(const CausalSums& by) { sum<Vector32, 4, 2, false>(by); }
VLFAST_V3 void sum_by_key_v3(const CausalSums& by) { sum<Vector32, 4, 2, true>(by); }
#undef VLFAST_V3
#endif

#if VLFAST_X86_LEVEL >= 4
#define VLFAST_V4 __attribute__((target("arch=x86-64-v4"))) inline
VLFAST_V4 void score_v4(const CausalScores& by) { score<Vector64, 4, 4>(by); }
VLFAST_V4 void sum_v4(const CausalSums& by) { sum<Vector64, 4, 4, false>(by); }
VLFAST_V4 void sum_by_key_v4(const CausalSums& by) { sum<Vector64, 4, 4, true>(by); }
#undef VLFAST_V4
#endif

}  // namespace causal_products

// scores = queries . keys
inline void score_keys(const CausalScores& by) { VLFAST_BEST(causal_products::score)(by); }

// sums += weights . terms
inline void sum_over_keys(const CausalSums& by) { VLFAST_BEST(causal_products::sum)(by); }

// sums += weights^T . terms
inline void sum_over_queries(const CausalSums& by) { VLFAST_BEST(causal_products::sum_by_key)(by); }

}  // namespace vlfast
