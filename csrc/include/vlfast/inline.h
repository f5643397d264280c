#pragma once

// For code that host and device share, and that must inline into each clone of its caller.
#ifdef __CUDACC__
#define VLFAST_INLINE __host__ __device__ __forceinline__
#else
#define VLFAST_INLINE inline __attribute__((always_inline))
#endif
