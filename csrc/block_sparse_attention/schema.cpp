// torch.ops.arcore.block_sparse_attention, its backward and its forward-mode derivative: schema, checks,
// allocation, threads.
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
#include "common/new_tensor.h"
#include "common/parallel.h"
#include "common/workspace.h"

namespace arcore::block_sparse_attention {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)
ARCORE_DISPATCH_BF16(CpuKernels, cpu_kernels)

namespace {

// Of the forward and the backward; forward mode has float32 kernels alone.
const CpuKernels& kernels_for(const Problem& p) {
  const CpuBf16 unit = cpu_bf16();
  return p.dtype == StorageType::kBFloat16 && unit != CpuBf16::kNone ? cpu_kernels(unit) : cpu_kernels();
}

// Below this many floating-point operations a second thread costs more than it saves.
constexpr double kFlopsPerThread = 4e6;

// Work of one op on one (batch, kv head) pair.
struct PairCost {
  int64_t workspace, scratch, tasks;  // floats, floats per thread, parallel units
  double flops;
};

// Most floats of packed operands of a pair for which a thread takes whole pairs, and of a wave's: 8 MiB.
constexpr int64_t kCachedFloats = 1 << 21;

// Calls f(wave, run) for consecutive groups of (batch, kv head) pairs. A wave's packed operands are the op's
// whole workspace, and a small one stays in cache. run(tasks, stage) calls stage(scratch, begin, end) for all
// of the tasks.
//
// With one thread a wave is one pair. With several, as many pairs as all threads can share equally are taken
// whole: packed operands are then read by the core that wrote them, and threads wait for one another once.
// The other pairs, and all where packed operands are large, are cut between threads, in waves that are wide
// enough to feed all.
template <typename F>
void run_waves(const char* op, const Problem& p, const Tensor& like, const PairCost& cost, const F& f) {
  const int64_t pairs = p.batch * p.kv_heads;
  const int64_t threads = threads_for(cost.flops * static_cast<double>(pairs), kFlopsPerThread);
  const int64_t whole = threads > 1 && cost.workspace <= kCachedFloats ? pairs / threads * threads : 0;
  // Two tasks per thread even out the last ones.
  const int64_t needed = (2 * threads + cost.tasks - 1) / cost.tasks;
  const int64_t cached = kCachedFloats / std::max<int64_t>(cost.workspace, 1);
  const int64_t width =
      threads == 1 ? 1
                   : std::clamp<int64_t>(std::max(needed, cached), 1, std::max<int64_t>(pairs - whole, 1));
  const auto lines = [](int64_t floats) { return (floats + 15) / 16 * 16; };
  const int64_t each = lines(cost.scratch), own = lines(cost.workspace);
  const int64_t packed = std::max(whole > 0 ? threads * own : 0, whole < pairs ? width * cost.workspace : 0);
  const Tensor memory = scratch_floats(op, like, packed + threads * each + 32);
  // Both parts begin on cache lines.
  auto aligned = [](float* x) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(x) + 63) / 64 * 64);
  };
  float* scratch = aligned(static_cast<float*>(memory.data_ptr()));
  float* workspace = scratch + threads * each;
  run_shares(whole, threads, [&](int64_t share, int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair)
      f(Wave{pair, 1, workspace + share * own},
        [&](int64_t tasks, const auto& stage) { stage(scratch + share * each, 0, tasks); });
  });
  for (int64_t first = whole; first < pairs; first += width)
    f(Wave{first, std::min(width, pairs - first), workspace}, [&](int64_t tasks, const auto& stage) {
      run_shares(tasks, threads, [&](int64_t share, int64_t begin, int64_t end) {
        stage(scratch + share * each, begin, end);
      });
    });
}

double products(const Problem& p, double of_dim, double of_v_dim) {
  return static_cast<double>(p.heads / p.kv_heads) * static_cast<double>(p.nq) * static_cast<double>(p.nk) *
         (of_dim * static_cast<double>(p.dim) + of_v_dim * static_cast<double>(p.v_dim));
}

// An output in q's own layout may have rows that the kernel cannot write directly.
Tensor writable(const Tensor& t) {
  return t.stride(3) == 1 ? t : make_empty(t, t.sizes());
}

// [B, H, Nq, Dv]; in q's memory layout where Dv is D.
Tensor output_like(const Tensor& q, const Problem& p) {
  return p.v_dim == p.dim ? make_empty_like(q) : make_empty(q, {p.batch, p.heads, p.nq, p.v_dim});
}

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& bounds, const OptionalTensor& key_bounds, double scale,
                                       const OptionalTensor&, const OptionalTensor&,
                                       const OptionalTensor& tree_words, const OptionalTensor& tree_prefix,
                                       const OptionalTensor& key_bias, const OptionalTensor&) {
  ForwardArgs args{};
  args.problem = check_problem(kOp, q, k, v, {bounds, key_bounds, tree_words, tree_prefix}, key_bias, scale);
  const Problem& p = args.problem;
  const Tensor k_rows = with_contiguous_rows(k), v_rows = with_contiguous_rows(v),
               q_rows = with_contiguous_rows(q);
  Tensor out = output_like(q, p);
  Tensor lse = make_empty(q, {p.batch, p.heads, p.nq}, ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  Tensor out_rows = writable(out);
  args.q = view(q_rows);
  args.k = view(k_rows);
  args.v = view(v_rows);
  args.out = view(out_rows);
  args.lse = static_cast<float*>(lse.data_ptr());

  const CpuKernels& kernels = kernels_for(p);
  const PairCost cost{kernels.forward_workspace(p), kernels.forward_scratch(p), kernels.forward_tasks(p, 1),
                      products(p, 2.0, 2.0)};
  run_waves(kOp, p, q, cost, [&](const Wave& wave, const auto& run) {
    run(kernels.forward_pack_tasks(p, wave.pairs), [&](float* scratch, int64_t begin, int64_t end) {
      kernels.forward_pack(args, wave, scratch, begin, end);
    });
    run(kernels.forward_tasks(p, wave.pairs), [&](float* scratch, int64_t begin, int64_t end) {
      kernels.forward(args, wave, scratch, begin, end);
    });
  });
  if (out.stride(3) != 1) torch::stable::copy_(out, out_rows);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& bounds, const OptionalTensor& key_bounds,
    double scale, const OptionalTensor&, const OptionalTensor&, const OptionalTensor& tree_words,
    const OptionalTensor& tree_prefix, const OptionalTensor& key_bias) {
  BackwardArgs args{};
  args.problem =
      check_problem(kBackwardOp, q, k, v, {bounds, key_bounds, tree_words, tree_prefix}, key_bias, scale);
  const Problem& p = args.problem;
  check_rows_of(kBackwardOp, "grad_out", grad_out, q, p.v_dim);
  check_rows_of(kBackwardOp, "out", out, q, p.v_dim);
  Tensor grad_q = make_empty_like(q), grad_k = make_empty_like(k), grad_v = make_empty_like(v);
  // One entry per query head; empty without a bias.
  Tensor grad_bias = key_bias.has_value() ? make_empty(q, {p.batch, p.heads, p.nk}, ScalarType::Float)
                                          : make_empty(q, {0}, ScalarType::Float);
  if (out.numel() == 0 || grad_k.numel() == 0) {
    torch::stable::zero_(grad_q);
    torch::stable::zero_(grad_k);
    torch::stable::zero_(grad_v);
    torch::stable::zero_(grad_bias);
    return {grad_q, grad_k, grad_v, grad_bias};
  }
  const Tensor grad_out_rows = with_contiguous_rows(grad_out), out_rows = with_contiguous_rows(out);
  const Tensor q_rows = with_contiguous_rows(q), k_rows = with_contiguous_rows(k),
               v_rows = with_contiguous_rows(v);
  const Tensor lse_rows = torch::stable::contiguous(lse);
  Tensor grad_lse_rows = lse_rows;
  args.lse = check_rows(kBackwardOp, "lse", lse_rows, q, p);
  if (grad_lse.has_value()) {
    grad_lse_rows = torch::stable::contiguous(*grad_lse);
    args.grad_lse = check_rows(kBackwardOp, "grad_lse", grad_lse_rows, q, p);
  }
  if (key_bias.has_value()) args.grad_bias = static_cast<float*>(grad_bias.data_ptr());
  Tensor grad_q_rows = writable(grad_q), grad_k_rows = writable(grad_k), grad_v_rows = writable(grad_v);
  args.grad_out = view(grad_out_rows);
  args.q = view(q_rows);
  args.k = view(k_rows);
  args.v = view(v_rows);
  args.out = view(out_rows);
  args.grad_q = view(grad_q_rows);
  args.grad_k = view(grad_k_rows);
  args.grad_v = view(grad_v_rows);

  const CpuKernels& kernels = kernels_for(p);
  const PairCost cost{kernels.backward_workspace(p), kernels.backward_scratch(p),
                      kernels.backward_tasks(p, 1), products(p, 6.0, 4.0)};
  run_waves(kBackwardOp, p, q, cost, [&](const Wave& wave, const auto& run) {
    run(kernels.backward_pack_tasks(p, wave.pairs), [&](float* scratch, int64_t begin, int64_t end) {
      kernels.backward_pack(args, wave, scratch, begin, end);
    });
    run(kernels.backward_tasks(p, wave.pairs), [&](float* scratch, int64_t begin, int64_t end) {
      kernels.backward(args, wave, scratch, begin, end);
    });
    run(kernels.backward_reduce_tasks(p, wave.pairs), [&](float* scratch, int64_t begin, int64_t end) {
      kernels.backward_reduce(args, wave, scratch, begin, end);
    });
  });
  if (grad_q.stride(3) != 1) torch::stable::copy_(grad_q, grad_q_rows);
  if (grad_k.stride(3) != 1) torch::stable::copy_(grad_k, grad_k_rows);
  if (grad_v.stride(3) != 1) torch::stable::copy_(grad_v, grad_v_rows);
  return {grad_q, grad_k, grad_v, grad_bias};
}

std::tuple<Tensor, Tensor> tangent_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                                       const Tensor& lse, const OptionalTensor& tangent_q,
                                       const OptionalTensor& tangent_k, const OptionalTensor& tangent_v,
                                       const OptionalTensor& tangent_bias, const Tensor& bounds,
                                       const OptionalTensor& key_bounds, double scale,
                                       const OptionalTensor& tree_words, const OptionalTensor& tree_prefix,
                                       const OptionalTensor& key_bias) {
  TangentArgs args{};
  args.problem =
      check_problem(kTangentOp, q, k, v, {bounds, key_bounds, tree_words, tree_prefix}, key_bias, scale);
  const Problem& p = args.problem;
  check_rows_of(kTangentOp, "out", out, q, p.v_dim);
  const Tensor lse_rows = torch::stable::contiguous(lse);
  args.lse = check_rows(kTangentOp, "lse", lse_rows, q, p);
  const Tensor q_rows = with_contiguous_rows(q), k_rows = with_contiguous_rows(k),
               v_rows = with_contiguous_rows(v), out_rows = with_contiguous_rows(out);
  Tensor tq_rows = q_rows, tk_rows = k_rows, tv_rows = v_rows;
  if (tangent_q.has_value()) {
    check_like(kTangentOp, "tangent_q", *tangent_q, q);
    tq_rows = with_contiguous_rows(*tangent_q);
    args.tangent_q = view(tq_rows);
  }
  if (tangent_k.has_value()) {
    check_like(kTangentOp, "tangent_k", *tangent_k, k);
    tk_rows = with_contiguous_rows(*tangent_k);
    args.tangent_k = view(tk_rows);
  }
  if (tangent_v.has_value()) {
    check_like(kTangentOp, "tangent_v", *tangent_v, v);
    tv_rows = with_contiguous_rows(*tangent_v);
    args.tangent_v = view(tv_rows);
  }
  if (tangent_bias.has_value())
    args.tangent_bias = check_bias(kTangentOp, "tangent_key_bias", *tangent_bias, q, p.nk);
  Tensor tangent_out = make_empty(q, {p.batch, p.heads, p.nq, p.v_dim});
  Tensor tangent_lse = make_empty(q, {p.batch, p.heads, p.nq}, ScalarType::Float);
  if (tangent_out.numel() == 0) return {tangent_out, tangent_lse};
  args.q = view(q_rows);
  args.k = view(k_rows);
  args.v = view(v_rows);
  args.out = view(out_rows);
  args.tangent_out = view(tangent_out);
  args.tangent_lse = static_cast<float*>(tangent_lse.data_ptr());

  const CpuKernels& kernels = cpu_kernels();
  const PairCost cost{kernels.tangent_workspace(p), kernels.tangent_scratch(p), kernels.tangent_tasks(p, 1),
                      products(p, 6.0, 4.0)};
  run_waves(kTangentOp, p, q, cost, [&](const Wave& wave, const auto& run) {
    run(kernels.tangent_pack_tasks(p, wave.pairs), [&](float* scratch, int64_t begin, int64_t end) {
      kernels.tangent_pack(args, wave, scratch, begin, end);
    });
    run(kernels.tangent_tasks(p, wave.pairs), [&](float* scratch, int64_t begin, int64_t end) {
      kernels.tangent(args, wave, scratch, begin, end);
    });
  });
  return {tangent_out, tangent_lse};
}

}  // namespace
}  // namespace arcore::block_sparse_attention

STABLE_TORCH_LIBRARY_FRAGMENT(arcore, m) {
  m.def(
      "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor bounds, Tensor? key_bounds, float scale,"
      " Tensor? plan_by_query=None, Tensor? plan_by_key=None, Tensor? tree_words=None,"
      " Tensor? tree_prefix=None, Tensor? key_bias=None, Tensor? plan_sm90=None)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "block_sparse_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v,"
      " Tensor out, Tensor lse, Tensor bounds, Tensor? key_bounds, float scale, Tensor? plan_by_query=None,"
      " Tensor? plan_by_key=None, Tensor? tree_words=None, Tensor? tree_prefix=None, Tensor? key_bias=None)"
      " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_key_bias)");
  m.def(
      "block_sparse_attention_jvp(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? tangent_q,"
      " Tensor? tangent_k, Tensor? tangent_v, Tensor? tangent_key_bias, Tensor bounds, Tensor? key_bounds,"
      " float scale, Tensor? tree_words=None, Tensor? tree_prefix=None, Tensor? key_bias=None)"
      " -> (Tensor tangent_out, Tensor tangent_lse)");
  m.def(
      "interval_tile_plan(Tensor bounds, Tensor? key_bounds, int nk, int tile_q, int tile_k, bool by_key,"
      " bool halves=False, bool visits=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(arcore, CPU, m) {
  m.impl("block_sparse_attention", TORCH_BOX(&arcore::block_sparse_attention::forward_cpu));
  m.impl("block_sparse_attention_backward", TORCH_BOX(&arcore::block_sparse_attention::backward_cpu));
  m.impl("block_sparse_attention_jvp", TORCH_BOX(&arcore::block_sparse_attention::tangent_cpu));
}
