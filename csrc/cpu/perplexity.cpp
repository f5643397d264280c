#include "vlfast/perplexity.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "dispatch.h"
#include "products.h"
#include "scalar.h"
#include "widen.h"

namespace vlfast {
namespace {

// Below so many multiplications, waking other threads costs more than it saves.
constexpr std::int64_t kSerialWork = 1 << 20;

// Rows are scored in tiles: their prompts on the first half of the lanes, their hidden states on
// the second.
constexpr std::int64_t kTileRows = 16;

// Tiles that share each block of words while it is in the L2 cache.
constexpr std::int64_t kGroupTiles = 8;

// The vocabulary is cut into as many parts as make about so many tasks of it and the groups of
// rows, however many threads there are: the cuts decide how sums are rounded.
constexpr std::int64_t kTasks = 32;

// Words in a block, in whole tiles of score_words, and floats in one: what the L2 cache holds
// beside the queries.
constexpr std::int64_t kBlockWords = 192;
constexpr std::int64_t kBlockSize = kBlockWords * 512;
constexpr std::int64_t kWordTile = 12;

// Words whose embeddings are gathered at a time.
constexpr std::int64_t kGathered = 64;

constexpr float kNormFloor = 1e-12f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct Candidate {
  float cosine;
  float logit;
  std::int64_t word;
};

// Room for the candidates of a row: surplus ones are dropped many at a time.
std::int64_t list_size(std::int64_t top_k) { return top_k + std::min(top_k, 128 + top_k / 8); }

bool before(const Candidate& a, const Candidate& b) {
  return a.cosine > b.cosine || (a.cosine == b.cosine && a.word < b.word);
}

// The rows of a tile over one part of the vocabulary.
struct Tile {
  float top[kTileRows];        // of the logits
  double sum[kTileRows];       // of exp(logit - top)
  float* expected;             // [rows, width], the sum of exp(logit - top) * embedding; or null
  float threshold[kTileRows];  // later words with a cosine up to this one are not of K
  std::int64_t found[kTileRows];
  Candidate* candidates;  // [rows, list_size], the first `found` of each row
};

// How a problem is cut up.
struct Plan {
  explicit Plan(const Perplexity& problem)
      : tiles(ceil_div(problem.rows, kTileRows)),
        groups(ceil_div(tiles, kGroupTiles)),
        block_words(
            std::clamp(kBlockSize / problem.width / kWordTile * kWordTile, kWordTile, kBlockWords)),
        blocks(ceil_div(problem.words, block_words)),
        parts(std::clamp(ceil_div(kTasks, groups), std::int64_t{1}, blocks)) {}

  std::int64_t tiles;
  std::int64_t groups;
  std::int64_t block_words;
  std::int64_t blocks;
  std::int64_t parts;
};

std::int64_t rows_of_tile(const Perplexity& problem, std::int64_t tile) {
  return std::min(kTileRows, problem.rows - tile * kTileRows);
}

// Few rows get by with half the lanes.
std::int64_t half_lanes(std::int64_t rows) { return rows <= kTileRows / 2 ? 8 : 16; }

VLFAST_DISPATCH void invert_norms(const float* words, std::int64_t count, std::int64_t width,
                                  float* inverse_norms) {
  for (std::int64_t w = 0; w < count; ++w) {
    const float* word = words + w * width;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (std::int64_t d = 0; d < width; ++d) squares += word[d] * word[d];
    const float norm = std::sqrt(squares);
    inverse_norms[w] = 1 / (norm < kNormFloor ? kNormFloor : norm);
  }
}

// The rows of prompts over their norms (0 where the norm is at most the floor), and of hidden.
void pack_tile(const Perplexity& problem, std::int64_t tile, double* norms, float* queries) {
  const std::int64_t rows = rows_of_tile(problem, tile), half = half_lanes(rows);
  const std::int64_t width = problem.width;
  std::fill_n(queries, width * 2 * half, 0.0f);
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* prompt = problem.prompts + (tile * kTileRows + r) * width;
    const float* hidden = problem.hidden + (tile * kTileRows + r) * width;
    double squares = 0;
    for (std::int64_t d = 0; d < width; ++d) squares += static_cast<double>(prompt[d]) * prompt[d];
    const double norm = std::sqrt(squares);
    norms[r] = norm;
    const double inverse = norm <= kNormFloor ? 0 : 1 / norm;
    for (std::int64_t d = 0; d < width; ++d) {
      queries[d * 2 * half + r] = static_cast<float>(prompt[d] * inverse);
      queries[d * 2 * half + half + r] = hidden[d];
    }
  }
}

// A block of words, scored for a tile.
struct Scored {
  const float* scores;         // [count, prompts and hidden]
  const float* inverse_norms;  // [count]
  const bool* vocabulary;      // [count], or null
  std::int64_t first;
  std::int64_t count;
  std::int64_t rows;
  std::int64_t width;
  std::int64_t top_k;
  float* weights;  // [count, half the lanes], exp(logit - top)
};

// Leaves the top_k first candidates of a row, in any order.
void drop_surplus(Tile& tile, std::int64_t row, std::int64_t top_k) {
  if (tile.found[row] < top_k) return;
  Candidate* list = tile.candidates + row * list_size(top_k);
  std::nth_element(list, list + top_k - 1, list + tile.found[row], before);
  tile.found[row] = top_k;
  tile.threshold[row] = list[top_k - 1].cosine;
}

void add_candidate(Tile& tile, std::int64_t row, std::int64_t top_k, Candidate candidate) {
  tile.candidates[row * list_size(top_k) + tile.found[row]++] = candidate;
  if (tile.found[row] == list_size(top_k)) drop_surplus(tile, row, top_k);
}

template <int kHalf>
VLFAST_INLINE void pick_candidates(const Scored& by, Tile& tile) {
  // NaN in a row as soon as a cosine or a logit is not finite, since a comparison may pass it over.
  float poison[kHalf] = {};
  for (std::int64_t w = 0; w < by.count; ++w) {
    if (by.vocabulary && !by.vocabulary[w]) continue;
    const float* cosines = by.scores + w * 2 * kHalf;
    const float scale = by.inverse_norms[w];
    unsigned beaten = 0;
#pragma omp simd reduction(| : beaten)
    for (int r = 0; r < kHalf; ++r) {
      beaten |= cosines[r] * scale > tile.threshold[r] ? 1u << r : 0u;
      poison[r] += (cosines[r] * scale) * 0 + cosines[kHalf + r] * 0;
    }
    for (; beaten; beaten &= beaten - 1) {
      const int r = __builtin_ctz(beaten);
      add_candidate(tile, r, by.top_k, {cosines[r] * scale, cosines[kHalf + r], by.first + w});
    }
  }
  for (std::int64_t r = 0; r < by.rows; ++r) tile.sum[r] += poison[r];
}

template <int kHalf>
VLFAST_INLINE void sum_exponentials(const Scored& by, Tile& tile) {
  float top[kHalf], part[kHalf] = {};
  for (int r = 0; r < kHalf; ++r) top[r] = tile.top[r];
  for (std::int64_t w = 0; w < by.count; ++w) {
    if (by.vocabulary && !by.vocabulary[w]) continue;
    const float* logits = by.scores + w * 2 * kHalf + kHalf;
#pragma omp simd
    for (int r = 0; r < kHalf; ++r) top[r] = top[r] < logits[r] ? logits[r] : top[r];
  }
  for (std::int64_t r = 0; r < by.rows; ++r) {
    if (!(top[r] > tile.top[r])) continue;
    const float factor = exp_negative(tile.top[r] - top[r]);
    tile.top[r] = top[r];
    tile.sum[r] *= factor;
    if (!tile.expected) continue;
    float* expected = tile.expected + r * by.width;
    for (std::int64_t d = 0; d < by.width; ++d) expected[d] *= factor;
  }
  for (std::int64_t w = 0; w < by.count; ++w) {
    const float* logits = by.scores + w * 2 * kHalf + kHalf;
    float* weights = by.weights + w * kHalf;
    if (by.vocabulary && !by.vocabulary[w]) {
      std::fill_n(weights, kHalf, 0.0f);
      continue;
    }
#pragma omp simd
    for (int r = 0; r < kHalf; ++r) {
      const float weight = exp_negative(logits[r] - top[r]);
      weights[r] = weight;
      part[r] += weight;
    }
  }
  for (std::int64_t r = 0; r < by.rows; ++r) tile.sum[r] += part[r];
}

VLFAST_DISPATCH void absorb_few(const Scored& by, Tile& tile) {
  pick_candidates<8>(by, tile);
  sum_exponentials<8>(by, tile);
}

VLFAST_DISPATCH void absorb(const Scored& by, Tile& tile) {
  pick_candidates<16>(by, tile);
  sum_exponentials<16>(by, tile);
}

// What one thread needs for itself, kept between calls: fresh blocks of this size would be paged
// in anew each time.
struct Scratch {
  std::vector<float> words;
  std::vector<float> inverse_norms = std::vector<float>(kBlockWords);
  std::vector<float> scores = std::vector<float>(kBlockWords * 2 * kTileRows);
  std::vector<float> weights = std::vector<float>(kBlockWords * kTileRows);
};

// The tiles [first_tile, last_tile) over one part of the vocabulary.
template <typename T>
void read_part(const Perplexity& problem, const Plan& plan, std::int64_t part,
               std::int64_t first_tile, std::int64_t last_tile, const float* queries, Tile* tiles) {
  thread_local Scratch scratch;
  const std::int64_t width = problem.width;
  const auto* embedding = static_cast<const T*>(problem.embedding);
  const std::int64_t end =
      std::min((part + 1) * plan.blocks / plan.parts * plan.block_words, problem.words);
  for (std::int64_t first = part * plan.blocks / plan.parts * plan.block_words; first < end;
       first += plan.block_words) {
    const std::int64_t count = std::min(plan.block_words, end - first);
    const float* words = in_float(embedding + first * width, count * width, scratch.words);
    for (std::int64_t t = first_tile; t < last_tile; ++t) {
      Scored block{};
      block.first = first;
      block.count = count;
      block.rows = rows_of_tile(problem, t);
      block.width = width;
      block.top_k = problem.top_k;
      block.scores = scratch.scores.data();
      block.weights = scratch.weights.data();
      block.vocabulary = problem.vocabulary ? problem.vocabulary + first : nullptr;
      const std::int64_t half = half_lanes(block.rows);
      score_words({queries + t * width * 2 * kTileRows, 2 * half, words, count, width,
                   scratch.scores.data()});
      if (problem.inverse_norms) {
        block.inverse_norms = problem.inverse_norms + first;
      } else {
        // After the first product, which has fetched the words.
        if (t == first_tile) invert_norms(words, count, width, scratch.inverse_norms.data());
        block.inverse_norms = scratch.inverse_norms.data();
      }
      Tile& tile = tiles[t];
      half == kTileRows ? absorb(block, tile) : absorb_few(block, tile);
      if (tile.expected)
        sum_words({block.weights, half, block.rows, words, count, width, tile.expected});
    }
  }
}

// The four gradients of a row are sums over its words, each with weights of its own, and more.
enum Gradient { kPerplexityToHidden, kInvertedToPrompts, kPerplexityToPrompts, kInvertedToHidden };
constexpr std::int64_t kGradients = 4;

struct Outputs {
  float* gradients[kGradients];  // [width] each, or null
};

Outputs outputs_of_row(const Perplexity& problem, std::int64_t row) {
  Outputs outputs{{problem.perplexity_to_hidden, problem.inverted_to_prompts,
                   problem.perplexity_to_prompts, problem.inverted_to_hidden}};
  for (float*& gradient : outputs.gradients)
    if (gradient) gradient += row * problem.width;
  return outputs;
}

void fill_row(const Perplexity& problem, std::int64_t row, float value) {
  problem.perplexity[row] = problem.inverted[row] = value;
  for (float* gradient : outputs_of_row(problem, row).gradients)
    if (gradient) std::fill_n(gradient, problem.width, value);
}

// A softmax over K, and its logarithm.
struct Softmax {
  std::vector<double> p;
  std::vector<double> log_p;

  // Of log_p as it is.
  void normalise() {
    const double top = *std::max_element(log_p.begin(), log_p.end());
    double sum = 0;
    for (double x : log_p) sum += std::exp(x - top);
    const double log_sum = top + std::log(sum);
    p.resize(log_p.size());
    for (std::size_t j = 0; j < p.size(); ++j) p[j] = std::exp(log_p[j] -= log_sum);
  }
};

// As the block that the word was read in had it.
template <typename T>
float inverse_norm(const Perplexity& problem, std::int64_t word) {
  if (problem.inverse_norms) return problem.inverse_norms[word];
  thread_local std::vector<float> widened;
  const auto* embedding = static_cast<const T*>(problem.embedding);
  float result;
  invert_norms(in_float(embedding + word * problem.width, problem.width, widened), 1, problem.width,
               &result);
  return result;
}

// The sums over the words of K of each gradient's weight times the embedding: [kGradients, width].
template <typename T>
void sum_embeddings(const Perplexity& problem, const std::vector<Candidate>& words,
                    const std::vector<float>& weights, std::vector<float>& sums) {
  thread_local std::vector<float> gathered, widened;
  const std::int64_t width = problem.width, total = words.size();
  const auto* embedding = static_cast<const T*>(problem.embedding);
  gathered.resize(kGathered * width);
  sums.assign(kGradients * width, 0.0f);
  for (std::int64_t begin = 0; begin < total; begin += kGathered) {
    const std::int64_t count = std::min(kGathered, total - begin);
    for (std::int64_t j = 0; j < count; ++j) {
      const float* word = in_float(embedding + words[begin + j].word * width, width, widened);
      std::copy_n(word, width, gathered.data() + j * width);
    }
    sum_words({weights.data() + begin * kGradients, kGradients, kGradients, gathered.data(), count,
               width, sums.data()});
  }
}

template <typename T>
void finish_row(const Perplexity& problem, const Plan& plan, std::int64_t row, double norm,
                const Tile* tiles) {
  const std::int64_t width = problem.width, r = row % kTileRows;
  const auto tile_of_part = [&](std::int64_t part) -> const Tile& {
    return tiles[part * plan.tiles + row / kTileRows];
  };

  float top = -kInfinity;
  for (std::int64_t p = 0; p < plan.parts; ++p) top = std::max(top, tile_of_part(p).top[r]);
  double sum = 0;
  thread_local std::vector<double> shares;
  shares.resize(plan.parts);
  thread_local std::vector<Candidate> words;
  words.clear();
  for (std::int64_t p = 0; p < plan.parts; ++p) {
    const Tile& tile = tile_of_part(p);
    shares[p] = tile.top[r] == top ? 1 : std::exp(static_cast<double>(tile.top[r]) - top);
    sum += tile.sum[r] * shares[p];
    const Candidate* list = tile.candidates + r * list_size(problem.top_k);
    words.insert(words.end(), list, list + tile.found[r]);
  }
  const std::int64_t k = std::min<std::int64_t>(problem.top_k, words.size());
  std::partial_sort(words.begin(), words.begin() + k, words.end(), before);
  words.resize(k);
  if (k == 0 || !std::isfinite(sum))
    return fill_row(problem, row, std::numeric_limits<float>::quiet_NaN());

  const double temperature = problem.temperature_factor;
  const double log_normaliser = top + std::log(sum);
  thread_local Softmax labels, renormalised;
  labels.log_p.resize(k);
  renormalised.log_p.resize(k);
  for (std::int64_t j = 0; j < k; ++j) {
    labels.log_p[j] = words[j].cosine / temperature;
    renormalised.log_p[j] = words[j].logit;
  }
  labels.normalise();
  renormalised.normalise();
  const std::vector<double>&y = labels.p, &q = renormalised.p, &log_y = labels.log_p;
  double perplexity = 0, inverted = 0;
  for (std::int64_t j = 0; j < k; ++j) {
    perplexity -= y[j] * (words[j].logit - log_normaliser);
    inverted -= q[j] * log_y[j];
  }
  if (!std::isfinite(perplexity) || !std::isfinite(inverted))
    return fill_row(problem, row, std::numeric_limits<float>::quiet_NaN());
  problem.perplexity[row] = static_cast<float>(perplexity);
  problem.inverted[row] = static_cast<float>(inverted);

  const Outputs outputs = outputs_of_row(problem, row);
  if (std::all_of(outputs.gradients, outputs.gradients + kGradients,
                  [](const float* gradient) { return !gradient; }))
    return;
  thread_local std::vector<float> weights, sums;
  weights.resize(k * kGradients);
  for (std::int64_t j = 0; j < k; ++j) {
    const double log_p = words[j].logit - log_normaliser;
    const double to_prompts = inverse_norm<T>(problem, words[j].word) / temperature;
    float* weight = &weights[j * kGradients];
    weight[kPerplexityToHidden] = static_cast<float>(-y[j]);
    weight[kInvertedToPrompts] = static_cast<float>((y[j] - q[j]) * to_prompts);
    weight[kPerplexityToPrompts] = static_cast<float>(-y[j] * (log_p + perplexity) * to_prompts);
    weight[kInvertedToHidden] = static_cast<float>(-q[j] * (log_y[j] + inverted));
  }
  sum_embeddings<T>(problem, words, weights, sums);

  if (float* gradient = outputs.gradients[kPerplexityToHidden]) {
    std::copy_n(&sums[kPerplexityToHidden * width], width, gradient);
    for (std::int64_t p = 0; p < plan.parts; ++p) {
      const float* expected = tile_of_part(p).expected + r * width;
      const float share = static_cast<float>(shares[p] / sum);
      for (std::int64_t d = 0; d < width; ++d) gradient[d] += share * expected[d];
    }
  }
  if (float* gradient = outputs.gradients[kInvertedToHidden])
    std::copy_n(&sums[kInvertedToHidden * width], width, gradient);
  const float* prompt = problem.prompts + row * width;
  for (const Gradient which : {kInvertedToPrompts, kPerplexityToPrompts}) {
    float* gradient = outputs.gradients[which];
    if (!gradient) continue;
    // Through the norm of the prompt: what is along the prompt itself is taken out.
    const float* of_unit = &sums[which * width];
    double along = 0;
    for (std::int64_t d = 0; d < width; ++d) along += static_cast<double>(of_unit[d]) * prompt[d];
    const bool is_zero = norm <= kNormFloor;
    for (std::int64_t d = 0; d < width; ++d)
      gradient[d] =
          is_zero ? 0.0f
                  : static_cast<float>((of_unit[d] - prompt[d] * (along / norm / norm)) / norm);
  }
}

// Memory that is not written before it is used.
template <typename X>
std::unique_ptr<X[]> uninitialised(std::int64_t size) {
  return std::unique_ptr<X[]>(new X[size]);
}

template <typename T>
void solve(const Perplexity& problem, int threads) {
  const Plan plan(problem);
  const std::int64_t rows = problem.rows, width = problem.width, tasks = plan.groups * plan.parts;
  const auto queries = uninitialised<float>(plan.tiles * width * 2 * kTileRows);
  const auto norms = uninitialised<double>(rows);
  const auto candidates = uninitialised<Candidate>(plan.parts * rows * list_size(problem.top_k));
  const auto expected =
      uninitialised<float>(problem.perplexity_to_hidden ? plan.parts * rows * width : 0);
  const auto tiles = uninitialised<Tile>(plan.parts * plan.tiles);
  if (rows * problem.words * width < kSerialWork) threads = 1;
  threads = static_cast<int>(std::clamp<std::int64_t>(threads, 1, std::max(tasks, rows)));

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (std::int64_t t = 0; t < plan.tiles; ++t)
      pack_tile(problem, t, &norms[t * kTileRows], &queries[t * width * 2 * kTileRows]);

    std::int64_t task_before = -1;
#pragma omp for schedule(dynamic)
    for (std::int64_t task = 0; task < tasks; ++task) {
      const std::int64_t group = task / plan.parts, part = task % plan.parts;
      const std::int64_t first_tile = group * kGroupTiles;
      const std::int64_t last_tile = std::min(first_tile + kGroupTiles, plan.tiles);
      // The k-th largest of earlier words bounds that of all: it spares candidates, and changes
      // nothing in the result.
      const bool has_bound = task_before >= group * plan.parts && task_before < task;
      for (std::int64_t t = first_tile; t < last_tile; ++t) {
        const std::int64_t first_row = part * rows + t * kTileRows;
        Tile& tile = tiles[part * plan.tiles + t];
        tile.candidates = &candidates[first_row * list_size(problem.top_k)];
        tile.expected = problem.perplexity_to_hidden ? &expected[first_row * width] : nullptr;
        const std::int64_t tile_rows = rows_of_tile(problem, t);
        if (tile.expected) std::fill_n(tile.expected, tile_rows * width, 0.0f);
        for (std::int64_t r = 0; r < kTileRows; ++r) {
          tile.top[r] = -kInfinity;
          tile.sum[r] = 0;
          tile.found[r] = 0;
          tile.threshold[r] = r < tile_rows ? -kInfinity : kInfinity;
          if (has_bound)
            tile.threshold[r] = tiles[task_before % plan.parts * plan.tiles + t].threshold[r];
        }
      }
      read_part<T>(problem, plan, part, first_tile, last_tile, queries.get(),
                   &tiles[part * plan.tiles]);
      for (std::int64_t t = first_tile; t < last_tile; ++t) {
        for (std::int64_t r = 0; r < rows_of_tile(problem, t); ++r)
          drop_surplus(tiles[part * plan.tiles + t], r, problem.top_k);
      }
      task_before = task;
    }

#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < rows; ++row)
      finish_row<T>(problem, plan, row, norms[row], tiles.get());
  }
}

}  // namespace

void perplexity_cpu(const Perplexity& problem, int threads) {
  if (problem.rows == 0) return;
  if (problem.vocabulary && std::none_of(problem.vocabulary, problem.vocabulary + problem.words,
                                         [](bool x) { return x; })) {
    for (std::int64_t row = 0; row < problem.rows; ++row) fill_row(problem, row, 0);
    return;
  }
  switch (problem.embedding_dtype) {
    case DType::kFloat32:
      return solve<float>(problem, threads);
    case DType::kBFloat16:
      return solve<BFloat16>(problem, threads);
    case DType::kFloat16:
      return solve<Float16>(problem, threads);
    case DType::kFloat64:
      throw std::invalid_argument("embedding: the kernel is not for float64");
  }
}

}  // namespace vlfast
