#pragma once

#include <algorithm>
#include <cstdint>

#include "dispatch.h"
#include "vectors.h"
#include "vlfast/inline.h"

// Matrix products of a few rows ("queries") with many ("words"), in fp32. The words are read where
// they lie, without packing: the queries are packed once, with the rows on the vector lanes.
//
// Every sum is taken over its terms in one order, so that it has the same bits wherever the tile
// that it falls into begins or ends.

namespace vlfast {

// Packed queries have a multiple of so many lanes, the unused ones zero.
constexpr std::int64_t kLanes = 8;

struct Scores {
  const float* queries;  // [width, lanes]
  std::int64_t lanes;
  const float* words;  // [count, width]
  std::int64_t count;
  std::int64_t width;
  float* scores;  // [count, lanes]
};

struct Sums {
  const float* weights;  // [count, stride], of which the first `rows` columns are read
  std::int64_t stride;
  std::int64_t rows;
  const float* words;  // [count, width]
  std::int64_t count;
  std::int64_t width;
  float* sums;  // [rows, width]
};

namespace products {

// So much of the width at a time that 32 lanes of queries (64 KB) stay in the L2 cache beside the
// words. Smaller ones, which fit the L1 cache, measure slower.
constexpr std::int64_t kDepth = 512;
constexpr std::int64_t kCacheLine = 16;  // floats

// Sums are taken over so many terms, then over those: long ones keep the rounding errors of short
// ones.
constexpr std::int64_t kPartialSum = 128;

template <typename Vector, int kWords, int kVectors>
VLFAST_INLINE void score_tile(const Scores& by, std::int64_t word, std::int64_t lane,
                              std::int64_t begin, std::int64_t end) {
  constexpr int kSize = sizeof(Vector) / sizeof(float);
  const std::int64_t lanes = by.lanes, width = by.width;
  const float* words = by.words + word * width;
  const float* queries = by.queries + lane;
  float* scores = by.scores + word * lanes + lane;
  for (std::int64_t part = begin; part < end; part += kPartialSum) {
    const std::int64_t part_end = std::min(part + kPartialSum, end);
    Vector sums[kWords][kVectors];
#pragma GCC unroll 16
    for (int w = 0; w < kWords; ++w) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[w][v] = Vector{};
    }
    for (std::int64_t from = part; from < part_end; from += kCacheLine) {
      // The next tile, which may come from memory. Past the last word this does nothing.
#pragma GCC unroll 16
      for (int w = 0; w < kWords; ++w) __builtin_prefetch(words + (kWords + w) * width + from);
      const std::int64_t to = std::min(from + kCacheLine, part_end);
      for (std::int64_t d = from; d < to; ++d) {
        Vector query[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) load(queries + d * lanes + v * kSize, query[v]);
#pragma GCC unroll 16
        for (int w = 0; w < kWords; ++w) {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sums[w][v] += words[w * width + d] * query[v];
        }
      }
    }
#pragma GCC unroll 16
    for (int w = 0; w < kWords; ++w) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* to = scores + w * lanes + v * kSize;
        Vector total{};
        if (part > 0) load(to, total);
        total += sums[w][v];
        store(total, to);
      }
    }
  }
}

// Fewer lanes than a Vector has are left to the Remainder, which kLanes is a multiple of.
template <typename Vector, int kWords, int kVectors, typename Remainder>
VLFAST_INLINE void score_lanes(const Scores& by, std::int64_t word, std::int64_t begin,
                               std::int64_t end) {
  constexpr std::int64_t kSize = sizeof(Vector) / sizeof(float);
  constexpr std::int64_t kRemainder = sizeof(Remainder) / sizeof(float);
  std::int64_t lane = 0;
  for (; lane + kVectors * kSize <= by.lanes; lane += kVectors * kSize)
    score_tile<Vector, kWords, kVectors>(by, word, lane, begin, end);
  for (; lane + kSize <= by.lanes; lane += kSize)
    score_tile<Vector, kWords, 1>(by, word, lane, begin, end);
  for (; lane < by.lanes; lane += kRemainder)
    score_tile<Remainder, kWords, 1>(by, word, lane, begin, end);
}

template <typename Vector, int kWords, int kVectors, typename Remainder>
VLFAST_INLINE void score(const Scores& by) {
  for (std::int64_t begin = 0; begin < by.width; begin += kDepth) {
    const std::int64_t end = std::min(begin + kDepth, by.width);
    std::int64_t word = 0;
    for (; word + kWords <= by.count; word += kWords)
      score_lanes<Vector, kWords, kVectors, Remainder>(by, word, begin, end);
    for (; word < by.count; ++word) score_lanes<Vector, 1, 1, Remainder>(by, word, begin, end);
  }
}

template <typename Vector, int kRows, int kVectors>
VLFAST_INLINE void sum_tile(const Sums& by, std::int64_t row, std::int64_t column) {
  constexpr int kSize = sizeof(Vector) / sizeof(float);
  const std::int64_t stride = by.stride, width = by.width;
  const float* weights = by.weights + row;
  const float* words = by.words + column;
  Vector sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Vector{};
  }
  for (std::int64_t w = 0; w < by.count; ++w) {
    Vector word[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) load(words + w * width + v * kSize, word[v]);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] += weights[w * stride + r] * word[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = by.sums + (row + r) * width + column + v * kSize;
      Vector total;
      load(to, total);
      total += sums[r][v];
      store(total, to);
    }
  }
}

template <typename Vector, int kRows, int kVectors>
VLFAST_INLINE void sum_columns(const Sums& by, std::int64_t column) {
  std::int64_t row = 0;
  for (; row + kRows <= by.rows; row += kRows) sum_tile<Vector, kRows, kVectors>(by, row, column);
  for (; row + 4 <= by.rows; row += 4) sum_tile<Vector, 4, kVectors>(by, row, column);
  for (; row < by.rows; ++row) sum_tile<Vector, 1, kVectors>(by, row, column);
}

template <typename Vector, int kRows, int kVectors>
VLFAST_INLINE void sum(const Sums& by) {
  constexpr std::int64_t kSize = sizeof(Vector) / sizeof(float);
  std::int64_t column = 0;
  for (; column + kVectors * kSize <= by.width; column += kVectors * kSize)
    sum_columns<Vector, kRows, kVectors>(by, column);
  for (; column + kSize <= by.width; column += kSize) sum_columns<Vector, kRows, 1>(by, column);
  for (; column + 4 <= by.width; column += 4) sum_columns<Vector16, kRows, 1>(by, column);
  for (; column < by.width; ++column) sum_columns<float, kRows, 1>(by, column);
}

inline void score_default(const Scores& by) { score<Vector16, 5, 2, Vector16>(by); }
inline void sum_default(const Sums& by) { sum<Vector16, 4, 2>(by); }

#if VLFAST_X86_LEVEL >= 3
__attribute__((target("arch=x86-64-v3"))) inline void score_v3(const Scores& by) {
  score<Vector32, 6, 2, Vector32>(by);
}
__attribute__((target("arch=x86-64-v3"))) inline void sum_v3(const Sums& by) {
  sum<Vector32, 4, 3>(by);
}
#endif

#if VLFAST_X86_LEVEL >= 4
__attribute__((target("arch=x86-64-v4"))) inline void score_v4(const Scores& by) {
  score<Vector64, 12, 2, Vector32>(by);
}
__attribute__((target("arch=x86-64-v4"))) inline void sum_v4(const Sums& by) {
  sum<Vector64, 8, 3>(by);
}
#endif

}  // namespace products

// scores = words . queries. Fastest with 32 lanes, and a count that is a multiple of 12.
inline void score_words(const Scores& by) { VLFAST_BEST(products::score)(by); }

// sums += weights^T . words. Fastest with rows in multiples of 8, and words in the L2 cache.
inline void sum_words(const Sums& by) { VLFAST_BEST(products::sum)(by); }

}  // namespace vlfast
