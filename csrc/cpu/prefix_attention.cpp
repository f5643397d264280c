#include "vlfast/prefix_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "causal_products.h"
#include "dispatch.h"
#include "scalar.h"
#include "scratch.h"

namespace vlfast {
namespace {

// Below so many multiplications of queries with keys, waking other threads costs more than it
// saves.
constexpr std::int64_t kSerialProducts = 1 << 20;

// What threads share out, in each head: whole runs of at least so many rows together, which stay in
// the L2 cache, and of so many times the rows of their prefix, since each has a sum of its own for
// the gradient of that.
constexpr std::int64_t kChunkRows = 128;
constexpr std::int64_t kChunkPrefixes = 4;

// Rows whose scores are held at a time, in the L1 cache.
constexpr std::int64_t kGroupRows = 32;

// Rows of scores are padded to a multiple of so many.
constexpr std::int64_t kScoreStep = 16;

// Rows of one run, which begins at `start`.
struct Segment {
  std::int64_t begin, end;
  std::int64_t start;
};

// Consecutive rows, and the segments that they are.
struct Group {
  std::int64_t begin, end;
  std::int64_t first_segment, end_segment;
};

// Consecutive runs with the same prefix, in groups.
struct Chunk {
  std::int64_t begin, end;
  std::int64_t prefix_begin, prefix_end;
  std::int64_t first_group, end_group;
  bool is_prefix;
  std::int64_t partial;  // where its part of the prefix's gradient begins, in each head's
};

struct Plan {
  std::vector<Chunk> chunks;
  std::vector<Group> groups;
  std::vector<Segment> segments;
  std::vector<std::int64_t> first_chunk;  // [prefixes + 1]: of the parts of a prefix's gradient
  std::int64_t partials = 0;              // floats of all parts, in each head
  std::int64_t pairs = 0;                 // of a query and a key, in each head
  std::int64_t width = 0;                 // padded
  std::int64_t scores = 0;                // floats that the scores of a group take
  std::int64_t chunk_rows = 0, prefix_rows = 0;  // at most
};

void check_offsets(const PrefixAttention& problem) {
  const std::int32_t* offsets = problem.offsets;
  const std::int64_t runs = problem.runs, prefixes = problem.prefixes;
  const bool divided = prefixes == 0 || (prefixes > 0 && prefixes <= runs && runs % prefixes == 0);
  if (runs < 0 || !divided || offsets[0] != 0 || offsets[runs] != problem.rows ||
      !std::is_sorted(offsets, offsets + runs + 1))
    throw std::invalid_argument("offsets: expected prefixes and runs that make up the rows of qkv");
}

// The runs from `run` to `end_run` as one chunk.
void add_chunk(const PrefixAttention& problem, Plan& plan, std::int64_t run, std::int64_t end_run,
               std::int64_t prefix) {
  const std::int32_t* offsets = problem.offsets;
  Chunk chunk{};
  chunk.begin = offsets[run];
  chunk.end = offsets[end_run];
  chunk.is_prefix = run < problem.prefixes;
  if (prefix >= 0 && !chunk.is_prefix) {
    chunk.prefix_begin = offsets[prefix];
    chunk.prefix_end = offsets[prefix + 1];
  }
  const std::int64_t prefix_rows = chunk.prefix_end - chunk.prefix_begin;
  const std::int64_t summed = chunk.is_prefix ? chunk.end - chunk.begin : prefix_rows;
  chunk.partial = plan.partials;
  plan.partials += 2 * summed * plan.width;
  chunk.first_group = plan.groups.size();
  for (std::int64_t begin = chunk.begin; begin < chunk.end; begin += kGroupRows) {
    Group group{begin, std::min(begin + kGroupRows, chunk.end), 0, 0};
    group.first_segment = plan.segments.size();
    std::int64_t keys = 0;
    for (std::int64_t row = begin; row < group.end;) {
      while (offsets[run + 1] <= row) ++run;
      const std::int64_t end = std::min<std::int64_t>(offsets[run + 1], group.end);
      plan.segments.push_back({row, end, offsets[run]});
      keys = std::max(keys, end - offsets[run]);
      plan.pairs += (end - row) * (prefix_rows + end - offsets[run]);
      row = end;
    }
    group.end_segment = plan.segments.size();
    plan.groups.push_back(group);
    plan.scores =
        std::max(plan.scores, (group.end - begin) * round_up(prefix_rows + keys, kScoreStep));
  }
  chunk.end_group = plan.groups.size();
  plan.chunk_rows = std::max(plan.chunk_rows, chunk.end - chunk.begin);
  plan.prefix_rows = std::max(plan.prefix_rows, prefix_rows);
  plan.chunks.push_back(chunk);
}

Plan plan(const PrefixAttention& problem) {
  check_offsets(problem);
  Plan plan;
  plan.width = round_up(problem.width, kWidthStep);
  const std::int64_t prefixes = problem.prefixes, suffixes = problem.runs - prefixes;
  const std::int64_t lists = std::max<std::int64_t>(prefixes, 1);
  for (std::int64_t n = 0; n < lists; ++n) {
    plan.first_chunk.push_back(plan.chunks.size());
    if (prefixes > 0) add_chunk(problem, plan, n, n + 1, n);
    std::int64_t run = prefixes + suffixes / lists * n;
    const std::int64_t end = run + suffixes / lists;
    const std::int64_t prefix_rows = prefixes > 0 ? problem.offsets[n + 1] - problem.offsets[n] : 0;
    const std::int64_t chunk_rows = std::max(kChunkRows, kChunkPrefixes * prefix_rows);
    while (run < end) {
      std::int64_t end_run = run;
      while (end_run < end && problem.offsets[end_run] - problem.offsets[run] < chunk_rows)
        ++end_run;
      add_chunk(problem, plan, run, end_run, prefixes > 0 ? n : -1);
      run = end_run;
    }
  }
  plan.first_chunk.push_back(plan.chunks.size());
  return plan;
}

// Rows of a tensor in fp32 and back, `step` apart there and padded with zeros here.
template <typename T>
VLFAST_INLINE void widen_rows(const T* from, std::int64_t step, std::int64_t rows,
                              std::int64_t width, std::int64_t padded, float factor, float* to) {
  for (std::int64_t r = 0; r < rows; ++r, from += step, to += padded) {
    for (std::int64_t d = 0; d < width; ++d) to[d] = factor * widen(from[d]);
    for (std::int64_t d = width; d < padded; ++d) to[d] = 0;
  }
}

template <typename T>
VLFAST_INLINE void narrow_rows(const float* from, std::int64_t padded, std::int64_t rows,
                               std::int64_t width, std::int64_t step, float factor, T* to) {
  for (std::int64_t r = 0; r < rows; ++r, from += padded, to += step) {
    for (std::int64_t d = 0; d < width; ++d) narrow(factor * from[d], to[d]);
  }
}

#define VLFAST_ROWS_OF(T)                                                                       \
  VLFAST_DISPATCH void read_rows(const T* from, std::int64_t step, std::int64_t rows,           \
                                 std::int64_t width, std::int64_t padded, float factor,         \
                                 float* to) {                                                   \
    widen_rows(from, step, rows, width, padded, factor, to);                                    \
  }                                                                                             \
  VLFAST_DISPATCH void write_rows(const float* from, std::int64_t padded, std::int64_t rows,    \
                                  std::int64_t width, std::int64_t step, float factor, T* to) { \
    narrow_rows(from, padded, rows, width, step, factor, to);                                   \
  }
VLFAST_ROWS_OF(float)
VLFAST_ROWS_OF(BFloat16)
VLFAST_ROWS_OF(Float16)
#undef VLFAST_ROWS_OF

// Rows of scores are short: what counts is that a sum ends in a few vector operations, where a
// reduction of OpenMP goes from lane to lane.
using Lanes = Vector64;
static_assert(sizeof(Lanes) == kScoreStep * sizeof(float));

// Scores to weights, in place: those of row r are the first `count` + r, and the rest of its
// `stride` becomes 0.
VLFAST_DISPATCH void softmax_rows(float* __restrict scores, std::int64_t stride, std::int64_t rows,
                                  std::int64_t count, float* __restrict log_normaliser,
                                  std::int64_t step) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  for (std::int64_t r = 0; r < rows; ++r, ++count, scores += stride) {
    Lanes lanes = Lanes{} + kLowest, some;
    for (std::int64_t k = 0; k < stride; k += kScoreStep) {
      const auto left = static_cast<std::int32_t>(count - k);
      for (std::int32_t l = 0; l < kScoreStep; ++l)
        scores[k + l] = l < left ? scores[k + l] : kLowest;
      load(scores + k, some);
      lanes = lanes < some ? some : lanes;
    }
    const float top = causal_products::largest(lanes);
    lanes = Lanes{};
    for (std::int64_t k = 0; k < stride; k += kScoreStep) {
      for (std::int64_t l = 0; l < kScoreStep; ++l)
        scores[k + l] = exp_negative(scores[k + l] - top);
      load(scores + k, some);
      lanes += some;
    }
    const float sum = causal_products::total(lanes);
    const float share = 1 / sum;
    for (std::int64_t k = 0; k < stride; ++k) scores[k] *= share;
    if (log_normaliser) log_normaliser[r * step] = top + std::log(sum);
  }
}

// Gradients of the weights to those of the scores, in place.
VLFAST_DISPATCH void through_softmax(const float* __restrict weights, float* __restrict gradients,
                                     std::int64_t stride, std::int64_t rows, std::int64_t count) {
  for (std::int64_t r = 0; r < rows; ++r, ++count, weights += stride, gradients += stride) {
    Lanes lanes{}, some, of_some;
    for (std::int64_t k = 0; k < stride; k += kScoreStep) {
      const auto left = static_cast<std::int32_t>(count - k);
      for (std::int32_t l = 0; l < kScoreStep; ++l)
        gradients[k + l] = l < left ? gradients[k + l] : 0;
      load(gradients + k, some);
      load(weights + k, of_some);
      lanes += of_some * some;
    }
    const float mean = causal_products::total(lanes);
    for (std::int64_t k = 0; k < stride; ++k) gradients[k] = weights[k] * (gradients[k] - mean);
  }
}

// One head of a [rows, parts, heads, width] tensor.
template <typename T>
struct Head {
  T* values;
  std::int64_t step;  // from row to row
  std::int64_t width;
  std::int64_t padded;

  void read(std::int64_t begin, std::int64_t end, float factor, float* to) const {
    read_rows(values + begin * step, step, end - begin, width, padded, factor, to);
  }
  void write(const float* from, std::int64_t begin, std::int64_t end, float factor) const {
    write_rows(from, padded, end - begin, width, step, factor, values + begin * step);
  }
};

template <typename T>
Head<T> head_of(T* tensor, std::int64_t part, std::int64_t parts, const PrefixAttention& problem,
                std::int64_t head, std::int64_t padded) {
  const std::int64_t heads = problem.heads, width = problem.width;
  return {tensor + (part * heads + head) * width, parts * heads * width, width, padded};
}

// Memory handed out piece by piece.
struct Pieces {
  float* next;

  float* take(std::int64_t size) {
    float* const piece = next;
    next += size;
    return piece;
  }
};

// What one thread works in: rows of a chunk, and of its prefix, in fp32.
struct Rows {
  float *prefix_keys, *prefix_values;
  float *queries, *keys, *values;
  float* weights;

  Rows(const Plan& plan, Pieces& pieces)
      : prefix_keys(pieces.take(plan.prefix_rows * plan.width)),
        prefix_values(pieces.take(plan.prefix_rows * plan.width)),
        queries(pieces.take(plan.chunk_rows * plan.width)),
        keys(pieces.take(plan.chunk_rows * plan.width)),
        values(pieces.take(plan.chunk_rows * plan.width)),
        weights(pieces.take(plan.scores)) {}

  static std::int64_t size(const Plan& plan) {
    return (2 * plan.prefix_rows + 3 * plan.chunk_rows) * plan.width + plan.scores;
  }
};

// One head of a chunk.
template <typename T>
struct Attention {
  const PrefixAttention& problem;
  const Plan& plan;
  const Chunk& chunk;
  std::int64_t head;
  Rows rows;
  std::int64_t width = plan.width;
  std::int64_t prefix_rows = chunk.prefix_end - chunk.prefix_begin;

  const float* at(const float* values, std::int64_t row) const {
    return values + (row - chunk.begin) * width;
  }
  float* at(float* values, std::int64_t row) const { return values + (row - chunk.begin) * width; }

  void read() const {
    const T* qkv = static_cast<const T*>(problem.qkv);
    const auto query = head_of(qkv, 0, 3, problem, head, width);
    const auto key = head_of(qkv, 1, 3, problem, head, width);
    const auto value = head_of(qkv, 2, 3, problem, head, width);
    query.read(chunk.begin, chunk.end, static_cast<float>(problem.scale), rows.queries);
    key.read(chunk.begin, chunk.end, 1, rows.keys);
    value.read(chunk.begin, chunk.end, 1, rows.values);
    key.read(chunk.prefix_begin, chunk.prefix_end, 1, rows.prefix_keys);
    value.read(chunk.prefix_begin, chunk.prefix_end, 1, rows.prefix_values);
  }

  std::int64_t stride(const Group& group) const {
    std::int64_t keys = 0;
    for (std::int64_t s = group.first_segment; s < group.end_segment; ++s)
      keys = std::max(keys, plan.segments[s].end - plan.segments[s].start);
    return round_up(prefix_rows + keys, kScoreStep);
  }

  // Of the prefix, then of the run of each row.
  void score(const Group& group, std::int64_t stride, const float* queries,
             const float* prefix_keys, const float* keys, float* scores) const {
    const std::int64_t count = group.end - group.begin;
    score_keys({at(queries, group.begin), count, prefix_keys, prefix_rows, prefix_rows, width,
                scores, stride});
    for (std::int64_t s = group.first_segment; s < group.end_segment; ++s) {
      const Segment& segment = plan.segments[s];
      score_keys({at(queries, segment.begin), segment.end - segment.begin, at(keys, segment.start),
                  segment.end - segment.start, segment.begin - segment.start, width,
                  scores + (segment.begin - group.begin) * stride + prefix_rows, stride});
    }
  }

  // log_normaliser: [rows, heads] of the whole problem, or null.
  void weigh(const Group& group, std::int64_t stride, float* log_normaliser) const {
    score(group, stride, rows.queries, rows.prefix_keys, rows.keys, rows.weights);
    for (std::int64_t s = group.first_segment; s < group.end_segment; ++s) {
      const Segment& segment = plan.segments[s];
      softmax_rows(rows.weights + (segment.begin - group.begin) * stride, stride,
                   segment.end - segment.begin, prefix_rows + segment.begin - segment.start + 1,
                   log_normaliser ? log_normaliser + segment.begin * problem.heads + head : nullptr,
                   problem.heads);
    }
  }

  // sums [rows of the group, width] = weights . (of the prefix, then of the run of each row)
  void sum(const Group& group, std::int64_t stride, const float* weights, const float* of_prefix,
           const float* of_run, float* sums) const {
    const std::int64_t count = group.end - group.begin;
    std::fill_n(sums, count * width, 0.0f);
    sum_over_keys({weights, stride, count, prefix_rows, prefix_rows, width, of_prefix, sums});
    for (std::int64_t s = group.first_segment; s < group.end_segment; ++s) {
      const Segment& segment = plan.segments[s];
      const std::int64_t row = segment.begin - group.begin;
      sum_over_keys({weights + row * stride + prefix_rows, stride, segment.end - segment.begin,
                     segment.end - segment.start, segment.begin - segment.start, width,
                     at(of_run, segment.start), sums + row * width});
    }
  }

  // The other way: adds weights^T . terms to what the prefix and the runs get.
  void sum_back(const Group& group, std::int64_t stride, const float* weights, const float* terms,
                float* of_prefix, float* of_run) const {
    sum_over_queries({weights, stride, group.end - group.begin, prefix_rows, prefix_rows, width,
                      at(terms, group.begin), of_prefix});
    for (std::int64_t s = group.first_segment; s < group.end_segment; ++s) {
      const Segment& segment = plan.segments[s];
      const std::int64_t row = segment.begin - group.begin;
      sum_over_queries({weights + row * stride + prefix_rows, stride, segment.end - segment.begin,
                        segment.end - segment.start, segment.begin - segment.start, width,
                        at(terms, segment.begin), at(of_run, segment.start)});
    }
  }
};

template <typename T>
void attend(const PrefixAttention& problem, const Plan& plan, const Chunk& chunk, std::int64_t head,
            const PrefixAttentionResults& results) {
  thread_local std::vector<float> kept;
  Pieces pieces{at_least(kept, Rows::size(plan) + kGroupRows * plan.width)};
  const Attention<T> attention{problem, plan, chunk, head, Rows(plan, pieces)};
  float* const sums = pieces.take(kGroupRows * plan.width);
  const auto output = head_of(static_cast<T*>(results.output), 0, 1, problem, head, plan.width);
  attention.read();
  for (std::int64_t g = chunk.first_group; g < chunk.end_group; ++g) {
    const Group& group = plan.groups[g];
    const std::int64_t stride = attention.stride(group);
    attention.weigh(group, stride, results.log_normaliser);
    attention.sum(group, stride, attention.rows.weights, attention.rows.prefix_values,
                  attention.rows.values, sums);
    output.write(sums, group.begin, group.end, 1);
  }
}

// Writes the gradients of the chunk's own rows, and its part of the prefix's. A prefix itself has
// such a part too.
template <typename T>
void differentiate(const PrefixAttention& problem, const Plan& plan, const Chunk& chunk,
                   std::int64_t head, const PrefixAttentionGradients& gradients, float* partials) {
  thread_local std::vector<float> kept;
  const std::int64_t chunk_size = plan.chunk_rows * plan.width;
  const std::int64_t group_size = kGroupRows * plan.width;
  Pieces pieces{at_least(kept, Rows::size(plan) + plan.scores + 3 * chunk_size + group_size)};
  const Attention<T> attention{problem, plan, chunk, head, Rows(plan, pieces)};
  const Rows& rows = attention.rows;
  float* const to_scores = pieces.take(plan.scores);
  float* const to_output = pieces.take(chunk_size);
  float* to_keys = pieces.take(chunk_size);
  float* to_values = pieces.take(chunk_size);
  float* const to_queries = pieces.take(group_size);
  T* const to_qkv = static_cast<T*>(gradients.to_qkv);

  attention.read();
  head_of(static_cast<const T*>(gradients.to_output), 0, 1, problem, head, plan.width)
      .read(chunk.begin, chunk.end, 1, to_output);
  float* const partial = partials + chunk.partial;
  const std::int64_t prefix_size = attention.prefix_rows * plan.width;
  const std::int64_t own_size = (chunk.end - chunk.begin) * plan.width;
  if (chunk.is_prefix) {
    to_keys = partial;
    to_values = partial + own_size;
  }
  std::fill_n(partial, 2 * prefix_size, 0.0f);
  std::fill_n(to_keys, own_size, 0.0f);
  std::fill_n(to_values, own_size, 0.0f);
  const auto query = head_of(to_qkv, 0, 3, problem, head, plan.width);
  for (std::int64_t g = chunk.first_group; g < chunk.end_group; ++g) {
    const Group& group = plan.groups[g];
    const std::int64_t stride = attention.stride(group);
    attention.weigh(group, stride, nullptr);
    attention.score(group, stride, to_output, rows.prefix_values, rows.values, to_scores);
    for (std::int64_t s = group.first_segment; s < group.end_segment; ++s) {
      const Segment& segment = plan.segments[s];
      const std::int64_t at = (segment.begin - group.begin) * stride;
      through_softmax(rows.weights + at, to_scores + at, stride, segment.end - segment.begin,
                      attention.prefix_rows + segment.begin - segment.start + 1);
    }
    attention.sum(group, stride, to_scores, rows.prefix_keys, rows.keys, to_queries);
    query.write(to_queries, group.begin, group.end, static_cast<float>(problem.scale));
    // The queries hold the scale already.
    attention.sum_back(group, stride, to_scores, rows.queries, partial, to_keys);
    attention.sum_back(group, stride, rows.weights, to_output, partial + prefix_size, to_values);
  }
  if (!chunk.is_prefix) {
    head_of(to_qkv, 1, 3, problem, head, plan.width).write(to_keys, chunk.begin, chunk.end, 1);
    head_of(to_qkv, 2, 3, problem, head, plan.width).write(to_values, chunk.begin, chunk.end, 1);
  }
}

VLFAST_DISPATCH void add(const float* from, std::int64_t size, float* to) {
  for (std::int64_t i = 0; i < size; ++i) to[i] += from[i];
}

// The gradient of a prefix, from the parts that its chunks have left.
template <typename T>
void add_parts(const PrefixAttention& problem, const Plan& plan, std::int64_t prefix,
               std::int64_t head, const PrefixAttentionGradients& gradients, float* partials) {
  const std::int64_t begin = problem.offsets[prefix], end = problem.offsets[prefix + 1];
  const std::int64_t size = (end - begin) * plan.width;
  const std::int64_t first = plan.first_chunk[prefix], last = plan.first_chunk[prefix + 1];
  float* const total = partials + plan.chunks[first].partial;
  for (std::int64_t c = first + 1; c < last; ++c)
    add(partials + plan.chunks[c].partial, 2 * size, total);
  T* const to_qkv = static_cast<T*>(gradients.to_qkv);
  head_of(to_qkv, 1, 3, problem, head, plan.width).write(total, begin, end, 1);
  head_of(to_qkv, 2, 3, problem, head, plan.width).write(total + size, begin, end, 1);
}

int worthwhile(int threads, const PrefixAttention& problem, const Plan& plan) {
  const std::int64_t products = plan.pairs * problem.heads * plan.width;
  return products < kSerialProducts ? 1 : std::max(threads, 1);
}

template <typename T>
void solve(const PrefixAttention& problem, const PrefixAttentionResults& results, int threads) {
  const Plan plan = vlfast::plan(problem);
  threads = worthwhile(threads, problem, plan);
  const std::int64_t tasks = plan.chunks.size() * problem.heads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
  for (std::int64_t t = 0; t < tasks; ++t)
    attend<T>(problem, plan, plan.chunks[t / problem.heads], t % problem.heads, results);
}

template <typename T>
void solve_backward(const PrefixAttention& problem, const PrefixAttentionGradients& gradients,
                    int threads) {
  const Plan plan = vlfast::plan(problem);
  threads = worthwhile(threads, problem, plan);
  // Scratch is kept between calls: fresh blocks of this size would be paged in anew each time.
  thread_local std::vector<float> kept;
  float* const partials = at_least(kept, plan.partials * problem.heads);
  const std::int64_t tasks = plan.chunks.size() * problem.heads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
  for (std::int64_t t = 0; t < tasks; ++t) {
    const std::int64_t head = t % problem.heads;
    differentiate<T>(problem, plan, plan.chunks[t / problem.heads], head, gradients,
                     partials + head * plan.partials);
  }
  const std::int64_t sums = problem.prefixes * problem.heads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
  for (std::int64_t t = 0; t < sums; ++t) {
    const std::int64_t head = t % problem.heads;
    add_parts<T>(problem, plan, t / problem.heads, head, gradients,
                 partials + head * plan.partials);
  }
}

}  // namespace

void prefix_attention_cpu(const PrefixAttention& problem, const PrefixAttentionResults& results,
                          int threads) {
  if (problem.dtype == DType::kBFloat16) return solve<BFloat16>(problem, results, threads);
  if (problem.dtype == DType::kFloat16) return solve<Float16>(problem, results, threads);
  solve<float>(problem, results, threads);
}

void prefix_attention_backward_cpu(const PrefixAttention& problem,
                                   const PrefixAttentionGradients& gradients, int threads) {
  if (problem.dtype == DType::kBFloat16)
    return solve_backward<BFloat16>(problem, gradients, threads);
  if (problem.dtype == DType::kFloat16) return solve_backward<Float16>(problem, gradients, threads);
  solve_backward<float>(problem, gradients, threads);
}

}  // namespace vlfast
