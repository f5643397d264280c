#pragma once

#include <cstdint>

#include "vlfast/dtype.h"

namespace vlfast {

// Causal attention of packed runs, each with a prefix before it that it shares with others:
//
//   output_i = sum_j softmax_j(scale * query_i . key_j) value_j, in each head by itself,
//
// j being the rows of the prefix of row i, all of them, and those of its run up to i. The first
// `prefixes` runs are the prefixes, and have none themselves. The others are divided among them
// evenly, in order; without prefixes they stand alone.
//
// A row with a value that is not finite reaches the rows that see it, and their gradients; others
// do not notice. Results are the same on every run and for every number of threads: the gradient of
// a prefix is summed over parts of its runs that depend on the problem alone, in one order.
//
// Tensors are row-major and contiguous; the results overlap nothing. Sums are taken in float.
struct PrefixAttention {
  DType dtype;  // of qkv, the output and the gradients: kFloat32, kBFloat16 or kFloat16
  std::int64_t rows;
  std::int64_t heads;
  std::int64_t width;
  std::int64_t runs;
  std::int64_t prefixes;
  const void* qkv;              // [rows, 3, heads, width]
  const std::int32_t* offsets;  // [runs + 1], run r is the rows offsets[r] to offsets[r + 1]
  double scale;
};

struct PrefixAttentionResults {
  void* output;           // [rows, heads, width]
  float* log_normaliser;  // [rows, heads], log of the sum of exp(scale * query . key)
};

struct PrefixAttentionGradients {
  const void* to_output;  // [rows, heads, width]
  void* to_qkv;           // [rows, 3, heads, width], all of it written
};

// Both throw std::invalid_argument for offsets that are no runs of these rows.
void prefix_attention_cpu(const PrefixAttention& problem, const PrefixAttentionResults& results,
                          int threads);

// The weights are computed anew, which is more exact than from the output and its normaliser.
void prefix_attention_backward_cpu(const PrefixAttention& problem,
                                   const PrefixAttentionGradients& gradients, int threads);

}  // namespace vlfast
