#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// The instructions of sm_80 and later that C++ has no words for. tests/cuda_emulator has each of
// these functions for the CPU.
namespace vlfast {

__device__ inline std::uint32_t shared_address(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

// Enqueues the copy of 16 bytes to shared memory; zeros instead where not `valid`.
__device__ inline void copy_16_bytes(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

// Ends a group of copies of this thread.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until this thread has at most so many groups under way.
template <int kPending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Waits for the `threads` threads that share barrier `id`, from 1 to 15.
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Four matrices of 8 rows of 16 bytes. Lane l gives the address of row l % 8 of matrix l / 8, and
// gets 4 bytes of each matrix: those at 4 * (l % 4) of row l / 4.
__device__ inline void load_matrices(const void* shared, std::uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(shared))
               : "memory");
}

// The same of matrices of 8 x 8 halves, transposed: a lane gets column l / 4 of the rows
// 2 * (l % 4) and the next.
__device__ inline void load_transposed_matrices(const void* shared, std::uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(shared))
               : "memory");
}

// x, from which the compiler keeps nothing in registers across iterations of a loop.
__device__ inline float computed_anew(float x) {
  asm volatile("" : "+f"(x));
  return x;
}

// c [16, 8] += a [16, depth] b [depth, 8], the depth 16 for halves and 8 for floats, of which 11
// bits of the mantissa count. With g = lane / 4 and t = lane % 4, a lane holds
//   c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
//   halves, two a register, of neighbours in depth, d = 2t:
//     a: (g, d), (g + 8, d), (g, d + 8), (g + 8, d + 8)    b: (d, g), (d + 8, g)
//   floats: a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)    b: (t, g), (t + 4, g)
#define VLFAST_MULTIPLY(SHAPE_AND_TYPES)                                          \
  asm volatile("mma.sync.aligned." SHAPE_AND_TYPES                                \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <typename T>
__device__ void multiply(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);

template <>
__device__ inline void multiply<__half>(float (&c)[4], const std::uint32_t (&a)[4],
                                        const std::uint32_t (&b)[2]) {
  VLFAST_MULTIPLY("m16n8k16.row.col.f32.f16.f16.f32");
}

template <>
__device__ inline void multiply<__nv_bfloat16>(float (&c)[4], const std::uint32_t (&a)[4],
                                               const std::uint32_t (&b)[2]) {
  VLFAST_MULTIPLY("m16n8k16.row.col.f32.bf16.bf16.f32");
}

template <>
__device__ inline void multiply<float>(float (&c)[4], const std::uint32_t (&a)[4],
                                       const std::uint32_t (&b)[2]) {
  VLFAST_MULTIPLY("m16n8k8.row.col.f32.tf32.tf32.f32");
}

#undef VLFAST_MULTIPLY

}  // namespace vlfast
