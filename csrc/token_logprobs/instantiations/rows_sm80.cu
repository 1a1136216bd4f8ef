// sass backward_rows: STG.E.128 >= 2; LDG.E.128 >= 1; no LDG.E.128.CONSTANT; no LDL
// sass update_rows: LDG.E.128.CONSTANT >= 1; no LDL
#include "token_logprobs/rows_sm80.cuh"

namespace arcore::token_logprobs {

int64_t row_slices_sm80(int64_t columns) {
  return row_slices(columns);
}

int launch_update_sm80(const UpdateCuda& cuda, void* stream) {
  switch (cuda.args.problem.dtype) {
    case StorageType::kBFloat16:
      return launch_update<bfloat16>(cuda, stream);
    case StorageType::kFloat16:
      return launch_update<float16>(cuda, stream);
    default:
      return launch_update<float>(cuda, stream);
  }
}

int launch_finish_sm80(const FinishArgs& args, void* stream) {
  return launch(finish_rows, {(args.problem.rows + 127) / 128, 1, 1, 128, 0}, stream, args);
}

int launch_backward_sm80(const BackwardArgs& args, void* stream) {
  switch (args.problem.dtype) {
    case StorageType::kBFloat16:
      return launch_backward<bfloat16>(args, stream);
    case StorageType::kFloat16:
      return launch_backward<float16>(args, stream);
    default:
      return launch_backward<float>(args, stream);
  }
}

}  // namespace arcore::token_logprobs
