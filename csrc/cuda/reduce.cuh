#pragma once

#include <cuda_runtime.h>

#include <cstring>

namespace vlfast {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// `shuffle`, which moves an int between lanes, for any trivially copyable type.
template <typename V, typename Shuffle>
__device__ V shuffled(const V& value, Shuffle shuffle) {
  static_assert(sizeof(V) % sizeof(int) == 0);
  int words[sizeof(V) / sizeof(int)];
  memcpy(words, &value, sizeof value);
#pragma unroll
  for (int& word : words) word = shuffle(word);
  V result;
  memcpy(&result, words, sizeof result);
  return result;
}

// Lane 0 gets the values of all 32 lanes, merged in the order of a fixed tree. What other lanes
// get means nothing.
template <typename V, typename Merge>
__device__ V reduced_over_warp(V value, Merge merge) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const V further =
        shuffled(value, [offset](int word) { return __shfl_down_sync(kAllLanes, word, offset); });
    value = merge(value, further);
  }
  return value;
}

// Every thread gets the values of all threads of a block of whole warps, merged in a fixed order.
// `of_warps` is shared memory for kMaxWarps values, used for this reduction alone.
template <typename V, typename Merge>
__device__ V reduced_over_block(V value, const V& empty, V* of_warps, Merge merge) {
  const int lane = threadIdx.x % kWarp;
  const int warps = blockDim.x / kWarp;
  value = reduced_over_warp(value, merge);
  if (lane == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  // Each warp does this for itself, which saves a second synchronisation: all get the same bits.
  value = reduced_over_warp(lane < warps ? of_warps[lane] : empty, merge);
  return shuffled(value, [](int word) { return __shfl_sync(kAllLanes, word, 0); });
}

}  // namespace vlfast
