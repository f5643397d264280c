#include "vlfast/gated_mixture.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "products.h"
#include "scalar.h"
#include "scratch.h"
#include "vlfast/kl_terms.h"
#include "widen.h"

namespace vlfast {
namespace {

// Below so many teacher logits, waking other threads costs more than it saves.
constexpr std::int64_t kSerialLogits = 4096;

// The images are taken in chunks of so many teacher logits (16 MiB), and of so many images: packed
// for a product, they stay in the L2 cache.
constexpr std::int64_t kChunkLogits = 1 << 22;
constexpr std::int64_t kChunkImages = 256;

// What threads share out: blocks of so many of a head's classes, and of images in the gate. Both
// are words to a product, and multiples of its tile.
constexpr std::int64_t kClassBlock = 96;
constexpr std::int64_t kImageBlock = 24;

// Sums over the classes are taken over blocks of so many, then over the blocks: the rounding errors
// of a long row stay those of a short one.
constexpr std::int64_t kSumBlock = 512;

void check_labels(const GatedMixture& problem) {
  for (std::int64_t b = 0; b < problem.images; ++b) {
    const std::int64_t label = problem.labels[b];
    if (label < 0 || label >= problem.classes) {
      throw std::invalid_argument("labels: expected values from 0 to " +
                                  std::to_string(problem.classes - 1) + ", got " +
                                  std::to_string(label));
    }
  }
}

// The heads of the largest scores, largest first, and the softmax of those scores. If a score is
// not finite, the weights are NaN.
void select(const float* scores, std::int64_t heads, std::int64_t top_k, std::int64_t* selected,
            float* weights) {
  thread_local std::vector<std::int64_t> order;
  order.resize(heads);
  std::iota(order.begin(), order.end(), 0);
  const bool finite = std::all_of(scores, scores + heads, [](float x) { return std::isfinite(x); });
  if (finite) {
    std::partial_sort(order.begin(), order.begin() + top_k, order.end(),
                      [scores](std::int64_t a, std::int64_t b) {
                        return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
                      });
  }
  std::copy_n(order.begin(), top_k, selected);
  float sum = finite ? 0 : std::numeric_limits<float>::quiet_NaN();
  for (std::int64_t i = 0; i < top_k; ++i) {
    weights[i] = std::exp(scores[selected[i]] - scores[selected[0]]);
    sum += weights[i];
  }
  for (std::int64_t i = 0; i < top_k; ++i) weights[i] /= sum;
}

// The largest logit; NaN if one is not finite.
VLFAST_INLINE float top_logit(const float* logits, std::int64_t classes) {
  float largest = -std::numeric_limits<float>::infinity();
  float zero = 0;
#pragma omp simd reduction(max : largest) reduction(+ : zero)
  for (std::int64_t c = 0; c < classes; ++c) {
    // Not std::max, whose references keep gcc from vectorising the loop.
    largest = largest < logits[c] ? logits[c] : largest;
    zero += logits[c] * 0;
  }
  return largest + zero;
}

// The sum of exp(scale * (logit - top)) over the classes, each of them kept in `exps` on request.
template <bool kKeep>
VLFAST_INLINE float exp_sum(const float* __restrict logits, float top, float scale,
                            std::int64_t classes, float* __restrict exps) {
  float sum = 0;
  for (std::int64_t begin = 0; begin < classes; begin += kSumBlock) {
    const std::int64_t end = std::min(begin + kSumBlock, classes);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (std::int64_t c = begin; c < end; ++c) {
      const float value = exp_negative((logits[c] - top) * scale);
      if (kKeep) exps[c] = value;
      part += value;
    }
    sum += part;
  }
  return sum;
}

struct Distribution {
  const float* logits;
  const float* exps;
  float top;
  float sum;  // of the exps
};

// KL(teacher || student) at the temperature 1 / scale. Adds weight * (q - p) to the gradient, if
// there is one.
template <bool kGradient>
VLFAST_INLINE float divergence(Distribution teacher, Distribution student, float scale,
                               float weight, std::int64_t classes, float* __restrict gradient) {
  const float* __restrict teacher_logits = teacher.logits;
  const float* __restrict student_logits = student.logits;
  const float* __restrict teacher_exps = teacher.exps;
  const float* __restrict student_exps = student.exps;
  const float to_p = 1 / teacher.sum, to_q = 1 / student.sum;
  const float log_ratio = std::log(student.sum / teacher.sum);
  const float top_gap = teacher.top - student.top;
  float sum = 0;
  for (std::int64_t begin = 0; begin < classes; begin += kSumBlock) {
    const std::int64_t end = std::min(begin + kSumBlock, classes);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (std::int64_t c = begin; c < end; ++c) {
      const float gap = (teacher_logits[c] - student_logits[c]) - top_gap;
      const KLTerms<float> terms =
          kl_terms(teacher_exps[c] * to_p, student_exps[c] * to_q, gap * scale + log_ratio);
      part += terms.forward;
      if (kGradient) gradient[c] += weight * terms.difference;
    }
    sum += part;
  }
  return sum;
}

struct Image {
  const float* student;   // [classes]
  const float* teachers;  // [top_k, classes]
  const float* weights;   // [top_k]
  std::int64_t label;
  float* student_exps;     // [classes], scratch
  float* teacher_exps;     // [classes], scratch
  float* to_student;       // [classes], or null
  float* divergences;      // [top_k], of each teacher
  float* cross_entropies;  // [top_k]
};

template <bool kGradient>
VLFAST_INLINE void solve(Image image, std::int64_t classes, std::int64_t top_k, float temperature) {
  const float scale = 1 / temperature;
  Distribution student{image.student, image.student_exps, 0, 0};
  student.top = top_logit(student.logits, classes);
  student.sum = exp_sum<true>(student.logits, student.top, scale, classes, image.student_exps);
  if (kGradient) std::fill_n(image.to_student, classes, 0.0f);
  for (std::int64_t i = 0; i < top_k; ++i) {
    Distribution teacher{image.teachers + i * classes, image.teacher_exps, 0, 0};
    teacher.top = top_logit(teacher.logits, classes);
    teacher.sum = exp_sum<true>(teacher.logits, teacher.top, scale, classes, image.teacher_exps);
    const float sum_at_1 =
        scale == 1 ? teacher.sum : exp_sum<false>(teacher.logits, teacher.top, 1, classes, nullptr);
    image.divergences[i] = divergence<kGradient>(
        teacher, student, scale, temperature * image.weights[i], classes, image.to_student);
    image.cross_entropies[i] = std::log(sum_at_1) - (teacher.logits[image.label] - teacher.top);
  }
}

VLFAST_DISPATCH void solve_image(Image image, std::int64_t classes, std::int64_t top_k,
                                 float temperature) {
  if (image.to_student) {
    solve<true>(image, classes, top_k, temperature);
  } else {
    solve<false>(image, classes, top_k, temperature);
  }
}

// sum_i g_i values_i, and its gradient through the softmax of the selected scores. It is taken from
// the values less the first one, so that it is 0 where they all are the same.
float mix(const float* values, const float* weights, const std::int64_t* selected,
          std::int64_t top_k, float* to_scores) {
  float sum = 0, mean_gap = 0;
  for (std::int64_t i = 0; i < top_k; ++i) {
    sum += weights[i] * values[i];
    mean_gap += weights[i] * (values[i] - values[0]);
  }
  for (std::int64_t i = 0; to_scores && i < top_k; ++i)
    to_scores[selected[i]] = weights[i] * ((values[i] - values[0]) - mean_gap);
  return sum;
}

// The images of a chunk that a head was selected for.
struct Group {
  std::int64_t head;
  std::vector<const float*> images;  // [width] each
  std::vector<float*> teachers;      // [classes] each, where their logits of the head belong
  std::int64_t lanes;
  std::int64_t offset;  // of the packed images
};

std::vector<Group> group_by_head(const GatedMixture& problem, const std::int64_t* selected,
                                 std::int64_t begin, std::int64_t end, float* teachers) {
  std::vector<Group> groups(problem.heads);
  for (std::int64_t b = begin; b < end; ++b) {
    for (std::int64_t i = 0; i < problem.top_k; ++i, teachers += problem.classes) {
      Group& group = groups[selected[b * problem.top_k + i]];
      group.images.push_back(problem.image_features + b * problem.width);
      group.teachers.push_back(teachers);
    }
  }
  std::int64_t offset = 0;
  for (std::int64_t h = 0; h < problem.heads; ++h) {
    Group& group = groups[h];
    const std::int64_t images = group.images.size();
    group.head = h;
    group.lanes = round_up(images, kLanes);
    group.offset = offset;
    offset += group.lanes * problem.width;
  }
  const auto unused = [](const Group& group) { return group.images.empty(); };
  groups.erase(std::remove_if(groups.begin(), groups.end(), unused), groups.end());
  return groups;
}

void pack(const Group& group, std::int64_t width, float* packed) {
  const std::int64_t images = group.images.size();
  for (std::int64_t w = 0; w < width; ++w) {
    float* lanes = packed + w * group.lanes;
    for (std::int64_t i = 0; i < images; ++i) lanes[i] = group.images[i][w];
    std::fill(lanes + images, lanes + group.lanes, 0.0f);
  }
}

// `count` of the text features from `begin` on, in fp32.
const float* texts_in_float(const GatedMixture& problem, std::int64_t begin, std::int64_t count,
                            std::vector<float>& scratch) {
  if (problem.text_dtype == DType::kBFloat16)
    return in_float(static_cast<const BFloat16*>(problem.text_features) + begin, count, scratch);
  if (problem.text_dtype == DType::kFloat16)
    return in_float(static_cast<const Float16*>(problem.text_features) + begin, count, scratch);
  return static_cast<const float*>(problem.text_features) + begin;
}

VLFAST_DISPATCH void scatter(const float* scores, std::int64_t lanes, std::int64_t count,
                             float scale, const std::vector<float*>& teachers, std::int64_t begin) {
  for (std::size_t i = 0; i < teachers.size(); ++i) {
    float* __restrict to = teachers[i] + begin;
    for (std::int64_t c = 0; c < count; ++c) to[c] = scale * scores[c * lanes + i];
  }
}

// The logits of a head's images for the classes from `begin` to `end`.
void teacher_logits(const GatedMixture& problem, const Group& group, const float* packed,
                    std::int64_t begin, std::int64_t end) {
  thread_local std::vector<float> text, scores;
  const std::int64_t width = problem.width, count = end - begin;
  const float* words =
      texts_in_float(problem, (group.head * problem.classes + begin) * width, count * width, text);
  float* const results = at_least(scores, count * group.lanes);
  score_words({packed + group.offset, group.lanes, words, count, width, results});
  scatter(results, group.lanes, count, static_cast<float>(problem.logit_scale), group.teachers,
          begin);
}

}  // namespace

void gated_mixture_cpu(const GatedMixture& problem, int threads) {
  if (problem.images == 0) return;
  check_labels(problem);
  const std::int64_t images = problem.images, width = problem.width, heads = problem.heads;
  const std::int64_t classes = problem.classes, top_k = problem.top_k;
  const float temperature = static_cast<float>(problem.temperature);
  if (images * top_k * classes < kSerialLogits) threads = 1;
  threads = std::max(threads, 1);

  // Scratch is kept between calls: fresh blocks of this size would be paged in anew each time.
  thread_local std::vector<float> gate_kept, scores_kept, packed_kept, teachers_kept;
  const std::int64_t gate_lanes = round_up(heads, kLanes);
  float* const gate = at_least(gate_kept, width * gate_lanes);
  for (std::int64_t w = 0; w < width; ++w) {
    std::copy_n(problem.gate + w * heads, heads, gate + w * gate_lanes);
    std::fill_n(gate + w * gate_lanes + heads, gate_lanes - heads, 0.0f);
  }
  float* const scores = at_least(scores_kept, images * gate_lanes);
  std::vector<std::int64_t> selected(images * top_k);
  std::vector<float> weights(images * top_k);
  const std::int64_t image_blocks = round_up(images, kImageBlock) / kImageBlock;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (std::int64_t block = 0; block < image_blocks; ++block) {
    const std::int64_t begin = block * kImageBlock, end = std::min(begin + kImageBlock, images);
    score_words({gate, gate_lanes, problem.image_features + begin * width, end - begin, width,
                 scores + begin * gate_lanes});
    for (std::int64_t b = begin; b < end; ++b)
      select(scores + b * gate_lanes, heads, top_k, &selected[b * top_k], &weights[b * top_k]);
  }

  const std::int64_t chunk =
      std::clamp<std::int64_t>(kChunkLogits / (top_k * classes), 1, std::min(images, kChunkImages));
  float* const teachers = at_least(teachers_kept, chunk * top_k * classes);
  float* const packed = at_least(packed_kept, (chunk * top_k + heads * (kLanes - 1)) * width);
  const std::int64_t blocks = round_up(classes, kClassBlock) / kClassBlock;
  for (std::int64_t begin = 0; begin < images; begin += chunk) {
    const std::int64_t end = std::min(begin + chunk, images);
    const std::vector<Group> groups = group_by_head(problem, selected.data(), begin, end, teachers);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (std::size_t g = 0; g < groups.size(); ++g)
      pack(groups[g], width, packed + groups[g].offset);
    const std::int64_t products = static_cast<std::int64_t>(groups.size()) * blocks;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (std::int64_t p = 0; p < products; ++p) {
      const std::int64_t first = p % blocks * kClassBlock;
      teacher_logits(problem, groups[p / blocks], packed, first,
                     std::min(first + kClassBlock, classes));
    }

#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (std::int64_t b = begin; b < end; ++b) {
      thread_local std::vector<float> scratch;
      float* const rows = at_least(scratch, 2 * (classes + top_k));
      Image image{};
      image.student = problem.student_logits + b * classes;
      image.teachers = teachers + (b - begin) * top_k * classes;
      image.weights = &weights[b * top_k];
      image.label = problem.labels[b];
      image.student_exps = rows;
      image.teacher_exps = rows + classes;
      image.divergences = rows + 2 * classes;
      image.cross_entropies = rows + 2 * classes + top_k;
      float* to_scores[2] = {};
      if (problem.distillation_to_student) {
        image.to_student = problem.distillation_to_student + b * classes;
        to_scores[0] = problem.distillation_to_scores + b * heads;
        to_scores[1] = problem.selection_to_scores + b * heads;
        for (float* row : to_scores) std::fill_n(row, heads, 0.0f);
      }
      solve_image(image, classes, top_k, temperature);
      for (std::int64_t i = 0; i < top_k; ++i) image.divergences[i] *= temperature * temperature;
      problem.distillation[b] =
          mix(image.divergences, image.weights, &selected[b * top_k], top_k, to_scores[0]);
      problem.selection[b] =
          mix(image.cross_entropies, image.weights, &selected[b * top_k], top_k, to_scores[1]);
    }
  }
}

}  // namespace vlfast
