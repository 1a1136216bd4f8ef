#include "speculative/verify_sm80.cuh"

namespace arcore::speculative {

int64_t scratch_bytes_sm80(const Problem& p) {
  return bytes_of_row(p);
}

int launch_verify_sm80(const VerifyCuda& cuda, void* stream) {
  switch (cuda.problem.dtype) {
    case StorageType::kBFloat16:
      return launch_verify<bfloat16>(cuda, stream);
    case StorageType::kFloat16:
      return launch_verify<float16>(cuda, stream);
    default:
      return launch_verify<float>(cuda, stream);
  }
}

}  // namespace arcore::speculative
