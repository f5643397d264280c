#pragma once

#include <cstdint>

#include "vlfast/dtype.h"

namespace vlfast {

// For each row, with s = student * student_scale and t = teacher * teacher_scale:
//
//   loss = forward_weight * KL(softmax(t) || softmax(s))
//        + reverse_weight * KL(softmax(s) || softmax(t))
//
// and its gradient to the student and to student_scale, in the same pass. A row with a value that
// is not finite gets NaN everywhere; other rows do not notice. Every result depends on its own row
// alone, and is the same on every run and for every number of threads.
//
// All matrices are row-major and contiguous; the results overlap nothing. "Compute type" is double
// where dtype is kFloat64, else float.
struct SymmetricKL {
  DType dtype;          // of student and teacher
  const void* student;  // [rows, classes]
  const void* teacher;  // [rows, teacher_classes]
  // [classes], the column of the teacher for each class, in [0, teacher_classes). Null: column c is
  // class c, and teacher_classes == classes.
  const std::int64_t* index;
  std::int64_t rows;
  std::int64_t classes;
  std::int64_t teacher_classes;

  // The scale of each side: its factor times, where the pointer is not null, the one value of
  // compute type that it points to (CUDA only: on the CPU the factor is the scale). Neither is 0.
  double student_factor;
  double teacher_factor;
  const void* student_scale;
  const void* teacher_scale;

  double forward_weight;
  double reverse_weight;

  void* loss;  // [rows], compute type
  // Null: no gradient is computed, and gradient_of_scale is not written either.
  void* gradient;           // [rows, classes], bfloat16 where dtype is kBFloat16, else compute type
  void* gradient_of_scale;  // [rows], compute type: with respect to the scale of the student
};

// Throws std::invalid_argument for an index outside the teacher.
void symmetric_kl_cpu(const SymmetricKL& problem, int threads);

// Enqueues one kernel on the stream (a cudaStream_t) of the current device and does not wait. An
// index outside the teacher gives NaN in every row, and is not read. The pointers are of that
// device. Throws std::runtime_error where the launch fails.
void symmetric_kl_cuda(const SymmetricKL& problem, void* stream);

}  // namespace vlfast
