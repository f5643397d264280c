#pragma once

#include <cstddef>
#include <cstdint>

#include "vlfast/dtype.h"

namespace vlfast {

// For each row, over the words w that count, with E the embedding and norms clamped at 1e-12:
//
//   cosine_w = prompts . E_w / (|prompts| |E_w|)
//   K        = the top_k words of the largest cosines (ties: the smaller index)
//   y        = softmax over K of cosine / temperature
//   log p_w  = hidden . E_w - logsumexp over all counted words of hidden . E
//   q        = p renormalised over K
//   perplexity = - sum over K of y_w log p_w
//   inverted   = - sum over K of q_w log y_w
//
// and the gradients of both to prompts and hidden. With detach_targets, y is constant in the first
// and q in the second. If fewer than top_k words count, K is all that do. A row with a value that
// is not finite gets NaN in all its results; other rows do not notice. A word that counts and is
// not finite, or whose norm is not, reaches every row. Every result is the same on every run and
// for every number of threads; the number of rows decides how sums are rounded.
//
// Matrices are row-major and contiguous; the results overlap nothing. Everything but the embedding
// is float, and is computed in float.
struct Perplexity {
  DType embedding_dtype;  // kFloat32, kBFloat16 or kFloat16
  std::int64_t rows;
  std::int64_t words;
  std::int64_t width;
  std::int64_t top_k;      // from 1 to words
  const float* prompts;    // [rows, width]
  const float* hidden;     // [rows, width]
  const void* embedding;   // [words, width]
  const bool* vocabulary;  // [words], the words that count; null: all
  // [words], 1 / the norms of the embedding. Null: they are computed as it is read.
  const float* inverse_norms;

  // The temperature: the factor times, where the pointer is not null, the value that it points to
  // (CUDA only: on the CPU the factor is the temperature).
  double temperature_factor;
  const float* temperature;
  bool detach_targets;

  float* perplexity;  // [rows]
  float* inverted;    // [rows]
  // [rows, width] each. Null: that gradient is not wanted. With detach_targets the last two are 0,
  // and null.
  float* perplexity_to_hidden;
  float* inverted_to_prompts;
  float* perplexity_to_prompts;
  float* inverted_to_hidden;
};

void perplexity_cpu(const Perplexity& problem, int threads);

// The bytes of device memory that perplexity_cuda needs as its workspace, aligned to 256; 0 for a
// problem that it does not serve. It serves up to 64 rows, a top_k up to 64, widths up to 1024 that
// are multiples of 64, and prompts, hidden and embedding aligned to 16 bytes, where the shared
// memory of the current device suffices.
std::size_t perplexity_cuda_workspace(const Perplexity& problem);

// Enqueues its kernels on the stream (a cudaStream_t) of the current device and does not wait.
// The pointers are of that device. Throws std::runtime_error where a launch fails.
void perplexity_cuda(const Perplexity& problem, void* workspace, void* stream);

}  // namespace vlfast
