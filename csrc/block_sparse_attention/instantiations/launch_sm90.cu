// Describes the tensors to the copy engine and starts the kernels of the head dim.
#include <cuda_runtime.h>

#include <algorithm>

#include "block_sparse_attention/bwd_sm80.cuh"
#include "block_sparse_attention/gradient_loop_sm90.h"
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

// Both directions, beyond what describe() refuses. Rows and keys are counted in int32, up to the end of the
// last tile.
bool fits(const Problem& problem) {
  constexpr int64_t kMaxLength = (int64_t{1} << 31) - 256;
  return problem.dtype != StorageType::kFloat32 && problem.dim % 8 == 0 && problem.dim <= kMaxCudaHeadDim &&
         problem.nk > 0 && problem.nk <= kMaxLength && problem.nq <= kMaxLength;
}

bool wide_rows(const Tensor4& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.row % 8 == 0 && t.head % 8 == 0 &&
         t.batch % 8 == 0;
}

float log2e_times(float scale) {
  return static_cast<float>(static_cast<double>(scale) * 1.4426950408889634074);
}

// Bytes of two operands of one head.
int64_t pair_bytes(const Problem& problem, int64_t rows) {
  return 2 * rows * problem.dim * 2;
}

int count_multiprocessors(int& count) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) (void)cudaGetLastError();
  return static_cast<int>(error);
}

int clear_numbers(int32_t* numbers, int64_t count, void* stream) {
  const cudaError_t error = cudaMemsetAsync(numbers, 0, static_cast<size_t>(count) * sizeof(int32_t),
                                            static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) (void)cudaGetLastError();
  return static_cast<int>(error);
}

}  // namespace

int launch_forward_sm90(const ForwardArgs& args, const TilePlan& plan, int32_t* counters, void* stream) {
  const Problem& problem = args.problem;
  const int64_t pairs = problem.batch * problem.heads, units = pairs * plan.rows;
  if (units == 0) return 0;
  // Weights are taken from the largest product of a row before scaling, so the scale is positive.
  if (!fits(problem) || !(problem.scale > 0.0f && problem.scale < 1e30f)) return kUnsupportedSm90;
  ForwardParams params{};
  if (!describe(params.q, problem, args.q, problem.heads, problem.nq, kConsumerRows) ||
      !describe(params.k, problem, args.k, problem.kv_heads, problem.nk, kTileK) ||
      !describe(params.v, problem, args.v, problem.kv_heads, problem.nk, kTileK))
    return kUnsupportedSm90;
  const int64_t group = problem.heads / problem.kv_heads;
  params.args = args;
  params.plan = plan;
  params.schedule = {pairs, plan.rows, section_pairs(pair_bytes(problem, problem.nk), group, pairs)};
  params.scale_log2e = log2e_times(problem.scale);
  params.wide_stores = wide_rows(args.out);
  int multiprocessors = 0;
  if (const int error = count_multiprocessors(multiprocessors); error != 0) return error;
  const unsigned blocks = static_cast<unsigned>(units < multiprocessors ? units : multiprocessors);
  if (units > multiprocessors) {
    if (const int error = clear_numbers(counters, kCountersSm90, stream); error != 0) return error;
    params.counter = counters;
  }
  switch (padded_dim(problem.dim)) {
    case 64:
      return start_forward_d64(params, blocks, stream);
    case 96:
      return start_forward_d96(params, blocks, stream);
    default:
      return start_forward_d128(params, blocks, stream);
  }
}

namespace {

// False if the kernels cannot do the call.
bool fill_backward(BackwardParams& params, const BackwardCuda& cuda) {
  const BackwardArgs& args = cuda.args;
  const Problem& problem = args.problem;
  if (!fits(problem) ||
      !describe(params.grad_out, problem, args.grad_out, problem.heads, problem.nq, kOtherRows) ||
      !describe(params.q, problem, args.q, problem.heads, problem.nq, kOtherRows) ||
      !describe(params.k, problem, args.k, problem.kv_heads, problem.nk, kOtherRows) ||
      !describe(params.v, problem, args.v, problem.kv_heads, problem.nk, kOtherRows))
    return false;
  const int64_t group = problem.heads / problem.kv_heads, pairs = problem.batch * problem.heads,
                kv_pairs = problem.batch * problem.kv_heads;
  params.cuda = cuda;
  params.by_query = {pairs, cuda.by_query.rows, section_pairs(pair_bytes(problem, problem.nk), group, pairs)};
  params.by_key = {kv_pairs, cuda.by_key.rows,
                   section_pairs(pair_bytes(problem, problem.nq) * group, 1, kv_pairs)};
  params.scale_log2e = log2e_times(problem.scale);
  params.wide_grad_q = wide_rows(args.grad_q);
  params.wide_grad_k = wide_rows(args.grad_k);
  params.wide_grad_v = wide_rows(args.grad_v);
  return true;
}

int launch_deltas(const BackwardCuda& cuda, void* stream) {
  const Problem& problem = cuda.args.problem;
  BackwardKernelArgs args{};
  args.cuda = cuda;
  const LaunchShape shape{(problem.batch * problem.heads * problem.nq + 3) / 4, 1, 1, 128, 0};
  return problem.dtype == StorageType::kBFloat16 ? launch(row_deltas<bfloat16>, shape, stream, args)
                                                 : launch(row_deltas<float16>, shape, stream, args);
}

}  // namespace

int launch_backward_sm90(const BackwardCuda& cuda, int32_t* counters, void* stream) {
  const Problem& problem = cuda.args.problem;
  if (problem.batch * problem.heads * problem.nq == 0) return 0;
  BackwardParams params{};
  if (!fill_backward(params, cuda)) return kUnsupportedSm90;
  int multiprocessors = 0;
  if (const int error = count_multiprocessors(multiprocessors); error != 0) return error;
  if (const int error = clear_numbers(counters, kCountersSm90, stream); error != 0) return error;
  params.counters = counters;
  if (const int error = launch_deltas(cuda, stream); error != 0) return error;
  switch (padded_dim(problem.dim)) {
    case 64:
      return start_backward_d64(params, multiprocessors, stream);
    case 96:
      return start_backward_d96(params, multiprocessors, stream);
    default:
      return start_backward_d128(params, multiprocessors, stream);
  }
}

FusedScratch fused_scratch_sm90(const BackwardCuda& cuda) {
  const Problem& problem = cuda.args.problem;
  const int64_t tiles = problem.batch * problem.heads * cuda.by_key.columns;
  return {1 + tiles, tiles * kOtherRows * padded_dim(problem.dim)};
}

int launch_fused_sm90(const BackwardCuda& cuda, int32_t* numbers, float* sums, void* stream) {
  const Problem& problem = cuda.args.problem;
  if (problem.batch * problem.heads * problem.nq == 0) return 0;
  FusedParams params{};
  if (!fill_backward(params.backward, cuda)) return kUnsupportedSm90;
  const TilePlan& plan = cuda.by_key;
  const int64_t tiles = problem.batch * problem.heads * plan.columns;
  if (tiles >= int64_t{1} << 31) return kUnsupportedSm90;  // a block of the last kernel each
  params.query_tiles = plan.columns;
  params.ticket = numbers;
  params.visited = numbers + 1;
  params.sums = sums;
  int multiprocessors = 0;
  if (const int error = count_multiprocessors(multiprocessors); error != 0) return error;
  if (const int error = clear_numbers(numbers, 1 + tiles, stream); error != 0) return error;
  if (const int error = launch_deltas(cuda, stream); error != 0) return error;
  switch (padded_dim(problem.dim)) {
    case 64:
      return start_fused_d64(params, multiprocessors, stream);
    case 96:
      return start_fused_d96(params, multiprocessors, stream);
    default:
      return start_fused_d128(params, multiprocessors, stream);
  }
}

}  // namespace arcore::block_sparse_attention
