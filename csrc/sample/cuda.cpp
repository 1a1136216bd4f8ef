// CUDA side of torch.ops.arcore.sample, filter_probs and confidence_mask.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "common/cuda_call.h"
#include "sample/checks.h"
#include "sample/params.h"

namespace arcore::sample {

namespace {

void run(const char* op, RunCuda& cuda, const Tensor& like, void* stream) {
  const Problem& p = cuda.problem;
  const int64_t rows = p.outer * p.inner;
  if (rows == 0) return;
  const bool scored = cuda.out.logprob != nullptr || cuda.out.raw_logprob != nullptr;
  Tensor keys = like, ranges = like, keep = like;  // keep the workspaces until the kernels are queued
  cuda.blocks = blocks_of_run_sm80(rows, p.vocab, multiprocessors());
  ARCORE_CHECK(
      cuda.blocks != kNoSuchBlocks, op,
      "expected ARCORE_SAMPLE_BLOCKS to be \"slices\" or a power of two up to what a cluster of this "
      "device may have, with at most ",
      kSharedTokens, " tokens for one block and ", kClusterTokens,
      " for each block of a cluster, but it is neither; unset it");
  if (scored || cuda.blocks == 0) {
    keys = torch::stable::new_empty(like, {rows, key_stride(p.vocab)}, ScalarType::Int);
    cuda.keys = static_cast<int32_t*>(keys.data_ptr());
  }
  if (cuda.blocks == 0) {
    ranges = torch::stable::new_empty(like, {rows, slices_of(p.vocab), kRangeWords}, ScalarType::Int);
    cuda.ranges = static_cast<int32_t*>(ranges.data_ptr());
  }
  if (p.order == Order::kJoint) {
    keep = torch::stable::new_empty(like, {rows, p.vocab}, ScalarType::Byte);
    cuda.keep = static_cast<uint8_t*>(keep.data_ptr());
  }
  check_launch(op, launch_run_sm80(cuda, stream));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sample_cuda(
    std::vector<Tensor> logits, const Tensor& settings, const OptionalTensor& bias,
    const OptionalTensor& mask, const OptionalTensor& history, const OptionalTensor& prompt,
    const Tensor& seed, const Tensor& offset, int64_t num_samples, int64_t order, int64_t mode,
    bool want_prob, bool want_logprob, bool want_raw, bool want_entropy, bool want_kept) {
  ARCORE_CHECK(!logits.empty(), "sample", "expected 1 to ", kMaxSources, " tensors of logits but got 0");
  const CudaScope scope(logits[0]);
  const SampleCall call(logits, settings, bias, mask, history, prompt, seed, offset, num_samples, order, mode,
                        want_prob, want_logprob, want_raw, want_entropy, want_kept);
  RunCuda cuda{call.problem, call.draws, call.out, 1, nullptr, nullptr, nullptr};
  run("sample", cuda, logits[0], scope.stream());
  return {call.tokens, call.prob, call.logprob, call.raw_logprob, call.entropy, call.valid, call.kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> filter_probs_cuda(
    std::vector<Tensor> logits, const Tensor& settings, const OptionalTensor& bias,
    const OptionalTensor& mask, const OptionalTensor& history, const OptionalTensor& prompt, int64_t order,
    bool want_entropy, bool want_kept) {
  ARCORE_CHECK(!logits.empty(), "filter_probs", "expected 1 to ", kMaxSources,
               " tensors of logits but got 0");
  const CudaScope scope(logits[0]);
  const FilterCall call(logits, settings, bias, mask, history, prompt, order, want_entropy, want_kept);
  RunCuda cuda{call.problem, Draws{}, call.out, 1, nullptr, nullptr, nullptr};
  run("filter_probs", cuda, logits[0], scope.stream());
  return {call.probs, call.entropy, call.valid, call.kept};
}

Tensor confidence_mask_cuda(const Tensor& confidence, const OptionalTensor& candidates, const Tensor& count,
                            const Tensor& seed, const Tensor& offset, double temperature, int64_t ties) {
  const CudaScope scope(confidence);
  const SelectionCall call(confidence, candidates, count, seed, offset, temperature, ties);
  SelectCuda cuda{call.sel, nullptr};
  Tensor keys = confidence;
  if (call.sel.rows == 0 || call.sel.length == 0) return call.chosen;
  if (call.sel.length > kSharedTokens) {
    keys =
        torch::stable::new_empty(confidence, {call.sel.rows, key_stride(call.sel.length)}, ScalarType::Int);
    cuda.keys = static_cast<int32_t*>(keys.data_ptr());
  }
  check_launch("confidence_mask", launch_select_sm80(cuda, scope.stream()));
  return call.chosen;
}

}  // namespace
}  // namespace arcore::sample

ARCORE_CUDA_LIBRARY_IMPL(m) {
  m.impl("sample", TORCH_BOX(&arcore::sample::sample_cuda));
  m.impl("filter_probs", TORCH_BOX(&arcore::sample::filter_probs_cuda));
  m.impl("confidence_mask", TORCH_BOX(&arcore::sample::confidence_mask_cuda));
}
