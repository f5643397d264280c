#pragma once

#include "vlfast/inline.h"

namespace vlfast {

// What one class adds to the two divergences of the teacher's p and the student's q.
template <typename C>
struct KLTerms {
  C forward;     // to KL(p || q): p * (d + expm1(-d)), with d = log p - log q
  C reverse;     // to KL(q || p): q * (expm1(d) - d)
  C difference;  // q - p
};

// cosh(d) - 1 and sinh(d) - d for |d| <= 1, by their power series in x = d * d.
VLFAST_INLINE float cosh_minus_1(float x) {
  const float tail = 1 / 720.0f + x * (1 / 40320.0f + x * (1 / 3628800.0f));
  return x * (0.5f + x * (1 / 24.0f + x * tail));
}

VLFAST_INLINE float sinh_minus_d(float d, float x) {
  const float tail = 1 / 5040.0f + x * (1 / 362880.0f + x * (1 / 39916800.0f));
  return d * x * (1 / 6.0f + x * (1 / 120.0f + x * tail));
}

VLFAST_INLINE double cosh_minus_1(double x) {
  double sum = 0;
  for (int n = 18; n >= 2; n -= 2) sum = (1 + sum) * (x * (1.0 / (n * (n - 1))));
  return sum;
}

VLFAST_INLINE double sinh_minus_d(double d, double x) {
  double sum = 0;
  for (int n = 19; n >= 3; n -= 2) sum = (1 + sum) * (x * (1.0 / (n * (n - 1))));
  return d * sum;
}

// The terms from rounded p and q and d = log p - log q. The divergences are >= 0 and keep their
// relative precision where p and q nearly agree. Where they do not, nothing cancels, and q stands
// for p * exp(-d): p may have underflowed, and exp(-d) overflow.
template <typename C>
VLFAST_INLINE KLTerms<C> kl_terms(C p, C q, C d) {
  const C square = d * d;
  const C even = cosh_minus_1(square);
  const C odd = sinh_minus_d(d, square);
  const bool near = square <= 1;
  return {near ? p * (even - odd) : p * (d - 1) + q, near ? q * (even + odd) : p - q * (d + 1),
          near ? p * (even - odd - d) : q - p};
}

}  // namespace vlfast
