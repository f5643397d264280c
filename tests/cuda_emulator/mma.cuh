#pragma once

// The functions of csrc/cuda/mma.cuh, with the layouts that the PTX manual documents.

#include <cstdint>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace vlfast {

inline void copy_16_bytes(void* shared, const void* global, bool valid) {
  const auto address = reinterpret_cast<std::uintptr_t>(shared);
  if (address % 16 || (valid && reinterpret_cast<std::uintptr_t>(global) % 16)) {
    emulated::fail("a copy of 16 bytes that is not aligned");
  }
  emulated::copy_asynchronously(shared, global, valid ? 16 : 0, valid ? 0 : 16);
}

inline void commit_copies() { emulated::commit_copies(); }

template <int kPending>
void wait_for_copies() {
  emulated::wait_for_copies(kPending);
}

inline float computed_anew(float x) { return x; }

inline void named_barrier(int id, int threads, int line = __builtin_LINE()) {
  emulated::wait_at_barrier(id, threads, line);
}

namespace emulated_mma {

struct Rows {
  const char* address;
  std::uint32_t* to;
};

template <bool kTransposed>
void load(const void* shared, std::uint32_t (&to)[4], int line) {
  Rows mine{static_cast<const char*>(shared), to};
  if (reinterpret_cast<std::uintptr_t>(shared) % 16) emulated::fail("a matrix is not aligned");
  emulated::cooperate(0xffffffffu, line, &mine, [](void* const* lanes) {
    for (int m = 0; m < 4; ++m) {
      std::uint16_t matrix[8][8];
      for (int row = 0; row < 8; ++row) {
        std::memcpy(matrix[row], static_cast<Rows*>(lanes[8 * m + row])->address, 16);
      }
      for (int l = 0; l < 32; ++l) {
        const int g = l / 4, d = l % 4 * 2;
        const std::uint16_t first = kTransposed ? matrix[d][g] : matrix[g][d];
        const std::uint16_t second = kTransposed ? matrix[d + 1][g] : matrix[g][d + 1];
        static_cast<Rows*>(lanes[l])->to[m] = first | std::uint32_t(second) << 16;
      }
    }
  });
}

struct Operands {
  float* c;
  const std::uint32_t* a;
  const std::uint32_t* b;
};

inline float widened(std::uint16_t bits, __half*) { return __half2float({bits}); }
inline float widened(std::uint16_t bits, __nv_bfloat16*) { return __bfloat162float({bits}); }

template <typename T>
constexpr int kDepth = sizeof(T) == 2 ? 16 : 8;

// The values that a register holds, put into a row or a column of neighbours in depth.
template <typename T>
void unpack(std::uint32_t bits, int t, int half, float* depth, int stride) {
  if constexpr (sizeof(T) == 2) {
    depth[(2 * t + 8 * half) * stride] = widened(std::uint16_t(bits), static_cast<T*>(nullptr));
    depth[(2 * t + 1 + 8 * half) * stride] =
        widened(std::uint16_t(bits >> 16), static_cast<T*>(nullptr));
  } else {
    depth[(t + 4 * half) * stride] = __uint_as_float(bits & 0xffffe000u);
  }
}

// Tensor cores truncate their sums.
inline float towards_zero(double x) {
  const float rounded = float(x);
  return fabs(double(rounded)) > fabs(x) ? nextafterf(rounded, 0.0f) : rounded;
}

}  // namespace emulated_mma

inline void load_matrices(const void* shared, std::uint32_t (&to)[4], int line = __builtin_LINE()) {
  emulated_mma::load<false>(shared, to, line);
}

inline void load_transposed_matrices(const void* shared, std::uint32_t (&to)[4],
                                     int line = __builtin_LINE()) {
  emulated_mma::load<true>(shared, to, line);
}

template <typename T>
void multiply(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
              int line = __builtin_LINE()) {
  using namespace emulated_mma;
  Operands mine{c, a, b};
  emulated::cooperate(0xffffffffu, line, &mine, [](void* const* lanes) {
    constexpr int depth = kDepth<T>;
    float left[16][depth], right[depth][8];
    for (int l = 0; l < 32; ++l) {
      const auto* lane = static_cast<const Operands*>(lanes[l]);
      const int g = l / 4, t = l % 4;
      for (int r = 0; r < 4; ++r) unpack<T>(lane->a[r], t, r / 2, left[g + r % 2 * 8], 1);
      for (int r = 0; r < 2; ++r) unpack<T>(lane->b[r], t, r, &right[0][g], 8);
    }
    double product[16][8] = {};
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < depth; ++k) {
        for (int column = 0; column < 8; ++column) {
          product[row][column] += double(left[row][k]) * double(right[k][column]);
        }
      }
    }
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      float* sums = static_cast<Operands*>(lanes[l])->c;
      for (int r = 0; r < 4; ++r) {
        sums[r] = towards_zero(sums[r] + product[g + r / 2 * 8][2 * t + r % 2]);
      }
    }
  });
}

}  // namespace vlfast
