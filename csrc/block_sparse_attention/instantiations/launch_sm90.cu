// Describes the tensors to the copy engine and starts the kernel of the head dim.
#include <cuda_runtime.h>

#include <algorithm>

#include "block_sparse_attention/launch_sm90.h"

namespace arcore::block_sparse_attention {

using namespace sm90;

namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// From the driver that the runtime has loaded: the library does not link to libcuda.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
      (void)cudaGetLastError();
      entry = nullptr;
    }
    return reinterpret_cast<EncodeTiled>(entry);
  }();
  return function;
}

// False if the copy engine cannot address the tensor.
bool describe(Operand& operand, const Problem& problem, const Tensor4& t, int64_t heads, int64_t rows,
              uint32_t box_rows) {
  const EncodeTiled encode = encode_tiled();
  CopyMap map;
  if (encode == nullptr || t.data == nullptr || reinterpret_cast<uintptr_t>(t.data) % 16 != 0 ||
      !map_tensor(map, t, problem.dim, rows, heads, problem.batch))
    return false;
  operand.head_step = map.head_step;
  operand.batch_step = map.batch_step;
  cuuint64_t sizes[4], strides[3];
  std::copy_n(map.sizes, 4, sizes);
  std::copy_n(map.strides, 3, strides);
  const int columns = block_columns(padded_dim(problem.dim));
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(columns), box_rows, 1, 1}, ones[4] = {1, 1, 1, 1};
  return encode(&operand.map,
                problem.dtype == StorageType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                        : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                4, t.data, sizes, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

int launch_forward_sm90(const ForwardArgs& args, const TilePlan& plan, void* stream) {
  const Problem& problem = args.problem;
  const int64_t pairs = problem.batch * problem.heads, units = pairs * plan.rows;
  if (units == 0) return 0;
  // Weights are taken from the largest product of a row before scaling, so the scale is positive. Rows and
  // keys are counted in int32, up to the end of the last tile.
  constexpr int64_t kMaxLength = (int64_t{1} << 31) - kTileQ - kTileK;
  const bool fits = problem.dtype != StorageType::kFloat32 && problem.dim % 8 == 0 &&
                    problem.dim <= kMaxCudaHeadDim && problem.nk > 0 && problem.nk <= kMaxLength &&
                    problem.nq <= kMaxLength && problem.scale > 0.0f && problem.scale < 1e30f;
  if (!fits) return kUnsupportedSm90;
  ForwardParams params{};
  if (!describe(params.q, problem, args.q, problem.heads, problem.nq, kConsumerRows) ||
      !describe(params.k, problem, args.k, problem.kv_heads, problem.nk, kTileK) ||
      !describe(params.v, problem, args.v, problem.kv_heads, problem.nk, kTileK))
    return kUnsupportedSm90;
  params.args = args;
  params.plan = plan;
  params.schedule = {
      pairs, plan.rows,
      section_pairs(2 * problem.nk * problem.dim * 2, problem.heads / problem.kv_heads, pairs)};
  params.scale_log2e = static_cast<float>(static_cast<double>(problem.scale) * 1.4426950408889634074);
  params.wide_stores = reinterpret_cast<uintptr_t>(args.out.data) % 16 == 0 && args.out.row % 8 == 0 &&
                       args.out.head % 8 == 0 && args.out.batch % 8 == 0;

  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    return static_cast<int>(error);
  }
  const unsigned blocks = static_cast<unsigned>(units < multiprocessors ? units : multiprocessors);
  switch (padded_dim(problem.dim)) {
    case 64:
      return start_forward_d64(params, blocks, stream);
    case 96:
      return start_forward_d96(params, blocks, stream);
    default:
      return start_forward_d128(params, blocks, stream);
  }
}

}  // namespace arcore::block_sparse_attention
