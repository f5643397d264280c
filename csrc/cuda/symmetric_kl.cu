#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "reduce.cuh"
#include "scalar.cuh"
#include "vlfast/kl_terms.h"
#include "vlfast/symmetric_kl.h"

namespace vlfast {
namespace {

constexpr int kMaxThreads = 512;
// So that one block loads while another computes. Double has too few registers for it.
template <typename C>
constexpr int kBlocksPerMultiprocessor = sizeof(C) == 4 ? 2 : 1;

// Neighbours in a row, read and written by one instruction.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

// A scale, of which its sign and a quarter go to the logits: the largest one is on top, and even of
// the largest finite numbers the difference of two differences is finite.
template <typename C>
struct Scale {
  C size;
  C of_logits;
};

template <typename C>
__device__ Scale<C> scale_of(double factor, const void* value) {
  C scale = static_cast<C>(factor);
  if (value) scale *= *static_cast<const C*>(value);
  return scale < 0 ? Scale<C>{-4 * scale, C(-0.25)} : Scale<C>{4 * scale, C(0.25)};
}

// What the first sweep gathers over some of the classes, relative to the top logits among these.
// No class yet: the sums are 0, and the tops mean nothing.
template <typename C>
struct Sums {
  C student_top;
  C teacher_at_top;  // of the student's top class
  C teacher_top;
  C student;   // sum of exp(s)
  C teacher;   // sum of exp(t)
  C from_top;  // sum of exp(s) * from_top()
};

template <typename C>
__device__ Sums<C> no_sums() {
  constexpr C lowest = -INFINITY;
  return {lowest, 0, lowest, 0, 0, 0};
}

// What the second sweep gathers.
template <typename C>
struct Losses {
  C forward;
  C reverse;
  C gradient_of_scale;
};

template <typename T, typename C, typename G, int kWidth>
class RowSolver {
 public:
  __device__ RowSolver(const SymmetricKL& problem, std::int64_t row)
      : student_(static_cast<const T*>(problem.student) + row * problem.classes),
        teacher_(static_cast<const T*>(problem.teacher) + row * problem.teacher_classes),
        teacher_classes_(problem.teacher_classes),
        index_(problem.index),
        gradient_(problem.gradient ? static_cast<G*>(problem.gradient) + row * problem.classes
                                   : nullptr),
        classes_(problem.classes),
        student_scale_(scale_of<C>(problem.student_factor, problem.student_scale)),
        teacher_scale_(scale_of<C>(problem.teacher_factor, problem.teacher_scale)),
        ratio_(teacher_scale_.size / student_scale_.size),
        share_(student_scale_.size / static_cast<C>(problem.classes)),
        forward_weight_(static_cast<C>(problem.forward_weight)),
        reverse_weight_(static_cast<C>(problem.reverse_weight)) {}

  // Over this thread's classes.
  __device__ Sums<C> first_sweep() const {
    Sums<C> sums = no_sums<C>();
#pragma unroll kUnroll
    for (std::int64_t c = first(); c < classes_; c += step()) {
      C student[kWidth], teacher[kWidth];
      load(c, student, teacher);
      C student_top = sums.student_top, teacher_at_top = sums.teacher_at_top;
      C teacher_top = sums.teacher_top;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        teacher_at_top = student[i] > student_top ? teacher[i] : teacher_at_top;
        student_top = larger(student_top, student[i]);
        teacher_top = larger(teacher_top, teacher[i]);
      }
      sums = moved(sums, student_top, teacher_at_top, teacher_top);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const C u = student[i] - student_top;
        const C v = teacher[i] - teacher_top;
        const C student_exp = exp_negative(u * student_scale_.size);
        sums.student += student_exp;
        sums.teacher += exp_negative(v * teacher_scale_.size);
        sums.from_top += student_exp * from_top(u, teacher[i] - teacher_at_top);
      }
    }
    return sums;
  }

  // `a` and `b` of other classes each.
  __device__ Sums<C> merged(Sums<C> a, Sums<C> b) const {
    const C student_top = larger(a.student_top, b.student_top);
    const C teacher_at_top = b.student_top > a.student_top ? b.teacher_at_top : a.teacher_at_top;
    const C teacher_top = larger(a.teacher_top, b.teacher_top);
    a = moved(a, student_top, teacher_at_top, teacher_top);
    b = moved(b, student_top, teacher_at_top, teacher_top);
    return {student_top,           teacher_at_top,        teacher_top,
            a.student + b.student, a.teacher + b.teacher, a.from_top + b.from_top};
  }

  // Over this thread's classes, with the sums of the whole row. Writes the gradient.
  __device__ Losses<C> second_sweep(const Sums<C>& sums) const {
    const C mean = sums.from_top / sums.student;
    const C of_reverse = reverse_weight_ * static_cast<C>(classes_);
    const C log_ratio = log(sums.teacher / sums.student);
    const C to_q = 1 / sums.student;
    const C to_p = 1 / sums.teacher;
    const C gradient_scale = student_scale_.size * student_scale_.of_logits;
    Losses<C> losses{0, 0, 0};
#pragma unroll kUnroll
    for (std::int64_t c = first(); c < classes_; c += step()) {
      C student[kWidth], teacher[kWidth];
      load(c, student, teacher);
      Pack<G, kWidth> gradients;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const C u = student[i] - sums.student_top;
        const C v = teacher[i] - sums.teacher_top;
        const C q = exp_negative(u * student_scale_.size) * to_q;
        const C p = exp_negative(v * teacher_scale_.size) * to_p;
        const KLTerms<C> terms = kl_terms(p, q, -gap(u, v) - log_ratio);
        losses.forward += terms.forward;
        losses.reverse += terms.reverse;
        const C above_mean = from_top(u, teacher[i] - sums.teacher_at_top) - mean;
        const C gradient = forward_weight_ * terms.difference + of_reverse * (q * above_mean);
        narrow(gradient * gradient_scale, gradients.values[i]);
        losses.gradient_of_scale += gradient * u;
      }
      if (gradient_) *reinterpret_cast<Pack<G, kWidth>*>(gradient_ + c) = gradients;
    }
    losses.gradient_of_scale /= student_scale_.of_logits;
    return losses;
  }

  __device__ C weighted(const Losses<C>& losses) const {
    return forward_weight_ * losses.forward + reverse_weight_ * losses.reverse;
  }

  __device__ void fill_gradient(C value) const {
    if (!gradient_) return;
    for (std::int64_t c = threadIdx.x; c < classes_; c += blockDim.x) narrow(value, gradient_[c]);
  }

 private:
  static constexpr int kUnroll = 8 / kWidth;

  __device__ std::int64_t first() const { return threadIdx.x * kWidth; }
  __device__ std::int64_t step() const { return blockDim.x * kWidth; }

  // The logits of kWidth classes, with their share of the scale. kWidth divides the number of
  // classes.
  __device__ void load(std::int64_t c, C (&student)[kWidth], C (&teacher)[kWidth]) const {
    const auto students = *reinterpret_cast<const Pack<T, kWidth>*>(student_ + c);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      student[i] = widen(students.values[i]) * student_scale_.of_logits;
    }
    if (index_) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        // Nobody has looked at the index on the host: outside the teacher stands NaN, not memory.
        const std::int64_t column = index_[c + i];
        const bool inside = column >= 0 && column < teacher_classes_;
        teacher[i] = inside ? widen(teacher_[column]) * teacher_scale_.of_logits : C(NAN);
      }
    } else {
      const auto teachers = *reinterpret_cast<const Pack<T, kWidth>*>(teacher_ + c);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        teacher[i] = widen(teachers.values[i]) * teacher_scale_.of_logits;
      }
    }
  }

  // The same sums relative to tops at least as high. Empty sums have no top to move from, which
  // might be minus infinity.
  __device__ Sums<C> moved(const Sums<C>& sums, C student_top, C teacher_at_top,
                           C teacher_top) const {
    const bool empty = sums.student == 0;
    const C u = empty ? C(0) : sums.student_top - student_top;
    const C v = empty ? C(0) : sums.teacher_top - teacher_top;
    const C at_top = empty ? C(0) : sums.teacher_at_top - teacher_at_top;
    const C factor = exp_negative(u * student_scale_.size);
    return {student_top,
            teacher_at_top,
            teacher_top,
            factor * sums.student,
            exp_negative(v * teacher_scale_.size) * sums.teacher,
            factor * (sums.from_top + sums.student * from_top(u, at_top))};
  }

  // s - t, as a difference that is 0 where both sides are the same, even if the compiler fuses a
  // product and a sum.
  __device__ C gap(C u, C v) const { return (u - ratio_ * v) * student_scale_.size; }

  // s - t of a class less that of the student's top class, by the differences of their logits, in
  // shares of 1 / classes, whose sum does not overflow. At the top class it is exactly 0: where the
  // student has hardly a doubt, the gradient is the small rest of this and its mean.
  __device__ C from_top(C u, C teacher_difference) const {
    return (u - ratio_ * teacher_difference) * share_;
  }

  const T* __restrict__ student_;
  const T* __restrict__ teacher_;
  std::int64_t teacher_classes_;
  const std::int64_t* __restrict__ index_;
  G* __restrict__ gradient_;
  std::int64_t classes_;
  Scale<C> student_scale_;
  Scale<C> teacher_scale_;
  C ratio_;
  C share_;
  C forward_weight_;
  C reverse_weight_;
};

// A block for each row. The second sweep finds the row in the cache.
template <typename T, typename C, typename G, int kWidth>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerMultiprocessor<C>)
    solve_rows(const SymmetricKL problem) {
  const std::int64_t row = blockIdx.x;
  const RowSolver<T, C, G, kWidth> solver(problem, row);

  __shared__ Sums<C> sums_of_warps[kMaxWarps];
  const Sums<C> sums =
      reduced_over_block(solver.first_sweep(), no_sums<C>(), sums_of_warps,
                         [&](const Sums<C>& a, const Sums<C>& b) { return solver.merged(a, b); });

  auto* loss = static_cast<C*>(problem.loss) + row;
  auto* gradient_of_scale = static_cast<C*>(problem.gradient_of_scale);
  // Any infinity or NaN in the row has reached this sum, as 0 * infinity at the least. It is the
  // same in all threads of the block, so all of them leave.
  if (!isfinite(sums.from_top)) {
    constexpr C nan = NAN;
    solver.fill_gradient(nan);
    if (threadIdx.x == 0) {
      *loss = nan;
      if (gradient_of_scale) gradient_of_scale[row] = nan;
    }
    return;
  }

  __shared__ Losses<C> losses_of_warps[kMaxWarps];
  const Losses<C> losses =
      reduced_over_block(solver.second_sweep(sums), Losses<C>{0, 0, 0}, losses_of_warps,
                         [](const Losses<C>& a, const Losses<C>& b) {
                           return Losses<C>{a.forward + b.forward, a.reverse + b.reverse,
                                            a.gradient_of_scale + b.gradient_of_scale};
                         });
  if (threadIdx.x == 0) {
    *loss = solver.weighted(losses);
    if (gradient_of_scale) gradient_of_scale[row] = losses.gradient_of_scale;
  }
}

template <typename T, typename C, typename G, int kWidth>
void launch(const SymmetricKL& problem, cudaStream_t stream) {
  int threads = kWarp;
  while (threads < kMaxThreads && 2 * threads * kWidth < problem.classes) threads *= 2;
  solve_rows<T, C, G, kWidth><<<static_cast<unsigned>(problem.rows), threads, 0, stream>>>(problem);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("symmetric_kl_cuda: ") + cudaGetErrorString(error));
  }
}

// Whether every row of every matrix starts where a pack of kWidth may.
template <typename T, typename G, int kWidth>
bool aligned(const SymmetricKL& problem) {
  const auto starts = [](const void* matrix, std::int64_t columns, std::size_t pack) {
    return columns % kWidth == 0 && reinterpret_cast<std::uintptr_t>(matrix) % pack == 0;
  };
  return starts(problem.student, problem.classes, sizeof(Pack<T, kWidth>)) &&
         starts(problem.gradient, problem.classes, sizeof(Pack<G, kWidth>)) &&
         (problem.index ||
          starts(problem.teacher, problem.teacher_classes, sizeof(Pack<T, kWidth>)));
}

template <typename T, typename C, typename G>
void launch_widest(const SymmetricKL& problem, cudaStream_t stream) {
  if constexpr (sizeof(C) == 4) {
    if (aligned<T, G, 4>(problem)) return launch<T, C, G, 4>(problem, stream);
  }
  if (aligned<T, G, 2>(problem)) return launch<T, C, G, 2>(problem, stream);
  launch<T, C, G, 1>(problem, stream);
}

}  // namespace

void symmetric_kl_cuda(const SymmetricKL& problem, void* stream_handle) {
  if (problem.rows == 0) return;
  if (problem.rows > std::numeric_limits<int>::max()) {
    throw std::runtime_error("symmetric_kl_cuda: more than 2^31 - 1 rows");
  }
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  switch (problem.dtype) {
    case DType::kFloat32:
      return launch_widest<float, float, float>(problem, stream);
    case DType::kFloat64:
      return launch_widest<double, double, double>(problem, stream);
    case DType::kBFloat16:
      return launch_widest<__nv_bfloat16, float, __nv_bfloat16>(problem, stream);
    case DType::kFloat16:
      return launch_widest<__half, float, float>(problem, stream);
  }
}

}  // namespace vlfast
