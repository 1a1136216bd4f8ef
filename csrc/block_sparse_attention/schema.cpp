// torch.ops.arcore.block_sparse_attention and its backward: schema, checks, allocation, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "block_sparse_attention/checks.h"
#include "block_sparse_attention/params.h"
#include "common/cpu_dispatch.h"
#include "common/parallel.h"

namespace arcore::block_sparse_attention {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)

namespace {

// Below this many floating-point operations a second thread costs more than it saves.
constexpr double kFlopsPerThread = 4e6;

// Calls f(wave, threads) for consecutive groups of (batch, kv head) pairs. A wave is just wide enough to feed
// all threads: its packed operands are the op's whole workspace, and a small one stays in cache.
template <typename F>
void run_waves(const Problem& p, const Tensor& like, int64_t floats_per_pair, int64_t tasks_per_pair,
               double flops_per_pair, const F& f) {
  const int64_t pairs = p.batch * p.kv_heads;
  const double flops = flops_per_pair * static_cast<double>(pairs);
  const int64_t threads = threads_for(flops, kFlopsPerThread);
  // Two tasks per thread even out the last ones.
  const int64_t wanted = threads == 1 ? 1 : (2 * threads + tasks_per_pair - 1) / tasks_per_pair;
  const int64_t width = std::clamp<int64_t>(wanted, 1, pairs);
  Tensor workspace = torch::stable::new_empty(like, {width * floats_per_pair}, ScalarType::Float);
  for (int64_t first = 0; first < pairs; first += width)
    f(Wave{first, std::min(width, pairs - first), static_cast<float*>(workspace.data_ptr())}, threads);
}

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& bounds, const OptionalTensor& key_bounds, double scale,
                                       const OptionalTensor&, const OptionalTensor&) {
  const Tensor k_rows = with_contiguous_rows(k), v_rows = with_contiguous_rows(v),
               q_rows = with_contiguous_rows(q);
  ForwardArgs args{};
  args.problem = check_problem(kOp, q, k, v, bounds, key_bounds, scale);
  const Problem& p = args.problem;
  Tensor out = torch::stable::empty_like(q);
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.heads, p.nq}, ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  // An output in q's own layout may have rows that the kernel cannot write directly.
  Tensor out_rows = out.stride(3) == 1 ? out : torch::stable::new_empty(q, q.sizes());
  args.q = view(q_rows);
  args.k = view(k_rows);
  args.v = view(v_rows);
  args.out = view(out_rows);
  args.lse = static_cast<float*>(lse.data_ptr());

  const CpuKernels& kernels = cpu_kernels();
  const double flops = 4.0 * static_cast<double>(p.heads / p.kv_heads) * static_cast<double>(p.nq) *
                       static_cast<double>(p.nk) * static_cast<double>(p.dim);
  run_waves(p, q, kernels.forward_workspace(p), kernels.forward_tasks(p, 1), flops,
            [&](const Wave& wave, int64_t threads) {
              run_tasks(kernels.forward_pack_tasks(p, wave.pairs), threads,
                        [&](int64_t begin, int64_t end) { kernels.forward_pack(args, wave, begin, end); });
              run_tasks(kernels.forward_tasks(p, wave.pairs), threads,
                        [&](int64_t begin, int64_t end) { kernels.forward(args, wave, begin, end); });
            });
  if (out.stride(3) != 1) torch::stable::copy_(out, out_rows);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad_out, const OptionalTensor& grad_lse,
                                                const Tensor& q, const Tensor& k, const Tensor& v,
                                                const Tensor& out, const Tensor& lse, const Tensor& bounds,
                                                const OptionalTensor& key_bounds, double scale,
                                                const OptionalTensor&, const OptionalTensor&) {
  BackwardArgs args{};
  args.problem = check_problem(kBackwardOp, q, k, v, bounds, key_bounds, scale);
  const Problem& p = args.problem;
  check_like(kBackwardOp, "grad_out", grad_out, q);
  check_like(kBackwardOp, "out", out, q);
  Tensor grad_q = torch::stable::empty_like(q), grad_k = torch::stable::empty_like(k),
         grad_v = torch::stable::empty_like(v);
  if (grad_q.numel() == 0 || grad_k.numel() == 0) {
    torch::stable::zero_(grad_q);
    torch::stable::zero_(grad_k);
    torch::stable::zero_(grad_v);
    return {grad_q, grad_k, grad_v};
  }
  const Tensor grad_out_rows = with_contiguous_rows(grad_out), out_rows = with_contiguous_rows(out);
  const Tensor q_rows = with_contiguous_rows(q), k_rows = with_contiguous_rows(k),
               v_rows = with_contiguous_rows(v);
  const Tensor lse_rows = torch::stable::contiguous(lse);
  Tensor grad_lse_rows = lse_rows;
  args.lse = check_rows(kBackwardOp, "lse", lse_rows, p);
  if (grad_lse.has_value()) {
    grad_lse_rows = torch::stable::contiguous(*grad_lse);
    args.grad_lse = check_rows(kBackwardOp, "grad_lse", grad_lse_rows, p);
  }
  auto writable = [](const Tensor& t) {
    return t.stride(3) == 1 ? t : torch::stable::new_empty(t, t.sizes());
  };
  Tensor grad_q_rows = writable(grad_q), grad_k_rows = writable(grad_k), grad_v_rows = writable(grad_v);
  args.grad_out = view(grad_out_rows);
  args.q = view(q_rows);
  args.k = view(k_rows);
  args.v = view(v_rows);
  args.out = view(out_rows);
  args.grad_q = view(grad_q_rows);
  args.grad_k = view(grad_k_rows);
  args.grad_v = view(grad_v_rows);

  const CpuKernels& kernels = cpu_kernels();
  const double flops = 10.0 * static_cast<double>(p.heads / p.kv_heads) * static_cast<double>(p.nq) *
                       static_cast<double>(p.nk) * static_cast<double>(p.dim);
  run_waves(p, q, kernels.backward_workspace(p), kernels.backward_tasks(p, 1), flops,
            [&](const Wave& wave, int64_t threads) {
              run_tasks(kernels.backward_pack_tasks(p, wave.pairs), threads,
                        [&](int64_t begin, int64_t end) { kernels.backward_pack(args, wave, begin, end); });
              run_tasks(kernels.backward_tasks(p, wave.pairs), threads,
                        [&](int64_t begin, int64_t end) { kernels.backward(args, wave, begin, end); });
              run_tasks(kernels.backward_reduce_tasks(p, wave.pairs), threads,
                        [&](int64_t begin, int64_t end) { kernels.backward_reduce(args, wave, begin, end); });
            });
  if (grad_q.stride(3) != 1) torch::stable::copy_(grad_q, grad_q_rows);
  if (grad_k.stride(3) != 1) torch::stable::copy_(grad_k, grad_k_rows);
  if (grad_v.stride(3) != 1) torch::stable::copy_(grad_v, grad_v_rows);
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace arcore::block_sparse_attention

STABLE_TORCH_LIBRARY_FRAGMENT(arcore, m) {
  m.def(
      "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor bounds, Tensor? key_bounds, float scale,"
      " Tensor? plan_by_query=None, Tensor? plan_by_key=None) -> (Tensor out, Tensor lse)");
  m.def(
      "block_sparse_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out,"
      " Tensor lse, Tensor bounds, Tensor? key_bounds, float scale, Tensor? plan_by_query=None,"
      " Tensor? plan_by_key=None) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def(
      "interval_tile_plan(Tensor bounds, Tensor? key_bounds, int nk, int tile_q, int tile_k, bool by_key) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(arcore, CPU, m) {
  m.impl("block_sparse_attention", TORCH_BOX(&arcore::block_sparse_attention::forward_cpu));
  m.impl("block_sparse_attention_backward", TORCH_BOX(&arcore::block_sparse_attention::backward_cpu));
}
