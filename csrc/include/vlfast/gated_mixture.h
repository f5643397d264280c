#pragma once

#include <cstdint>

#include "vlfast/dtype.h"

namespace vlfast {

// For each image, with T the temperature:
//
//   scores       = image_features . gate, of the H hard prompts ("heads")
//   selected     = the top_k heads of the largest scores (ties: the smaller index)
//   g            = softmax of the selected scores
//   teacher_i    = logit_scale * image_features . text_features[i], of each selected head i
//   distillation = T^2 * sum_i g_i KL(softmax(teacher_i / T) || softmax(student_logits / T))
//   selection    = sum_i g_i cross_entropy(teacher_i, label)
//
// and the gradients of the first to student_logits, and of both to the scores. Teachers that are
// not selected are never computed. A row with a value that is not finite gets NaN in what depends
// on it; other rows do not notice. Every result depends on its own row alone, and is the same on
// every run and for every number of threads.
//
// Matrices are row-major and contiguous; the results overlap nothing. Everything but the text
// features and the labels is float, and is computed in float.
struct GatedMixture {
  DType text_dtype;  // kFloat32, kBFloat16 or kFloat16
  std::int64_t images;
  std::int64_t width;
  std::int64_t heads;
  std::int64_t classes;
  std::int64_t top_k;           // from 1 to heads
  const float* image_features;  // [images, width]
  const float* gate;            // [width, heads]
  const void* text_features;    // [heads, classes, width]
  const float* student_logits;  // [images, classes]
  const std::int64_t* labels;   // [images], from 0 to classes - 1
  double logit_scale;
  double temperature;

  float* distillation;  // [images]
  float* selection;     // [images]
  // Null: no gradient is computed.
  float* distillation_to_student;  // [images, classes]
  float* distillation_to_scores;   // [images, heads], 0 where not selected
  float* selection_to_scores;      // [images, heads], likewise
};

// Throws std::invalid_argument for a label out of range.
void gated_mixture_cpu(const GatedMixture& problem, int threads);

}  // namespace vlfast
