#include "vlfast/symmetric_kl.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "scalar.h"
#include "vlfast/kl_terms.h"
#include "widen.h"

namespace vlfast {
namespace {

// Below so many logits a side, waking other threads costs more than it saves.
constexpr std::int64_t kSerialLogits = 4096;

// Sums are taken over blocks of so many classes, then over the blocks: the rounding errors of a
// long row stay those of a short one.
constexpr std::int64_t kBlock = 512;

// The logits of each side whose scaled values are the largest.
template <typename C>
struct Tops {
  C student;
  C teacher;
  C beside;  // the teacher's of the class that is the student's top
};

// Kept lane by lane: a reduction does not carry a second value along.
template <typename C>
VLFAST_INLINE Tops<C> find_tops(const C* student, const C* teacher, std::int64_t classes,
                                C student_scale, C teacher_scale) {
  constexpr std::int64_t kLanes = 64 / sizeof(C);
  const C student_sign = student_scale < 0 ? C(-1) : C(1);
  const C teacher_sign = teacher_scale < 0 ? C(-1) : C(1);
  C students[kLanes], teachers[kLanes], beside[kLanes];
  std::fill_n(students, kLanes, student[0] * student_sign);
  std::fill_n(teachers, kLanes, teacher[0] * teacher_sign);
  std::fill_n(beside, kLanes, teacher[0]);
  const auto visit = [&](std::int64_t lane, C s, C t) {
    const bool higher = s > students[lane];
    beside[lane] = higher ? t : beside[lane];
    students[lane] = higher ? s : students[lane];
    teachers[lane] = t * teacher_sign > teachers[lane] ? t * teacher_sign : teachers[lane];
  };
  std::int64_t c = 0;
  for (; c + kLanes <= classes; c += kLanes) {
#pragma omp simd
    for (std::int64_t i = 0; i < kLanes; ++i)
      visit(i, student[c + i] * student_sign, teacher[c + i]);
  }
  for (; c < classes; ++c) visit(0, student[c] * student_sign, teacher[c]);
  const std::int64_t lane = std::max_element(students, students + kLanes) - students;
  return {students[lane] * student_sign,
          *std::max_element(teachers, teachers + kLanes) * teacher_sign, beside[lane]};
}

template <typename C>
struct Coefficients {
  C student_scale;
  C teacher_scale;
  C forward_weight;
  C reverse_weight;
};

template <typename C>
struct Row {
  const C* student;
  const C* teacher;
  C* student_exp;  // scratch
  C* teacher_exp;  // scratch
  C* gradient;     // null: none is wanted
};

template <typename C>
struct RowResult {
  C loss;
  C gradient_of_scale;
};

template <typename C, bool kGradient>
VLFAST_INLINE RowResult<C> solve(Row<C> row, std::int64_t classes, Coefficients<C> by) {
  // Names of their own, so that the compiler sees that no store changes them.
  const C* __restrict student = row.student;
  const C* __restrict teacher = row.teacher;
  C* __restrict student_exps = row.student_exp;
  C* __restrict teacher_exps = row.teacher_exp;
  C* __restrict gradients = row.gradient;
  const C student_scale = by.student_scale, teacher_scale = by.teacher_scale;
  const Tops<C> top = find_tops(student, teacher, classes, student_scale, teacher_scale);

  // A gap s - t is taken as scale * (u - ratio * v), which is 0 where both sides are the same even
  // if the compiler fuses a product and a sum. Those whose mean is subtracted are relative to the
  // gap of the student's top class, which may be all of the mean: the difference must be 0 then. Of
  // them shares are summed, and quarters subtracted, since each of the four logits may be as large
  // as the largest number.
  const C ratio = teacher_scale / student_scale;
  const C four_shares = 4 * student_scale / static_cast<C>(classes);
  C student_sum = 0, teacher_sum = 0, gap_sum = 0;
  for (std::int64_t begin = 0; begin < classes; begin += kBlock) {
    const std::int64_t end = std::min(begin + kBlock, classes);
    C student_part = 0, teacher_part = 0, gap_part = 0;
#pragma omp simd reduction(+ : student_part, teacher_part, gap_part)
    for (std::int64_t c = begin; c < end; ++c) {
      const C u = student[c] - top.student;
      const C student_exp = exp_negative(u * student_scale);
      const C teacher_exp = exp_negative((teacher[c] - top.teacher) * teacher_scale);
      student_exps[c] = student_exp;
      teacher_exps[c] = teacher_exp;
      student_part += student_exp;
      teacher_part += teacher_exp;
      gap_part += student_exp * ((u / 4 - ratio / 4 * (teacher[c] - top.beside)) * four_shares);
    }
    student_sum += student_part;
    teacher_sum += teacher_part;
    gap_sum += gap_part;
  }

  // Any infinity or NaN in the row has reached this sum, as 0 * infinity at the least.
  if (!std::isfinite(gap_sum)) {
    const C nan = std::numeric_limits<C>::quiet_NaN();
    if (kGradient) std::fill_n(gradients, classes, nan);
    return {nan, nan};
  }

  const C mean_gap = gap_sum / student_sum;
  const C log_ratio = std::log(teacher_sum / student_sum);
  const C to_q = 1 / student_sum, to_p = 1 / teacher_sum;
  const C forward_weight = by.forward_weight, reverse_weight = by.reverse_weight;
  const C reverse_gradient = reverse_weight * static_cast<C>(classes);
  C forward = 0, reverse = 0, of_scale = 0;
  for (std::int64_t begin = 0; begin < classes; begin += kBlock) {
    const std::int64_t end = std::min(begin + kBlock, classes);
    C forward_part = 0, reverse_part = 0, of_scale_part = 0;
#pragma omp simd reduction(+ : forward_part, reverse_part, of_scale_part)
    for (std::int64_t c = begin; c < end; ++c) {
      const C u = student[c] - top.student;
      const C v = teacher[c] - top.teacher;
      const C gap = (u - ratio * v) * student_scale;
      const C q = student_exps[c] * to_q;
      const C p = teacher_exps[c] * to_p;
      const KLTerms<C> terms = kl_terms(p, q, -gap - log_ratio);
      forward_part += terms.forward;
      reverse_part += terms.reverse;
      if (kGradient) {
        const C from_top = (u / 4 - ratio / 4 * (teacher[c] - top.beside)) * four_shares;
        const C gradient =
            forward_weight * terms.difference + reverse_gradient * (q * (from_top - mean_gap));
        gradients[c] = gradient * student_scale;
        of_scale_part += gradient * u;
      }
    }
    forward += forward_part;
    reverse += reverse_part;
    of_scale += of_scale_part;
  }
  return {forward_weight * forward + reverse_weight * reverse, of_scale};
}

VLFAST_DISPATCH RowResult<float> solve_row(Row<float> row, std::int64_t classes,
                                           Coefficients<float> by) {
  return row.gradient ? solve<float, true>(row, classes, by)
                      : solve<float, false>(row, classes, by);
}

RowResult<double> solve_row(Row<double> row, std::int64_t classes, Coefficients<double> by) {
  return row.gradient ? solve<double, true>(row, classes, by)
                      : solve<double, false>(row, classes, by);
}

VLFAST_DISPATCH void narrow_row(const float* from, std::int64_t classes, BFloat16* to) {
  for (std::int64_t c = 0; c < classes; ++c) narrow(from[c], to[c]);
}

// The row in compute type: itself, or a copy in `scratch`.
template <typename T, typename C>
const C* in_compute_type(const T* row, std::int64_t classes, C* scratch) {
  if constexpr (std::is_same_v<T, C>) {
    return row;
  } else {
    widen_row(row, classes, scratch);
    return scratch;
  }
}

template <typename T, typename C, typename G>
void solve_rows(const SymmetricKL& problem, int threads) {
  const std::int64_t classes = problem.classes;
  const auto* student = static_cast<const T*>(problem.student);
  const auto* teacher = static_cast<const T*>(problem.teacher);
  auto* loss = static_cast<C*>(problem.loss);
  auto* gradient = static_cast<G*>(problem.gradient);
  auto* gradient_of_scale = static_cast<C*>(problem.gradient_of_scale);
  const Coefficients<C> by{
      static_cast<C>(problem.student_factor), static_cast<C>(problem.teacher_factor),
      static_cast<C>(problem.forward_weight), static_cast<C>(problem.reverse_weight)};
  if (problem.rows * classes < kSerialLogits) threads = 1;
  threads = static_cast<int>(
      std::clamp<std::int64_t>(threads, 1, std::max<std::int64_t>(problem.rows, 1)));

#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (std::int64_t r = 0; r < problem.rows; ++r) {
    // Kept between calls: a fresh block of this size would be paged in anew each time.
    thread_local std::vector<C> scratch;
    if (scratch.size() < static_cast<std::size_t>(5 * classes)) scratch.resize(5 * classes);
    C* const blocks[] = {&scratch[0], &scratch[classes], &scratch[2 * classes],
                         &scratch[3 * classes], &scratch[4 * classes]};
    const T* teacher_row = teacher + r * problem.teacher_classes;
    Row<C> row{};
    row.student = in_compute_type(student + r * classes, classes, blocks[0]);
    if (problem.index) {
      for (std::int64_t c = 0; c < classes; ++c)
        blocks[1][c] = widen(teacher_row[problem.index[c]]);
      row.teacher = blocks[1];
    } else {
      row.teacher = in_compute_type(teacher_row, classes, blocks[1]);
    }
    row.student_exp = blocks[2];
    row.teacher_exp = blocks[3];
    if (gradient) {
      if constexpr (std::is_same_v<G, C>) {
        row.gradient = gradient + r * classes;
      } else {
        row.gradient = blocks[4];
      }
    }
    const RowResult<C> result = solve_row(row, classes, by);
    loss[r] = result.loss;
    if (gradient) {
      gradient_of_scale[r] = result.gradient_of_scale;
      if constexpr (!std::is_same_v<G, C>)
        narrow_row(row.gradient, classes, gradient + r * classes);
    }
  }
}

}  // namespace

void symmetric_kl_cpu(const SymmetricKL& problem, int threads) {
  for (std::int64_t c = 0; problem.index && c < problem.classes; ++c) {
    if (problem.index[c] < 0 || problem.index[c] >= problem.teacher_classes) {
      throw std::invalid_argument("index: expected values from 0 to " +
                                  std::to_string(problem.teacher_classes - 1) + ", got " +
                                  std::to_string(problem.index[c]));
    }
  }
  switch (problem.dtype) {
    case DType::kFloat32:
      return solve_rows<float, float, float>(problem, threads);
    case DType::kFloat64:
      return solve_rows<double, double, double>(problem, threads);
    case DType::kBFloat16:
      return solve_rows<BFloat16, float, BFloat16>(problem, threads);
    case DType::kFloat16:
      return solve_rows<Float16, float, float>(problem, threads);
  }
}

}  // namespace vlfast
