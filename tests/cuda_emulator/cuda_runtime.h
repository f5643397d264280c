#pragma once

// As much of CUDA's language and runtime as our kernels use, for a C++ compiler.

#include <limits.h>
#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define threadIdx (emulated::thread_index())
#define blockIdx (emulated::block_index)
#define blockDim (emulated::block)
#define gridDim (emulated::grid)

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;
using cudaError_t = const char*;
constexpr cudaError_t cudaSuccess = nullptr;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t emulated_set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute,
                                 int value) {
  return emulated_set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

inline void __syncthreads(int line = __builtin_LINE()) {
  emulated::wait_at_barrier(0, blockDim.x * blockDim.y * blockDim.z, line);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  emulated::cooperate(mask, line, nullptr, [](void* const*) {});
}

namespace emulated {

// Each lane gets what the lane of `source` has, or its own value for a source outside the warp.
template <typename T>
T exchanged(unsigned mask, T value, int source, int line) {
  struct Request {
    T value;
    int source;
    T result;
    bool answered;
  } mine{value, source, value, true};
  cooperate(mask, line, &mine, [](void* const* requests) {
    for (int l = 0; l < kWarp; ++l) {
      auto* request = static_cast<Request*>(requests[l]);
      if (request == nullptr || request->source < 0 || request->source >= kWarp) continue;
      const auto* other = static_cast<const Request*>(requests[request->source]);
      request->answered = other != nullptr;
      if (other) request->result = other->value;
    }
  });
  if (!mine.answered) fail("a shuffle from a lane outside the mask, line " + std::to_string(line));
  return mine.result;
}

// Every lane gets the values of all lanes, merged.
template <typename T, typename Merge>
T merged_over_warp(unsigned mask, T value, int line, Merge) {
  struct Request {
    T value;
  } mine{value};
  cooperate(mask, line, &mine, [](void* const* requests) {
    bool first = true;
    T result{};
    for (int l = 0; l < kWarp; ++l) {
      const auto* request = static_cast<const Request*>(requests[l]);
      if (request == nullptr) continue;
      result = first ? request->value : Merge::merge(result, request->value);
      first = false;
    }
    for (int l = 0; l < kWarp; ++l) {
      if (requests[l]) static_cast<Request*>(requests[l])->value = result;
    }
  });
  return mine.value;
}

struct Or {
  static unsigned merge(unsigned a, unsigned b) { return a | b; }
};
struct Larger {
  static unsigned merge(unsigned a, unsigned b) { return a > b ? a : b; }
};
struct Smaller {
  static unsigned merge(unsigned a, unsigned b) { return a < b ? a : b; }
};

}  // namespace emulated

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  return emulated::exchanged(mask, value, source & 31, line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int offset, int line = __builtin_LINE()) {
  return emulated::exchanged(mask, value, emulated::lane() + offset, line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  return emulated::exchanged(mask, value, emulated::lane() ^ lanes, line);
}
inline unsigned __ballot_sync(unsigned mask, bool vote, int line = __builtin_LINE()) {
  const unsigned bit = vote ? 1u << emulated::lane() : 0u;
  return emulated::merged_over_warp(mask, bit, line, emulated::Or());
}
inline bool __any_sync(unsigned mask, bool vote, int line = __builtin_LINE()) {
  return __ballot_sync(mask, vote, line) != 0;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, int line = __builtin_LINE()) {
  return emulated::merged_over_warp(mask, value, line, emulated::Larger());
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, int line = __builtin_LINE()) {
  return emulated::merged_over_warp(mask, value, line, emulated::Smaller());
}

namespace emulated {

template <typename To, typename From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace emulated

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float __expf(float x) { return ::exp2f(x * 1.44269504f); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline unsigned __float_as_uint(float x) { return emulated::bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulated::bits<float>(x); }
