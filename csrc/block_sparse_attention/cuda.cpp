// CUDA side of torch.ops.arcore.block_sparse_attention, its backward and interval_tile_plan: allocation and
// launches.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <tuple>

#include "block_sparse_attention/checks.h"
#include "block_sparse_attention/params.h"
#include "common/cuda_call.h"

namespace arcore::block_sparse_attention {

namespace {

Tensor build_plan(const Tensor& bounds, const OptionalTensor& key_bounds, int64_t nk, int64_t tile_q,
                  int64_t tile_k, bool by_key, bool halves, bool visits) {
  PlanArgs args = check_plan(bounds, key_bounds, nk, tile_q, tile_k, by_key, halves, visits);
  const CudaScope scope(bounds);
  Tensor plan = torch::stable::new_empty(bounds, {args.batch, args.heads, args.rows, args.pitch});
  const Tensor seen = torch::stable::new_empty(bounds, {visits ? args.batch * args.heads * args.columns : 0});
  args.plan = static_cast<int32_t*>(plan.data_ptr());
  args.seen = static_cast<int32_t*>(seen.data_ptr());
  check_launch(kPlanOp, launch_plan_sm80(args, scope.stream()));
  return plan;
}

// The tiles that a plan is for.
struct Tiles {
  int64_t q, k;
  bool by_key, halves, visits;
};
constexpr Tiles kByQuery{kForwardTileQ, kForwardTileK, false, false, false},
    kByKey{kBackwardTileQ, kBackwardTileK, true, false, false};

bool has_visits(const Tensor& plan, int64_t columns) {
  return plan.dim() == 4 && columns > 0 && plan.size(3) == 2 + 2 * columns;
}

TilePlan plan_of(const Tensor& plan, const Problem& p, const Tiles& tiles) {
  const int64_t tile_q = tiles.q, tile_k = tiles.k;
  const bool by_key = tiles.by_key;
  const int64_t across_q = (p.nq + tile_q - 1) / tile_q, across_k = (p.nk + tile_k - 1) / tile_k;
  const int64_t rows = by_key ? across_k : across_q, columns = by_key ? across_q : across_k;
  ARCORE_CHECK(
      plan.scalar_type() == ScalarType::Int && plan.dim() == 4 && plan.is_contiguous() &&
          (plan.size(0) == 1 || plan.size(0) == p.batch) && (plan.size(1) == 1 || plan.size(1) == p.heads) &&
          plan.size(2) == rows && (plan.size(3) == 2 + columns || has_visits(plan, columns)),
      kOp, "expected the tile plan int32 of shape [1 or ", p.batch, ", 1 or ", p.heads, ", ", rows, ", ",
      2 + columns, "], contiguous, but got ", torch::headeronly::toString(plan.scalar_type()), " ",
      shape_of(plan), "; build it with interval_tile_plan for tiles of ", tile_q, " x ", tile_k);
  return {static_cast<const int32_t*>(plan.data_ptr()),
          plan.size(0) == 1 ? 0 : plan.stride(0),
          plan.size(1) == 1 ? 0 : plan.stride(1),
          rows,
          columns,
          plan.size(3)};
}

// A given plan without the visits that are asked for is built again.
Tensor plan_or_build(const OptionalTensor& plan, const Tensor& bounds, const OptionalTensor& key_bounds,
                     const Problem& p, const Tiles& tiles) {
  const int64_t columns = tiles.by_key ? (p.nq + tiles.q - 1) / tiles.q : (p.nk + tiles.k - 1) / tiles.k;
  return plan.has_value() && (!tiles.visits || has_visits(*plan, columns))
             ? *plan
             : build_plan(bounds, key_bounds, p.nk, tiles.q, tiles.k, tiles.by_key, tiles.halves,
                          tiles.visits);
}

void check_supported(const char* op, const Problem& p, const Tensor& q, const Tensor& v) {
  ARCORE_CHECK(p.mask.words == nullptr, op,
               "expected no tree_words on CUDA, whose kernels read row bounds only; move the tensors to the "
               "CPU, or use reference_block_sparse_attention");
  ARCORE_CHECK(p.bias.data == nullptr, op,
               "expected no key_bias on CUDA; move the tensors to the CPU, or use "
               "reference_block_sparse_attention");
  ARCORE_CHECK(p.dim == p.v_dim && p.dim % 8 == 0, op,
               "expected q and v of one head_dim, a multiple of 8, on CUDA but got q ", shape_of(q),
               " and v ", shape_of(v), "; pad them with zeros as arcore.ops.block_sparse_attention does");
  ARCORE_CHECK(p.dim <= kMaxCudaHeadDim, op, "expected head_dim <= ", kMaxCudaHeadDim,
               " on CUDA (64, 72, 80, 96 and 128 have kernels of their own, others are padded) but got ",
               p.dim, "; move the tensors to the CPU or split the heads");
}

// Parts of each query tile's keys, where there are few queries: what then fills a GPU. A function of the
// numbers of queries and keys alone: neither what else is in the batch nor the GPU may change a bit.
int64_t splits_for(const Problem& p) {
  if (p.nq > 2 * kForwardTileQ || p.dtype == StorageType::kFloat32) return 1;
  const int64_t tiles = (p.nk + kForwardTileK - 1) / kForwardTileK;
  // A part's sums are written and read again as float32: its keys must be worth it.
  const int64_t each = p.nq <= kForwardTileQ / 2 ? 8 : 16;
  return std::clamp<int64_t>((tiles + each - 1) / each, 1, 64);
}

// Whether the sm_90a kernels run: the environment says. They are off until a GPU was seen to agree with them.
enum class Sm90 { kOff, kWherePossible, kRequired };

Sm90 sm90_wish() {
#if defined(ARCORE_CUDA_HOST)
  return Sm90::kOff;
#else
  const char* wish = std::getenv("ARCORE_SM90A");
  if (wish == nullptr || *wish == '\0' || std::strcmp(wish, "0") == 0) return Sm90::kOff;
  const bool required = std::strcmp(wish, "require") == 0;
  ARCORE_CHECK(required || std::strcmp(wish, "1") == 0, kOp,
               "expected ARCORE_SM90A to be 0, 1 or require but got ", wish);
#if defined(ARCORE_WITH_SM90)
  return required ? Sm90::kRequired : Sm90::kWherePossible;
#else
  fail("arcore::", kOp, ": ARCORE_SM90A=", wish,
       " but this build has no sm_90a kernels; unpack CuTe with tools/cutlass.py and build with 9.0a in "
       "TORCH_CUDA_ARCH_LIST, or unset it");
#endif
#endif
}

// Which of the sm_90a backwards runs: two kernels of seven products, or one of five, until a GPU was seen to
// be faster with it.
bool fused_wish() {
  if (sm90_wish() == Sm90::kOff) return false;
  const char* wish = std::getenv("ARCORE_SM90A_BACKWARD");
  if (wish == nullptr || *wish == '\0' || std::strcmp(wish, "two") == 0) return false;
  ARCORE_CHECK(std::strcmp(wish, "fused") == 0, kBackwardOp,
               "expected ARCORE_SM90A_BACKWARD to be two or fused but got ", wish);
  return true;
}

// With ARCORE_SM90A=require a call that other kernels would do is an error.
[[maybe_unused]] int refuse_sm90(const char* op, Sm90 wish, const char* reason) {
  if (wish == Sm90::kRequired)
    fail("arcore::", op, ": ARCORE_SM90A=require but the sm_90a kernels cannot do this call: ", reason,
         "; with ARCORE_SM90A=1 it takes the sm_80 kernels");
  return kUnsupportedSm90;
}

#if defined(ARCORE_WITH_SM90) && !defined(ARCORE_CUDA_HOST)
constexpr Tiles kTilesSm90{kTileQSm90, kTileKSm90, false, true, false};
constexpr const char* kNoCopies =
    "head_dim, lengths, scale, addresses or strides are outside of what they take "
    "(csrc/block_sparse_attention/"
    "README.md, sm_90a)";
#endif

// kUnsupportedSm90 where the sm_90a kernels are not wanted or cannot do the call.
int launch_forward_on_sm90([[maybe_unused]] const ForwardCuda& cuda, [[maybe_unused]] const Tensor& bounds,
                           [[maybe_unused]] const OptionalTensor& key_bounds,
                           [[maybe_unused]] const OptionalTensor& plan_sm90, [[maybe_unused]] void* stream) {
  const Sm90 wish = sm90_wish();
  if (wish == Sm90::kOff) return kUnsupportedSm90;
#if defined(ARCORE_WITH_SM90) && !defined(ARCORE_CUDA_HOST)
  const Problem& p = cuda.args.problem;
  if (compute_capability() != 90) return refuse_sm90(kOp, wish, "the GPU is not of compute capability 9.0");
  if (p.dtype == StorageType::kFloat32) return refuse_sm90(kOp, wish, "float32");
  if (cuda.splits > 1) return refuse_sm90(kOp, wish, "few queries of many keys, whose keys are split");
  const Tensor plan = plan_or_build(plan_sm90, bounds, key_bounds, p, kTilesSm90);
  const Tensor counters = torch::stable::new_empty(bounds, {kCountersSm90});
  const int error = launch_forward_sm90(cuda.args, plan_of(plan, p, kTilesSm90),
                                        static_cast<int32_t*>(counters.data_ptr()), stream);
  return error == kUnsupportedSm90 ? refuse_sm90(kOp, wish, kNoCopies) : error;
#else
  return kUnsupportedSm90;
#endif
}

// `fused`: the plan by key has visits.
int launch_backward_on_sm90([[maybe_unused]] const BackwardCuda& cuda, [[maybe_unused]] const Tensor& bounds,
                            [[maybe_unused]] bool fused, [[maybe_unused]] void* stream) {
  const Sm90 wish = sm90_wish();
  if (wish == Sm90::kOff) return kUnsupportedSm90;
#if defined(ARCORE_WITH_SM90) && !defined(ARCORE_CUDA_HOST)
  if (compute_capability() != 90)
    return refuse_sm90(kBackwardOp, wish, "the GPU is not of compute capability 9.0");
  if (cuda.args.problem.dtype == StorageType::kFloat32) return refuse_sm90(kBackwardOp, wish, "float32");
  int error;
  if (fused) {
    const FusedScratch scratch = fused_scratch_sm90(cuda);
    const Tensor numbers = torch::stable::new_empty(bounds, {scratch.numbers}),
                 sums = torch::stable::new_empty(bounds, {scratch.sums}, ScalarType::Float);
    error = launch_fused_sm90(cuda, static_cast<int32_t*>(numbers.data_ptr()),
                              static_cast<float*>(sums.data_ptr()), stream);
  } else {
    const Tensor counters = torch::stable::new_empty(bounds, {kCountersSm90});
    error = launch_backward_sm90(cuda, static_cast<int32_t*>(counters.data_ptr()), stream);
  }
  return error == kUnsupportedSm90 ? refuse_sm90(kBackwardOp, wish, kNoCopies) : error;
#else
  return kUnsupportedSm90;
#endif
}

int launch_forward(const ForwardCuda& cuda, void* stream) {
  switch (cuda.args.problem.dtype) {
    case StorageType::kBFloat16:
      return launch_forward_bf16_sm80(cuda, stream);
    case StorageType::kFloat16:
      return launch_forward_f16_sm80(cuda, stream);
    default:
      return launch_forward_fp32_sm80(cuda, stream);
  }
}

int launch_backward(const BackwardCuda& cuda, void* stream) {
  switch (cuda.args.problem.dtype) {
    case StorageType::kBFloat16:
      return launch_backward_bf16_sm80(cuda, stream);
    case StorageType::kFloat16:
      return launch_backward_f16_sm80(cuda, stream);
    default:
      return launch_backward_fp32_sm80(cuda, stream);
  }
}

// Gradients and outputs are written row by row, D contiguous elements each.
Tensor writable(const Tensor& t) {
  return t.stride(3) == 1 ? t : torch::stable::new_empty(t, t.sizes());
}

std::tuple<Tensor, Tensor> forward_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                        const Tensor& bounds, const OptionalTensor& key_bounds, double scale,
                                        const OptionalTensor& plan_by_query, const OptionalTensor&,
                                        const OptionalTensor& tree_words, const OptionalTensor& tree_prefix,
                                        const OptionalTensor& key_bias, const OptionalTensor& plan_sm90) {
  ForwardCuda cuda{};
  cuda.args.problem =
      check_problem(kOp, q, k, v, {bounds, key_bounds, tree_words, tree_prefix}, key_bias, scale);
  const Problem& p = cuda.args.problem;
  check_supported(kOp, p, q, v);
  Tensor out = torch::stable::empty_like(q);
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.heads, p.nq}, ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  const CudaScope scope(q);
  const Tensor q_rows = with_contiguous_rows(q), k_rows = with_contiguous_rows(k),
               v_rows = with_contiguous_rows(v);
  Tensor out_rows = writable(out);
  const Tensor plan = plan_or_build(plan_by_query, bounds, key_bounds, p, kByQuery);
  cuda.plan = plan_of(plan, p, kByQuery);
  cuda.args.q = view(q_rows);
  cuda.args.k = view(k_rows);
  cuda.args.v = view(v_rows);
  cuda.args.out = view(out_rows);
  cuda.args.lse = static_cast<float*>(lse.data_ptr());
  cuda.splits = splits_for(p);
  Tensor partial = lse;  // keeps the workspace until the kernels are queued
  if (cuda.splits > 1) {
    const int64_t rows = cuda.splits * p.batch * p.heads * p.nq;
    partial = torch::stable::new_empty(q, {rows * (p.dim + 1)}, ScalarType::Float);
    cuda.partial_out = static_cast<float*>(partial.data_ptr());
    cuda.partial_lse = cuda.partial_out + rows * p.dim;
  }
  int error = launch_forward_on_sm90(cuda, bounds, key_bounds, plan_sm90, scope.stream());
  if (error == kUnsupportedSm90) error = launch_forward(cuda, scope.stream());
  check_launch(kOp, error);
  if (out.stride(3) != 1) torch::stable::copy_(out, out_rows);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cuda(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& bounds, const OptionalTensor& key_bounds,
    double scale, const OptionalTensor& plan_by_query, const OptionalTensor& plan_by_key,
    const OptionalTensor& tree_words, const OptionalTensor& tree_prefix, const OptionalTensor& key_bias) {
  BackwardCuda cuda{};
  cuda.args.problem =
      check_problem(kBackwardOp, q, k, v, {bounds, key_bounds, tree_words, tree_prefix}, key_bias, scale);
  const Problem& p = cuda.args.problem;
  check_supported(kBackwardOp, p, q, v);
  check_like(kBackwardOp, "grad_out", grad_out, q);
  check_like(kBackwardOp, "out", out, q);
  const CudaScope scope(q);
  Tensor grad_q = torch::stable::empty_like(q), grad_k = torch::stable::empty_like(k),
         grad_v = torch::stable::empty_like(v);
  const Tensor no_bias = torch::stable::new_empty(q, {0}, ScalarType::Float);
  if (grad_q.numel() == 0 || grad_k.numel() == 0) {
    torch::stable::zero_(grad_q);
    torch::stable::zero_(grad_k);
    torch::stable::zero_(grad_v);
    return {grad_q, grad_k, grad_v, no_bias};
  }
  const Tensor grad_out_rows = with_contiguous_rows(grad_out), out_rows = with_contiguous_rows(out);
  const Tensor q_rows = with_contiguous_rows(q), k_rows = with_contiguous_rows(k),
               v_rows = with_contiguous_rows(v);
  const Tensor lse_rows = torch::stable::contiguous(lse);
  Tensor grad_lse_rows = lse_rows;
  cuda.args.lse = check_rows(kBackwardOp, "lse", lse_rows, q, p);
  if (grad_lse.has_value()) {
    grad_lse_rows = torch::stable::contiguous(*grad_lse);
    cuda.args.grad_lse = check_rows(kBackwardOp, "grad_lse", grad_lse_rows, q, p);
  }
  Tensor grad_q_rows = writable(grad_q), grad_k_rows = writable(grad_k), grad_v_rows = writable(grad_v);
  const Tensor by_query = plan_or_build(plan_by_query, bounds, key_bounds, p, kByQuery);
  Tiles tiles_by_key = kByKey;
  tiles_by_key.visits = fused_wish();
  const Tensor by_key = plan_or_build(plan_by_key, bounds, key_bounds, p, tiles_by_key);
  const Tensor delta = torch::stable::new_empty(q, {p.batch, p.heads, p.nq}, ScalarType::Float);
  cuda.by_query = plan_of(by_query, p, kByQuery);
  cuda.by_key = plan_of(by_key, p, kByKey);
  cuda.delta = static_cast<float*>(delta.data_ptr());
  cuda.args.grad_out = view(grad_out_rows);
  cuda.args.q = view(q_rows);
  cuda.args.k = view(k_rows);
  cuda.args.v = view(v_rows);
  cuda.args.out = view(out_rows);
  cuda.args.grad_q = view(grad_q_rows);
  cuda.args.grad_k = view(grad_k_rows);
  cuda.args.grad_v = view(grad_v_rows);
  int error = launch_backward_on_sm90(cuda, bounds, tiles_by_key.visits, scope.stream());
  if (error == kUnsupportedSm90) error = launch_backward(cuda, scope.stream());
  check_launch(kBackwardOp, error);
  if (grad_q.stride(3) != 1) torch::stable::copy_(grad_q, grad_q_rows);
  if (grad_k.stride(3) != 1) torch::stable::copy_(grad_k, grad_k_rows);
  if (grad_v.stride(3) != 1) torch::stable::copy_(grad_v, grad_v_rows);
  return {grad_q, grad_k, grad_v, no_bias};
}

}  // namespace
}  // namespace arcore::block_sparse_attention

ARCORE_CUDA_LIBRARY_IMPL(m) {
  m.impl("block_sparse_attention", TORCH_BOX(&arcore::block_sparse_attention::forward_cuda));
  m.impl("block_sparse_attention_backward", TORCH_BOX(&arcore::block_sparse_attention::backward_cuda));
  m.impl("interval_tile_plan", TORCH_BOX(&arcore::block_sparse_attention::build_plan));
}
