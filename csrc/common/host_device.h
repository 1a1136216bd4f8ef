// Marks what CPU kernels and CUDA kernels both compile. Such functions are static: each object file has its
// own copy, compiled for its own instruction set.
#pragma once

#if defined(__CUDACC__)
#define ARCORE_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define ARCORE_HOST_DEVICE static inline
#endif
