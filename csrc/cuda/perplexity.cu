#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "mma.cuh"
#include "reduce.cuh"
#include "scalar.cuh"
#include "vlfast/perplexity.h"

namespace vlfast {
namespace {

// A team of warps takes one tile of words after the other, for a panel of rows. Every warp has its
// own slice of the width: of its columns it keeps the rows and the expected embedding in registers.
constexpr int kPanel = 16;
constexpr int kTeamWarps = 8;
constexpr int kTeam = kTeamWarps * kWarp;
constexpr int kMostTeams = 2;

// The bytes of a word that one product of matrices is deep, and the columns that these are.
constexpr int kStepBytes = 32;
template <typename T>
constexpr int kDepth = kStepBytes / int(sizeof(T));

constexpr int kMostRows = 64;
constexpr int kMostTopK = 2 * kWarp;
constexpr float kNormFloor = 1e-12f;

// A product takes both operands in the type of the embedding. The fp32 operand comes in two terms,
// scaled by a power of two so that its largest value has this exponent: half precision has no room
// for the low term of small values otherwise.
template <typename T>
constexpr int kTopExponent = std::is_same_v<T, __half> ? 14 : 0;
template <typename T>
constexpr float kWeightScale = 1 << kTopExponent<T>;

// The words of a tile: fewer where they are wide, so that the tiles fit in shared memory.
template <int kSteps>
constexpr int kTileWords = kSteps * kTeamWarps * kStepBytes <= 1536 ? 32 : 16;
// Rows of kTileWords floats in shared memory stand so much further apart, against bank conflicts.
constexpr int kPadding = 8;

// Registers for two teams in a block, or for one.
template <typename T, int kSteps>
constexpr int kTeamsAtMost = kSteps * kDepth<T> <= 64 ? kMostTeams : 1;

// Where things are in the shared memory of a team, in bytes.
struct Layout {
  int pitch;  // from one word of a tile to the next
  int tile;   // from one tile to the next; they come first
  int partials;
  int squares;
  int weights;
  int rows;  // what belongs to the rows of the panel: see RowMemory
  int scores;
  int words;
  int bytes;
};

struct RowMemory {
  float prompt_scale[kPanel];
  float hidden_scale[kPanel];
  float hidden_unscale[kPanel];
  float is_not_zero[kPanel];  // 0 for a prompt that counts as zero, else 1
  float factor[kPanel];
  float top[kPanel];
  float sum[kPanel];
};

// What the splits of the vocabulary leave to be merged.
struct Partials {
  int splits;
  int teams;
  float* norms;     // [rows], of the prompts: 0 if it counts as zero, NaN in a row that is bad
  float* tops;      // [rows, splits], the largest logit
  float* sums;      // [rows, splits], sum of exp(logit - top)
  float* expected;  // [rows, splits, width], sum of exp(logit - top) * embedding
  float* scores;    // [rows, splits, teams, top_k], in proportion to the cosines, the largest first
  int* words;       // [rows, splits, teams, top_k], -1 where there are fewer
};

// fp32 values of 16 rows as the left operand of a product, in two terms.
template <typename T>
struct Fragment {
  std::uint32_t high[4];
  std::uint32_t low[4];

  // `value(row, column)` with column below kDepth.
  template <typename Value>
  __device__ void fill(Value value, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i % 2 * 8;
      const int column = lane % 4 * 2 + i / 2 * 8;
      T highs[2], lows[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float x = value(row, column + j);
        narrow(x, highs[j]);
        narrow(x - widen(highs[j]), lows[j]);
      }
      memcpy(&high[i], highs, sizeof high[i]);
      memcpy(&low[i], lows, sizeof low[i]);
    }
  }

  __device__ void multiply_into(float (&c)[4], const std::uint32_t (&b)[2]) const {
    multiply<T>(c, low, b);
    multiply<T>(c, high, b);
  }
};

// fp32 as what tensor cores take of it, and the rest.
struct TensorFloats {
  std::uint32_t high;
  std::uint32_t low;
};

__device__ TensorFloats split(float x) {
  x = computed_anew(x);
  const std::uint32_t high = __float_as_uint(x) & 0xffffe000u;
  return {high, __float_as_uint(x - __uint_as_float(high))};
}

template <>
struct Fragment<float> {
  float values[4];

  template <typename Value>
  __device__ void fill(Value value, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = value(lane / 4 + i % 2 * 8, lane % 4 + i / 2 * 4);
  }

  __device__ void multiply_into(float (&c)[4], const std::uint32_t (&b)[2]) const {
    std::uint32_t high[4], low[4], b_high[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const TensorFloats terms = split(values[i]);
      high[i] = terms.high;
      low[i] = terms.low;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const TensorFloats terms = split(__uint_as_float(b[i]));
      b_high[i] = terms.high;
      b_low[i] = terms.low;
    }
    multiply<float>(c, low, b_high);
    multiply<float>(c, high, b_low);
    multiply<float>(c, high, b_high);
  }
};

template <typename T>
__device__ float sum_of_squares(std::uint32_t bits) {
  T values[sizeof bits / sizeof(T)];
  memcpy(values, &bits, sizeof bits);
  float sum = 0;
#pragma unroll
  for (T value : values) sum += widen(value) * widen(value);
  return sum;
}

template <typename Merge>
__device__ float merged_over_warp(float value, Merge merge) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    value = merge(value, __shfl_xor_sync(kAllLanes, value, lanes));
  }
  return value;
}

__device__ float sum_over_warp(float value) {
  return merged_over_warp(value, [](float a, float b) { return a + b; });
}

__device__ float largest_over_warp(float value) {
  return merged_over_warp(value, [](float a, float b) { return fmaxf(a, b); });
}

// The factor from sums relative to one top to sums relative to one at least as high. No sum yet:
// its top is minus infinity, as the new one may be.
__device__ float rescaling(float top, float new_top) {
  return top == -INFINITY ? 0.0f : exp_negative(top - new_top);
}

// A power of two that gives `largest` the exponent of kTopExponent.
template <typename T>
__device__ float scale_for(float largest) {
  if (!(largest > 0 && largest < INFINITY)) return 1;
  return ldexpf(1.0f, min(kTopExponent<T> - ilogbf(largest), 126));
}

// A word, and its score in proportion to its cosine. Word -1: none, with a score below all others.
struct Candidate {
  float score;
  int word;
};

// From so many new candidates on, sorting them is faster than inserting one after the other.
constexpr int kSortFrom = 7;

__device__ bool ranks_before(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.word < b.word);
}

__device__ Candidate from_lane(const Candidate& candidate, int lane) {
  return {__shfl_sync(kAllLanes, candidate.score, lane),
          __shfl_sync(kAllLanes, candidate.word, lane)};
}

// The first of this lane's candidate and that of the lane `lanes` away, or the last of them.
__device__ Candidate of_two_lanes(const Candidate& mine, int lanes, bool first) {
  const Candidate other = from_lane(mine, (threadIdx.x % kWarp) ^ lanes);
  return ranks_before(other, mine) == first ? other : mine;
}

// A bitonic sort of one candidate a lane.
__device__ Candidate sorted_over_warp(Candidate mine) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int size = 2; size <= kWarp; size *= 2) {
#pragma unroll
    for (int lanes = size / 2; lanes > 0; lanes /= 2) {
      mine = of_two_lanes(mine, lanes, ((lane & lanes) == 0) == ((lane & size) == 0));
    }
  }
  return mine;
}

// The first 32, sorted, of two sorted lists of 32.
__device__ Candidate best_of_both(Candidate mine, const Candidate& other) {
  const int lane = threadIdx.x % kWarp;
  const Candidate opposite = from_lane(other, kWarp - 1 - lane);
  if (ranks_before(opposite, mine)) mine = opposite;
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    mine = of_two_lanes(mine, lanes, (lane & lanes) == 0);
  }
  return mine;
}

// What is known of a word before its tile is there.
struct Weight {
  bool counts;
  float inverse_norm;  // 1 where it is not given
};

template <typename T, int kSteps>
class Team {
 public:
  static constexpr int kWords = kTileWords<kSteps>;

  __device__ Team(const Perplexity& problem, const Layout& layout, const Partials& partials,
                  char* memory, int stages)
      : problem_(problem),
        layout_(layout),
        partials_(partials),
        memory_(memory + threadIdx.x / kTeam * layout.bytes),
        stages_(stages),
        team_(threadIdx.x / kTeam),
        warp_(threadIdx.x % kTeam / kWarp),
        lane_(threadIdx.x % kWarp),
        row_bytes_(static_cast<int>(problem.width * sizeof(T))),
        first_row_(blockIdx.x * kPanel),
        rows_(min(kPanel, static_cast<int>(problem.rows) - first_row_)),
        split_(blockIdx.y) {
    const int steps = row_bytes_ / kStepBytes;
    active_warps_ = (steps + kSteps - 1) / kSteps;
    first_step_ = warp_ * kSteps;
    steps_ = max(0, min(kSteps, steps - first_step_));
  }

  __device__ void run() {
    const std::int64_t tiles = (problem_.words + kWords - 1) / kWords;
    const std::int64_t last = tiles * (split_ + 1) / partials_.splits;
    std::int64_t tile = tiles * split_ / partials_.splits + team_;
    const int step = partials_.teams;
    int stage = 0;
    Weight next_weight{};
    // Both tiles are on their way while the rows are prepared.
    if (tile < last) {
      fetch(tile, 0);
      next_weight = weight_of(tile);
    }
    commit_copies();
    if (stages_ == 2 && tile + step < last) fetch(tile + step, 1);
    commit_copies();
    prepare_rows();
    for (bool is_first = true; tile < last; tile += step, is_first = false) {
      if (is_first) {
        wait_for_copies<1>();
      } else {
        if (stages_ == 1) {
          synchronise();
          fetch(tile, 0);
          commit_copies();
        }
        wait_for_copies<0>();
      }
      synchronise();
      const Weight weight = next_weight;
      if (tile + step < last) {
        if (stages_ == 2 && !is_first) {
          fetch(tile + step, stage ^ 1);
          commit_copies();
        }
        next_weight = weight_of(tile + step);
      }
      score(tile_at(stage));
      synchronise();
      weigh(tile, weight);
      synchronise();
      accumulate(tile_at(stage));
      if (stages_ == 2) stage ^= 1;
    }
    write_lists();
    merge_teams();
  }

 private:
  static constexpr int kPitch = kWords + kPadding;  // of partials and weights, in floats
  static constexpr int kTilesOfStep = kDepth<T> / 8;

  __device__ void synchronise() const { named_barrier(team_ + 1, kTeam); }
  __device__ char* tile_at(int stage) const { return memory_ + stage * layout_.tile; }
  __device__ float* floats(int offset) const { return reinterpret_cast<float*>(memory_ + offset); }
  __device__ RowMemory& of_rows() const {
    return *reinterpret_cast<RowMemory*>(memory_ + layout_.rows);
  }
  __device__ float* partial(int warp, int matrix) const {
    return floats(layout_.partials) + (warp * 2 + matrix) * kPanel * kPitch;
  }

  __device__ void fetch(std::int64_t tile, int stage) const {
    const char* embedding = static_cast<const char*>(problem_.embedding);
    for (int i = warp_; i < kWords; i += kTeamWarps) {
      const std::int64_t word = tile * kWords + i;
      const bool valid = word < problem_.words;
      const char* from = embedding + (valid ? word * row_bytes_ : 0);
      char* to = tile_at(stage) + i * layout_.pitch;
      for (int offset = lane_ * 16; offset < row_bytes_; offset += kWarp * 16) {
        copy_16_bytes(to + offset, from + offset, valid);
      }
    }
  }

  // Of this lane's word of the tile.
  __device__ Weight weight_of(std::int64_t tile) const {
    const std::int64_t word = tile * kWords + lane_;
    if (lane_ >= kWords || word >= problem_.words) return {};
    if (problem_.vocabulary && !problem_.vocabulary[word]) return {};
    return {true, problem_.inverse_norms ? problem_.inverse_norms[word] : 1};
  }

  __device__ void prepare_rows() {
    RowMemory& memory = of_rows();
    const int top_k = static_cast<int>(problem_.top_k);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 2 * warp_ + r;
      top_[r] = -INFINITY;
      sum_[r] = 0;
      for (int i = lane_; i < top_k; i += kWarp) {
        floats(layout_.scores)[row * top_k + i] = -INFINITY;
        reinterpret_cast<int*>(memory_ + layout_.words)[row * top_k + i] = -1;
      }
      if (row >= rows_) continue;
      const float* prompt = problem_.prompts + (first_row_ + row) * problem_.width;
      const float* hidden = problem_.hidden + (first_row_ + row) * problem_.width;
      float of_prompt = 0, of_hidden = 0, zero_or_nan = 0;
      for (int c = lane_; c < problem_.width; c += kWarp) {
        of_prompt = fmaxf(of_prompt, fabsf(prompt[c]));
        of_hidden = fmaxf(of_hidden, fabsf(hidden[c]));
        zero_or_nan += prompt[c] * 0 + hidden[c] * 0;
      }
      const float prompt_scale = scale_for<T>(largest_over_warp(of_prompt));
      const float hidden_scale = scale_for<T>(largest_over_warp(of_hidden));
      float squares = 0;
      for (int c = lane_; c < problem_.width; c += kWarp) {
        const float x = prompt[c] * prompt_scale;
        squares += x * x;
      }
      const float norm = sqrtf(sum_over_warp(squares)) / prompt_scale;
      const float bad = sum_over_warp(zero_or_nan);
      if (lane_ == 0) {
        memory.prompt_scale[row] = prompt_scale;
        memory.hidden_scale[row] = hidden_scale;
        memory.hidden_unscale[row] = 1 / hidden_scale;
        memory.is_not_zero[row] = norm <= kNormFloor ? 0 : 1;
        if (split_ == 0 && team_ == 0) {
          partials_.norms[first_row_ + row] = (norm <= kNormFloor ? 0 : norm) + bad;
        }
      }
    }
    synchronise();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (s >= steps_) break;
      const auto value_of = [&](const float* matrix, const float* scales) {
        return [=](int row, int column) {
          if (row >= rows_) return 0.0f;
          const int c = (first_step_ + s) * kDepth<T> + column;
          return matrix[(first_row_ + row) * problem_.width + c] * scales[row];
        };
      };
      prompts_[s].fill(value_of(problem_.prompts, memory.prompt_scale), lane_);
      hidden_[s].fill(value_of(problem_.hidden, memory.hidden_scale), lane_);
    }
#pragma unroll
    for (auto& step : expected_) {
#pragma unroll
      for (auto& tile : step) {
#pragma unroll
        for (float& value : tile) value = 0;
      }
    }
  }

  // This warp's share, over its columns, of the products of the rows with the words.
  __device__ void score(const char* tile) const {
    if (steps_ == 0) return;
    const char* matrices =
        tile + lane_ % 8 * layout_.pitch + first_step_ * kStepBytes + lane_ / 8 * 16;
    float* out = partial(warp_, 0) + lane_ / 4 * kPitch + lane_ % 4 * 2;
#pragma unroll 1
    for (int n = 0; n < kWords; n += 8) {
      float of_prompts[4] = {}, of_hidden[4] = {};
      float squares = 0;
#pragma unroll
      for (int s = 0; s < kSteps; s += 2) {
        if (s >= steps_) break;
        std::uint32_t b[4];
        load_matrices(matrices + n * layout_.pitch + s * kStepBytes, b);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const std::uint32_t words[2] = {b[2 * i], b[2 * i + 1]};
          prompts_[s + i].multiply_into(of_prompts, words);
          hidden_[s + i].multiply_into(of_hidden, words);
        }
        if (!problem_.inverse_norms) {
#pragma unroll
          for (std::uint32_t bits : b) squares += sum_of_squares<T>(bits);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* at = out + i * 8 * kPitch + n;
        *reinterpret_cast<float2*>(at) = make_float2(of_prompts[2 * i], of_prompts[2 * i + 1]);
        at += kPanel * kPitch;
        *reinterpret_cast<float2*>(at) = make_float2(of_hidden[2 * i], of_hidden[2 * i + 1]);
      }
      if (!problem_.inverse_norms) {
        squares += __shfl_xor_sync(kAllLanes, squares, 1);
        squares += __shfl_xor_sync(kAllLanes, squares, 2);
        if (lane_ % 4 == 0) floats(layout_.squares)[warp_ * kWords + n + lane_ / 4] = squares;
        __syncwarp();
      }
    }
  }

  // Two rows a warp, a word a lane: the candidates for the top k, and exp(logit - top).
  __device__ void weigh(std::int64_t tile, Weight weight) {
    const int column = lane_ % kWords;
    RowMemory& memory = of_rows();
    if (!problem_.inverse_norms) {
      float squares = 0;
      for (int w = 0; w < active_warps_; ++w) {
        squares += floats(layout_.squares)[w * kWords + column];
      }
      weight.inverse_norm = 1 / fmaxf(sqrtf(squares), kNormFloor);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 2 * warp_ + r;
      float* weights = floats(layout_.weights) + row * kPitch + column;
      if (row >= rows_) {
        if (lane_ < kWords) *weights = 0;
        if (lane_ == 0) memory.factor[row] = 1;
        continue;
      }
      float dot = 0, logit = 0;
      for (int w = 0; w < active_warps_; ++w) {
        dot += partial(w, 0)[row * kPitch + column];
        logit += partial(w, 1)[row * kPitch + column];
      }
      // The sum with 0 makes 0 of -0, which would rank below it.
      const float score = dot * weight.inverse_norm * memory.is_not_zero[row] + 0.0f;
      keep_best(row, score, weight.counts, tile * kWords);

      logit = weight.counts ? logit * memory.hidden_unscale[row] : -INFINITY;
      float factor = 1;
      if (__any_sync(kAllLanes, logit > top_[r])) {
        const float top = fmaxf(top_[r], largest_over_warp(logit));
        factor = rescaling(top_[r], top);
        top_[r] = top;
      }
      // A score or a logit that is not finite makes NaN of the sum, as 0 * infinity at the least:
      // who knows which words would be the best.
      const float power =
          weight.counts ? exp_negative(logit - top_[r]) + (score * 0 + logit * 0) : 0;
      sum_[r] = sum_[r] * factor + power;
      if (lane_ < kWords) *weights = power * kWeightScale<T>;
      if (lane_ == 0) memory.factor[row] = factor;
    }
  }

  // The row's list stays sorted. Words come in ascending order, so that of equal scores the
  // earlier one has the smaller index.
  __device__ void keep_best(int row, float score, bool counts, std::int64_t first_word) const {
    const int top_k = static_cast<int>(problem_.top_k);
    float* scores = floats(layout_.scores) + row * top_k;
    int* words = reinterpret_cast<int*>(memory_ + layout_.words) + row * top_k;
    unsigned better = __ballot_sync(kAllLanes, counts && score > scores[top_k - 1]);
    if (better == 0) return;

    // A lane has the entries `lane` and `lane` + 32.
    Candidate entries[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int rank = lane_ + i * kWarp;
      entries[i] = rank < top_k ? Candidate{scores[rank], words[rank]} : Candidate{-INFINITY, -1};
    }
    const int word = static_cast<int>(first_word) + lane_;
    if (top_k <= kWarp && __popc(better) >= kSortFrom) {
      const bool mine = better >> lane_ & 1;
      entries[0] = best_of_both(
          entries[0], sorted_over_warp(mine ? Candidate{score, word} : Candidate{-INFINITY, -1}));
    } else {
      for (; better != 0; better &= better - 1) {
        const int source = __ffs(better) - 1;
        insert({__shfl_sync(kAllLanes, score, source), static_cast<int>(first_word) + source},
               top_k, entries);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int rank = lane_ + i * kWarp;
      if (rank >= top_k) continue;
      scores[rank] = entries[i].score;
      words[rank] = entries[i].word;
    }
  }

  // Behind the entries of the same score, which have smaller indices.
  __device__ void insert(const Candidate& candidate, int top_k, Candidate (&entries)[2]) const {
    int position = __popc(__ballot_sync(kAllLanes, entries[0].score >= candidate.score));
    if (top_k > kWarp) {
      position += __popc(__ballot_sync(kAllLanes, entries[1].score >= candidate.score));
      const Candidate last = from_lane(entries[0], kWarp - 1);
      const Candidate before = from_lane(entries[1], max(lane_ - 1, 0));
      if (lane_ + kWarp == position) {
        entries[1] = candidate;
      } else if (lane_ + kWarp > position) {
        entries[1] = lane_ == 0 ? last : before;
      }
    }
    const Candidate before = from_lane(entries[0], max(lane_ - 1, 0));
    if (lane_ == position) {
      entries[0] = candidate;
    } else if (lane_ > position) {
      entries[0] = before;
    }
  }

  // The sum over the words of their weights times the embedding, in this warp's columns.
  __device__ void accumulate(const char* tile) {
    if (steps_ == 0) return;
    const RowMemory& memory = of_rows();
    const float factors[2] = {memory.factor[lane_ / 4], memory.factor[lane_ / 4 + 8]};
    if (factors[0] != 1 || factors[1] != 1) {
#pragma unroll
      for (auto& step : expected_) {
#pragma unroll
        for (auto& columns : step) {
#pragma unroll
          for (int i = 0; i < 4; ++i) columns[i] *= factors[i / 2];
        }
      }
    }
    // The lanes go on together, as products of matrices ask.
    __syncwarp();
    const float* weights = floats(layout_.weights);
#pragma unroll 1
    for (int n = 0; n < kWords; n += kDepth<T>) {
      Fragment<T> left;
      left.fill([&](int row, int column) { return weights[row * kPitch + n + column]; }, lane_);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (s >= steps_) break;
        const char* columns = tile + n * layout_.pitch + (first_step_ + s) * kStepBytes;
        if constexpr (sizeof(T) == 2) {
          std::uint32_t b[4];
          load_transposed_matrices(columns + lane_ % 16 * layout_.pitch + lane_ / 16 * 16, b);
          left.multiply_into(expected_[s][0], {b[0], b[1]});
          left.multiply_into(expected_[s][1], {b[2], b[3]});
        } else {
          std::uint32_t b[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            b[i] = *reinterpret_cast<const std::uint32_t*>(
                columns + (lane_ % 4 + i * 4) * layout_.pitch + lane_ / 4 * 4);
          }
          left.multiply_into(expected_[s][0], b);
        }
      }
    }
  }

  __device__ void write_lists() const {
    const int top_k = static_cast<int>(problem_.top_k);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 2 * warp_ + r;
      if (row >= rows_) continue;
      const std::int64_t list =
          ((first_row_ + row) * std::int64_t{partials_.splits} + split_) * partials_.teams + team_;
      for (int i = lane_; i < top_k; i += kWarp) {
        partials_.scores[list * top_k + i] = floats(layout_.scores)[row * top_k + i];
        partials_.words[list * top_k + i] =
            reinterpret_cast<const int*>(memory_ + layout_.words)[row * top_k + i];
      }
    }
  }

  // The first team writes its sums with those of the second, which hands them over in shared
  // memory that no longer serves.
  __device__ void merge_teams() {
    RowMemory& mine = of_rows();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = sum_over_warp(sum_[r]);
      if (lane_ == 0) {
        mine.top[2 * warp_ + r] = top_[r];
        mine.sum[2 * warp_ + r] = sum;
      }
    }
    synchronise();
    const int thread = threadIdx.x % kTeam;
    if (team_ != 0) {
      float* values = floats(0) + thread;
#pragma unroll
      for (const auto& step : expected_) {
#pragma unroll
        for (const auto& columns : step) {
#pragma unroll
          for (float value : columns) {
            *values = value;
            values += kTeam;
          }
        }
      }
    }
    __syncthreads();
    if (team_ != 0) return;

    const bool has_other = partials_.teams > 1;
    const char* other_memory = memory_ + layout_.bytes;
    const auto& other = *reinterpret_cast<const RowMemory*>(other_memory + layout_.rows);
    const auto top_of = [&](int row) {
      return has_other ? fmaxf(mine.top[row], other.top[row]) : mine.top[row];
    };
    if (thread < rows_) {
      const std::int64_t at = (first_row_ + thread) * std::int64_t{partials_.splits} + split_;
      const float top = top_of(thread);
      float sum = mine.sum[thread] * rescaling(mine.top[thread], top);
      if (has_other) sum += other.sum[thread] * rescaling(other.top[thread], top);
      partials_.tops[at] = top;
      partials_.sums[at] = sum;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane_ / 4 + half * 8;
      if (row >= rows_) continue;
      const float top = top_of(row);
      const float factor = rescaling(mine.top[row], top) / kWeightScale<T>;
      const float other_factor =
          has_other ? rescaling(other.top[row], top) / kWeightScale<T> : 0.0f;
      float* out = partials_.expected +
                   ((first_row_ + row) * std::int64_t{partials_.splits} + split_) * problem_.width;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (s >= steps_) break;
#pragma unroll
        for (int n = 0; n < kTilesOfStep; ++n) {
          float values[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            values[i] = expected_[s][n][2 * half + i] * factor;
            if (has_other) {
              const int index = (s * kTilesOfStep + n) * 4 + 2 * half + i;
              values[i] += reinterpret_cast<const float*>(other_memory)[index * kTeam + thread] *
                           other_factor;
            }
          }
          const int column = (first_step_ + s) * kDepth<T> + n * 8 + lane_ % 4 * 2;
          *reinterpret_cast<float2*>(out + column) = make_float2(values[0], values[1]);
        }
      }
    }
  }

  const Perplexity& problem_;
  const Layout& layout_;
  const Partials& partials_;
  char* memory_;
  int stages_;
  int team_;
  int warp_;
  int lane_;
  int row_bytes_;
  int first_row_;
  int rows_;  // of the panel
  int split_;
  int active_warps_;
  int first_step_;
  int steps_;  // of this warp
  Fragment<T> prompts_[kSteps];
  Fragment<T> hidden_[kSteps];
  float expected_[kSteps][kTilesOfStep][4];
  float top_[2];
  float sum_[2];  // over this lane's words
};

// A block for each panel of rows and each split of the vocabulary.
template <typename T, int kSteps>
__global__ void __launch_bounds__(kTeam* kTeamsAtMost<T, kSteps>)
    sweep_words(const Perplexity problem, const Layout layout, const Partials partials,
                int stages) {
  extern __shared__ float4 shared[];
  Team<T, kSteps>(problem, layout, partials, reinterpret_cast<char*>(shared), stages).run();
}

constexpr int kMergeThreads = 256;
constexpr int kMergeWarps = kMergeThreads / kWarp;
constexpr int kSlice = 64;  // columns of a block
constexpr int kGradients = 4;
constexpr int kSplitGroups = kMergeThreads * 4 / kSlice;
constexpr int kWordGroups = kMergeThreads / kSlice;

// Unsigned integers in the order of the numbers. None of a number is 0.
__device__ unsigned ordered(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The candidate of a list that comes next. Key 0: there is none.
struct Head {
  unsigned key;
  unsigned word;
  int list;
};

// The best of sorted lists, by one warp. `chosen` gets up to top_k words; gives back how many.
class ListMerger {
 public:
  __device__ ListMerger(const float* scores, const int* words, int* positions, int lists, int top_k)
      : scores_(scores), words_(words), positions_(positions), lists_(lists), top_k_(top_k) {}

  __device__ int run(int* chosen) {
    const int lane = threadIdx.x % kWarp;
    for (int list = lane; list < lists_; list += kWarp) positions_[list] = 0;
    Head best = best_head();
    int count = 0;
    for (; count < top_k_; ++count) {
      const unsigned key = __reduce_max_sync(kAllLanes, best.key);
      if (key == 0) break;
      const unsigned word = __reduce_min_sync(kAllLanes, best.key == key ? best.word : 0xffffffffu);
      if (best.key == key && best.word == word) {
        chosen[count] = static_cast<int>(word);
        ++positions_[best.list];
        best = best_head();
      }
    }
    return count;
  }

 private:
  // Of the lists of this lane.
  __device__ Head best_head() const {
    Head best{0, 0, 0};
    for (int list = threadIdx.x % kWarp; list < lists_; list += kWarp) {
      const int position = positions_[list];
      if (position == top_k_ || words_[list * top_k_ + position] < 0) continue;
      const unsigned key = ordered(scores_[list * top_k_ + position]);
      const auto word = static_cast<unsigned>(words_[list * top_k_ + position]);
      if (key > best.key || (key == best.key && word < best.word)) best = {key, word, list};
    }
    return best;
  }

  const float* scores_;
  const int* words_;
  int* positions_;
  int lists_;
  int top_k_;
};

// What the block knows of the words that a row has chosen.
struct Chosen {
  int count;
  int words[kMostTopK];
  float cosines[kMostTopK];
  float logits[kMostTopK];
  float inverse_norms[kMostTopK];
  // By gradient, in the order of the results: of the word's embedding.
  float coefficients[kGradients][kMostTopK];
  float pulls[kGradients];  // of the unit prompt
};

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T values[4];
};

// Cosines and logits once more, exactly: by warps, a word each.
template <typename T>
__device__ void measure_chosen(const Perplexity& problem, std::int64_t row, float inverse_norm,
                               Chosen& chosen) {
  const float* prompt = problem.prompts + row * problem.width;
  const float* hidden = problem.hidden + row * problem.width;
  const int lane = threadIdx.x % kWarp;
  for (int j = threadIdx.x / kWarp; j < chosen.count; j += kMergeWarps) {
    const int word = chosen.words[j];
    const T* embedding = static_cast<const T*>(problem.embedding) + word * problem.width;
    float dot = 0, logit = 0, squares = 0;
    for (int c = lane * 4; c < problem.width; c += kWarp * 4) {
      const auto e = *reinterpret_cast<const Four<T>*>(embedding + c);
      const auto x = *reinterpret_cast<const Four<float>*>(prompt + c);
      const auto h = *reinterpret_cast<const Four<float>*>(hidden + c);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float value = widen(e.values[i]);
        dot += x.values[i] * inverse_norm * value;
        logit += h.values[i] * value;
        squares += value * value;
      }
    }
    dot = sum_over_warp(dot);
    logit = sum_over_warp(logit);
    squares = sum_over_warp(squares);
    if (lane == 0) {
      const float of_word = problem.inverse_norms ? problem.inverse_norms[word]
                                                  : 1 / fmaxf(sqrtf(squares), kNormFloor);
      chosen.cosines[j] = dot * of_word;
      chosen.logits[j] = logit;
      chosen.inverse_norms[j] = of_word;
    }
  }
}

struct Terms {
  float perplexity;
  float inverted;
};

// By one warp: both terms, and how the gradients come from the words.
__device__ Terms terms_of_chosen(const Perplexity& problem, float log_normaliser,
                                 float inverse_norm, Chosen& chosen) {
  constexpr int kPerLane = kMostTopK / kWarp;
  const int lane = threadIdx.x % kWarp;
  float temperature = static_cast<float>(problem.temperature_factor);
  if (problem.temperature) temperature *= *problem.temperature;

  const auto each = [&](auto&& use) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (lane + i * kWarp < chosen.count) use(i, lane + i * kWarp);
    }
  };
  float label[kPerLane], similarity[kPerLane], share[kPerLane];
  float top_similarity = -INFINITY, top_logit = -INFINITY;
  each([&](int i, int j) {
    similarity[i] = chosen.cosines[j] / temperature;
    top_similarity = fmaxf(top_similarity, similarity[i]);
    top_logit = fmaxf(top_logit, chosen.logits[j]);
  });
  top_similarity = largest_over_warp(top_similarity);
  top_logit = largest_over_warp(top_logit);
  float label_sum = 0, share_sum = 0;
  each([&](int i, int j) {
    label[i] = expf(similarity[i] - top_similarity);
    share[i] = expf(chosen.logits[j] - top_logit);
    label_sum += label[i];
    share_sum += share[i];
  });
  label_sum = sum_over_warp(label_sum);
  share_sum = sum_over_warp(share_sum);

  Terms terms{0, 0};
  float mean_similarity = 0, mean_logit = 0;
  each([&](int i, int j) {
    label[i] /= label_sum;
    share[i] /= share_sum;
    terms.perplexity -= label[i] * (chosen.logits[j] - log_normaliser);
    terms.inverted -= share[i] * (similarity[i] - top_similarity - logf(label_sum));
    mean_similarity += share[i] * (similarity[i] - top_similarity);
    mean_logit += label[i] * (chosen.logits[j] - top_logit);
  });
  terms.perplexity = sum_over_warp(terms.perplexity);
  terms.inverted = sum_over_warp(terms.inverted);
  mean_similarity = sum_over_warp(mean_similarity);
  mean_logit = sum_over_warp(mean_logit);

  const float to_cosine = inverse_norm / temperature;
  float pulls[2] = {0, 0};
  each([&](int i, int j) {
    const float of_inverted = (label[i] - share[i]) * to_cosine;
    const float of_perplexity =
        label[i] * (mean_logit - (chosen.logits[j] - top_logit)) * to_cosine;
    chosen.coefficients[0][j] = -label[i];
    chosen.coefficients[1][j] = of_inverted * chosen.inverse_norms[j];
    chosen.coefficients[2][j] = of_perplexity * chosen.inverse_norms[j];
    chosen.coefficients[3][j] = share[i] * (mean_similarity - (similarity[i] - top_similarity));
    pulls[0] += of_inverted * chosen.cosines[j];
    pulls[1] += of_perplexity * chosen.cosines[j];
  });
  pulls[0] = sum_over_warp(pulls[0]);
  pulls[1] = sum_over_warp(pulls[1]);
  if (lane == 0) {
    chosen.pulls[0] = chosen.pulls[3] = 0;
    chosen.pulls[1] = pulls[0];
    chosen.pulls[2] = pulls[1];
  }
  return terms;
}

// A block for each row and each slice of the width.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_splits(const Perplexity problem, const Partials partials) {
  const std::int64_t row = blockIdx.y;
  const int thread = threadIdx.x;
  const int first_column = blockIdx.x * kSlice;
  const int splits = partials.splits;
  const int lists = splits * partials.teams;
  const int top_k = static_cast<int>(problem.top_k);
  float* const results[kGradients] = {problem.perplexity_to_hidden, problem.inverted_to_prompts,
                                      problem.perplexity_to_prompts, problem.inverted_to_hidden};
  float* const result = results[thread / kSlice];
  const std::int64_t at = row * problem.width + first_column + thread % kSlice;

  extern __shared__ float4 shared[];
  float* scores = reinterpret_cast<float*>(shared);
  int* words = reinterpret_cast<int*>(scores + lists * top_k);
  int* positions = words + lists * top_k;
  float* factors = reinterpret_cast<float*>(positions + lists);
  __shared__ float of_warps[2][kMaxWarps];
  __shared__ float expected[kSplitGroups][kSlice];
  __shared__ float sums[kWordGroups][kGradients][kSlice];
  __shared__ Chosen chosen;

  for (int i = thread; i < lists * top_k; i += kMergeThreads) {
    scores[i] = partials.scores[row * lists * top_k + i];
    words[i] = partials.words[row * lists * top_k + i];
  }
  float top = -INFINITY;
  for (int s = thread; s < splits; s += kMergeThreads) {
    top = fmaxf(top, partials.tops[row * splits + s]);
  }
  top =
      reduced_over_block(top, -INFINITY, of_warps[0], [](float a, float b) { return fmaxf(a, b); });
  float sum = 0;
  for (int s = thread; s < splits; s += kMergeThreads) {
    factors[s] = rescaling(partials.tops[row * splits + s], top);
    sum += factors[s] * partials.sums[row * splits + s];
  }
  sum = reduced_over_block(sum, 0.0f, of_warps[1], [](float a, float b) { return a + b; });

  // Of a value that is not finite in the row, or in a word that counts. All threads leave.
  const float norm = partials.norms[row];
  if (isnan(norm + sum)) {
    if (result) result[at] = NAN;
    if (blockIdx.x == 0 && thread == 0) problem.perplexity[row] = problem.inverted[row] = NAN;
    return;
  }
  const float inverse_norm = norm == 0 ? 0 : 1 / norm;

  // One warp chooses while the others go on: they wait for it after the sums over the splits.
  if (thread < kWarp) {
    const int count = ListMerger(scores, words, positions, lists, top_k).run(chosen.words);
    if (thread == 0) chosen.count = count;
  }
  constexpr int kColumnGroups = kSlice / 4;
  const int column_group = thread % kColumnGroups * 4;
  float4 of_splits = make_float4(0, 0, 0, 0);
#pragma unroll 4
  for (int s = thread / kColumnGroups; s < splits; s += kSplitGroups) {
    const float4 part = *reinterpret_cast<const float4*>(
        partials.expected + (row * splits + s) * problem.width + first_column + column_group);
    of_splits.x += factors[s] * part.x;
    of_splits.y += factors[s] * part.y;
    of_splits.z += factors[s] * part.z;
    of_splits.w += factors[s] * part.w;
  }
  *reinterpret_cast<float4*>(&expected[thread / kColumnGroups][column_group]) = of_splits;
  __syncthreads();

  measure_chosen<T>(problem, row, inverse_norm, chosen);
  __syncthreads();
  if (thread < kWarp) {
    const Terms terms = terms_of_chosen(problem, top + logf(sum), inverse_norm, chosen);
    if (blockIdx.x == 0 && thread == 0) {
      problem.perplexity[row] = terms.perplexity;
      problem.inverted[row] = terms.inverted;
    }
  }
  __syncthreads();

  float of_words[kGradients] = {};
  const int column = thread % kSlice;
  for (int j = thread / kSlice; j < chosen.count; j += kWordGroups) {
    const T* embedding = static_cast<const T*>(problem.embedding) + chosen.words[j] * problem.width;
    const float value = widen(embedding[first_column + column]);
#pragma unroll
    for (int i = 0; i < kGradients; ++i) of_words[i] += chosen.coefficients[i][j] * value;
  }
#pragma unroll
  for (int i = 0; i < kGradients; ++i) sums[thread / kSlice][i][column] = of_words[i];
  __syncthreads();

  if (!result) return;
  const int gradient = thread / kSlice;
  float value = 0;
  for (int group = 0; group < kWordGroups; ++group) value += sums[group][gradient][column];
  if (gradient == 0 && chosen.count > 0) {
    float of_vocabulary = 0;
    for (int group = 0; group < kSplitGroups; ++group) of_vocabulary += expected[group][column];
    value += of_vocabulary / sum;
  }
  result[at] = value - chosen.pulls[gradient] * (problem.prompts[at] * inverse_norm);
}

constexpr std::size_t kAlignment = 256;

std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

bool is_aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

[[noreturn]] void fail(cudaError_t error) {
  throw std::runtime_error(std::string("perplexity_cuda: ") + cudaGetErrorString(error));
}

void check(cudaError_t error) {
  if (error != cudaSuccess) fail(error);
}

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// Of the shared memory of a block, as much is left for what is declared in merge_splits.
constexpr std::size_t kDeclared = 16 * 1024;

std::size_t memory_of_block() {
  return static_cast<std::size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// How a problem is cut up on the current device.
struct Plan {
  bool served;
  int panels;
  int stages;
  Layout layout;
  Partials partials;
  std::size_t workspace;
};

template <typename T, int kSteps>
Layout layout_of(const Perplexity& problem, int stages) {
  constexpr int words = kTileWords<kSteps>;
  const int top_k = static_cast<int>(problem.top_k);
  int end = 0;
  const auto take = [&end](std::size_t bytes) {
    const int offset = end;
    end += static_cast<int>((bytes + 15) / 16 * 16);
    return offset;
  };
  Layout layout{};
  // 16 bytes more than a multiple of 128: eight words side by side use all banks.
  layout.pitch = static_cast<int>(problem.width * sizeof(T)) + 16;
  layout.tile = words * layout.pitch;
  take(std::size_t(stages) * layout.tile);
  layout.partials = take(sizeof(float) * kTeamWarps * 2 * kPanel * (words + kPadding));
  layout.squares = take(sizeof(float) * kTeamWarps * words);
  layout.weights = take(sizeof(float) * kPanel * (words + kPadding));
  layout.rows = take(sizeof(RowMemory));
  layout.scores = take(sizeof(float) * kPanel * top_k);
  layout.words = take(sizeof(int) * kPanel * top_k);
  layout.bytes = end;
  return layout;
}

std::size_t merge_memory(const Perplexity& problem, const Partials& partials) {
  const std::size_t lists = std::size_t{1} * partials.splits * partials.teams;
  return lists * problem.top_k * (sizeof(float) + sizeof(int)) + lists * sizeof(int) +
         partials.splits * sizeof(float);
}

// The pointers of the partials, from the start of a workspace; gives back its size.
std::size_t place(const Perplexity& problem, char* workspace, Partials& partials) {
  std::size_t end = 0;
  const auto take = [&](std::size_t count) {
    char* const begin = workspace + end;
    end += aligned(count * sizeof(float));
    return begin;
  };
  const std::size_t rows = problem.rows, splits = rows * partials.splits;
  const std::size_t candidates = splits * partials.teams * problem.top_k;
  partials.norms = reinterpret_cast<float*>(take(rows));
  partials.tops = reinterpret_cast<float*>(take(splits));
  partials.sums = reinterpret_cast<float*>(take(splits));
  partials.expected = reinterpret_cast<float*>(take(splits * problem.width));
  partials.scores = reinterpret_cast<float*>(take(candidates));
  partials.words = reinterpret_cast<int*>(take(candidates));
  return end;
}

template <typename T, int kSteps>
Plan plan_of(const Perplexity& problem) {
  const std::size_t memory = memory_of_block();
  Plan plan{};
  for (int teams = kTeamsAtMost<T, kSteps>; teams > 0 && !plan.served; --teams) {
    for (int stages = 2; stages > 0 && !plan.served; --stages) {
      plan.layout = layout_of<T, kSteps>(problem, stages);
      plan.stages = stages;
      plan.partials.teams = teams;
      plan.served = std::size_t(teams) * plan.layout.bytes <= memory;
    }
  }
  if (!plan.served) return plan;

  const std::int64_t tiles = (problem.words + kTileWords<kSteps> - 1) / kTileWords<kSteps>;
  const int teams = plan.partials.teams;
  plan.panels = static_cast<int>((problem.rows + kPanel - 1) / kPanel);
  const std::int64_t splits = device_attribute(cudaDevAttrMultiProcessorCount) / plan.panels;
  plan.partials.splits =
      static_cast<int>(std::max<std::int64_t>(1, std::min(splits, (tiles + teams - 1) / teams)));
  plan.served = merge_memory(problem, plan.partials) + kDeclared <= memory;
  plan.workspace = place(problem, nullptr, plan.partials);
  return plan;
}

// The same for every problem: threads of the host that launch at once set the same limit.
template <typename... Parameters>
void allow_memory(void (*kernel)(Parameters...), std::size_t bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)));
}

template <typename T, int kSteps>
void launch(const Perplexity& problem, void* workspace, cudaStream_t stream) {
  Plan plan = plan_of<T, kSteps>(problem);
  place(problem, static_cast<char*>(workspace), plan.partials);

  const std::size_t memory = memory_of_block();
  const std::size_t sweep_bytes = std::size_t{1} * plan.partials.teams * plan.layout.bytes;
  allow_memory(sweep_words<T, kSteps>, memory);
  const dim3 sweep_grid(plan.panels, plan.partials.splits);
  const int sweep_threads = plan.partials.teams * kTeam;
  sweep_words<T, kSteps><<<sweep_grid, sweep_threads, sweep_bytes, stream>>>(
      problem, plan.layout, plan.partials, plan.stages);
  check(cudaGetLastError());

  const std::size_t merge_bytes = merge_memory(problem, plan.partials);
  allow_memory(merge_splits<T>, memory - kDeclared);
  const dim3 merge_grid(static_cast<unsigned>(problem.width / kSlice),
                        static_cast<unsigned>(problem.rows));
  merge_splits<T><<<merge_grid, kMergeThreads, merge_bytes, stream>>>(problem, plan.partials);
  check(cudaGetLastError());
}

bool is_served(const Perplexity& problem) {
  return problem.rows > 0 && problem.rows <= kMostRows && problem.top_k > 0 &&
         problem.top_k <= kMostTopK && problem.width > 0 && problem.width <= 1024 &&
         problem.width % kSlice == 0 && problem.words > 0 &&
         problem.words <= std::numeric_limits<int>::max() - kMostTopK &&
         problem.embedding_dtype != DType::kFloat64 && is_aligned(problem.embedding) &&
         is_aligned(problem.prompts) && is_aligned(problem.hidden);
}

// Calls `use` with a null pointer to the type of the embedding, and the steps of a warp.
template <typename Use>
auto with_sizes(const Perplexity& problem, Use use) {
  const auto of_type = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kUnit = sizeof(T);
    if (problem.width <= 512) return use(type, std::integral_constant<int, 2 * kUnit>());
    // Width 768 is as common as 1024 where the embedding is in half precision.
    if constexpr (sizeof(T) == 2) {
      if (problem.width <= 768) return use(type, std::integral_constant<int, 3 * kUnit>());
    }
    return use(type, std::integral_constant<int, 4 * kUnit>());
  };
  switch (problem.embedding_dtype) {
    case DType::kBFloat16:
      return of_type(static_cast<__nv_bfloat16*>(nullptr));
    case DType::kFloat16:
      return of_type(static_cast<__half*>(nullptr));
    default:
      return of_type(static_cast<float*>(nullptr));
  }
}

}  // namespace

std::size_t perplexity_cuda_workspace(const Perplexity& problem) {
  if (!is_served(problem)) return 0;
  return with_sizes(problem, [&](auto* type, auto steps) {
    const Plan plan = plan_of<std::remove_pointer_t<decltype(type)>, steps()>(problem);
    return plan.served ? plan.workspace : 0;
  });
}

void perplexity_cuda(const Perplexity& problem, void* workspace, void* stream) {
  with_sizes(problem, [&](auto* type, auto steps) {
    launch<std::remove_pointer_t<decltype(type)>, steps()>(problem, workspace,
                                                           static_cast<cudaStream_t>(stream));
  });
}

}  // namespace vlfast
