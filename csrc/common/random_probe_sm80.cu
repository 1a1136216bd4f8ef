// Compiles the headers that CPU and CUDA kernels share as device code (`make cuda-check`): random numbers and
// the draw.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/inverse_cdf.h"
#include "common/philox.h"

namespace arcore::machine {

// One thread per row: tokens[row] is what the CPU's inverse_cdf draws for the same seed and position.
__global__ void draw_rows(const float* probs, int64_t rows, int64_t vocab, const int64_t* seeds,
                          const int64_t* positions, int64_t* tokens) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < rows)
    tokens[row] =
        inverse_cdf(probs + row * vocab, vocab, random_bits(seeds[row], positions[row], Stream::kSample));
}

}  // namespace arcore::machine
