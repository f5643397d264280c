#include <cuda_runtime.h>

#include <stdexcept>

#include "mma.cuh"

// Kernels with the mistakes that the emulator is there to find.
namespace vlfast {
namespace {

constexpr int kThreads = 64;

enum class Mistake : int {
  kNone,
  kNoBarrier,
  kBarrierOfSome,
  kExitBeforeBarrier,
  kTwoBarriers,
  kShuffleOfSome,
  kUninitialised,
  kNoWait,
  kOutOfBounds,
  kTooMuchMemory,
};

// Reverses the values of a block through shared memory.
__global__ void reverse(const float* from, float* to, Mistake mistake) {
  extern __shared__ float4 dynamic[];
  __shared__ float last[kThreads];
  float* values = reinterpret_cast<float*>(dynamic);
  const int i = threadIdx.x;
  if (mistake == Mistake::kUninitialised) {
    last[i] = values[i];
  } else if (mistake == Mistake::kNoWait) {
    if (i % 4 == 0) copy_16_bytes(values + i, from + i, true);
    commit_copies();
  } else {
    values[i + (mistake == Mistake::kOutOfBounds ? 1 : 0)] = from[i];
    last[i] = 0;
  }
  if (mistake == Mistake::kExitBeforeBarrier && i >= 40) return;
  if (mistake == Mistake::kBarrierOfSome) {
    if (i < 40) __syncthreads();
  } else if (mistake == Mistake::kTwoBarriers && i < 32) {
    __syncthreads();
  } else if (mistake == Mistake::kShuffleOfSome) {
    if (i % 2) last[i] = __shfl_xor_sync(0xffffffffu, last[i], 1);
  } else if (mistake != Mistake::kNoBarrier) {
    __syncthreads();
  }
  to[i] = values[kThreads - 1 - i] + (mistake == Mistake::kUninitialised ? last[i] : 0);
}

}  // namespace

void make_mistake(const float* from, float* to, int mistake) {
  const std::size_t bytes = Mistake(mistake) == Mistake::kTooMuchMemory ? 65536 : kThreads * 4;
  reverse<<<1, kThreads, bytes, nullptr>>>(from, to, Mistake(mistake));
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace vlfast
