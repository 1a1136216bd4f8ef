// torch.ops.arcore.block_sparse_attention and its backward: schema, checks, allocation, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "block_sparse_attention/params.h"
#include "common/check.h"
#include "common/cpu_dispatch.h"
#include "common/parallel.h"

namespace arcore::block_sparse_attention {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "block_sparse_attention";
constexpr const char* kBackwardOp = "block_sparse_attention_backward";
constexpr int64_t kMaxHeadDim = 256;

// Below this many floating-point operations a second thread costs more than it saves.
constexpr double kFlopsPerThread = 4e6;

// Kernels read rows of D contiguous elements.
Tensor with_contiguous_rows(const Tensor& t) {
  return t.numel() == 0 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

Tensor4 view(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

Problem check_problem(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bounds,
                      const OptionalTensor& key_bounds, double scale) {
  ARCORE_CHECK(q.dim() == 4, op, "expected q of shape [B, H, Nq, D] but got ", shape_of(q));
  Problem p{};
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.nq = q.size(2);
  p.dim = q.size(3);
  ARCORE_CHECK(k.dim() == 4 && k.size(0) == p.batch && k.size(3) == p.dim, op, "expected k of shape (",
               p.batch, ", Hkv, Nk, ", p.dim, ") but got ", shape_of(k));
  p.kv_heads = k.size(1);
  p.nk = k.size(2);
  ARCORE_CHECK(v.dim() == 4 && v.size(0) == p.batch && v.size(1) == p.kv_heads && v.size(2) == p.nk &&
                   v.size(3) == p.dim,
               op, "expected v of k's shape ", shape_of(k), " but got ", shape_of(v));
  ARCORE_CHECK(p.kv_heads == 0 ? p.heads == 0 : p.heads % p.kv_heads == 0, op,
               "expected the heads of q to be a multiple of those of k but got H=", p.heads,
               " and Hkv=", p.kv_heads);
  ARCORE_CHECK(p.dim % 8 == 0 && p.dim >= 8 && p.dim <= kMaxHeadDim, op,
               "expected head_dim to be a multiple of 8 from 8 to ", kMaxHeadDim, " but got ", p.dim,
               "; pad it");
  p.dtype = storage_type(q, op, "q");
  ARCORE_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), op,
               "expected q, k and v of one dtype but got ", torch::headeronly::toString(q.scalar_type()),
               ", ", torch::headeronly::toString(k.scalar_type()), " and ",
               torch::headeronly::toString(v.scalar_type()));
  p.scale = static_cast<float>(scale);

  ARCORE_CHECK(bounds.scalar_type() == ScalarType::Int, op, "expected bounds of dtype int32 but got ",
               torch::headeronly::toString(bounds.scalar_type()));
  ARCORE_CHECK(bounds.dim() == 4 && (bounds.size(3) == 2 || bounds.size(3) == 4) && bounds.size(2) == p.nq &&
                   (bounds.size(0) == 1 || bounds.size(0) == p.batch) &&
                   (bounds.size(1) == 1 || bounds.size(1) == p.heads),
               op, "expected bounds of shape [1 or ", p.batch, ", 1 or ", p.heads, ", ", p.nq,
               ", 2 or 4] but got ", shape_of(bounds));
  ARCORE_CHECK(bounds.is_cpu() && bounds.is_contiguous(), op,
               "expected bounds to be a contiguous CPU tensor");
  p.mask.intervals = static_cast<int>(bounds.size(3) / 2);
  p.mask.bounds = static_cast<const int32_t*>(bounds.data_ptr());
  p.mask.batch = bounds.size(0) == 1 ? 0 : bounds.stride(0);
  p.mask.head = bounds.size(1) == 1 ? 0 : bounds.stride(1);
  if (key_bounds.has_value()) {
    const Tensor& kb = *key_bounds;
    ARCORE_CHECK(kb.scalar_type() == ScalarType::Int, op, "expected key_bounds of dtype int32 but got ",
                 torch::headeronly::toString(kb.scalar_type()));
    ARCORE_CHECK(
        kb.dim() == 3 && kb.size(2) == 2 && kb.size(1) == p.nk && (kb.size(0) == 1 || kb.size(0) == p.batch),
        op, "expected key_bounds of shape [1 or ", p.batch, ", ", p.nk, ", 2] but got ", shape_of(kb));
    ARCORE_CHECK(kb.is_cpu() && kb.is_contiguous(), op, "expected key_bounds to be a contiguous CPU tensor");
    p.mask.key_bounds = static_cast<const int32_t*>(kb.data_ptr());
    p.mask.key_batch = kb.size(0) == 1 ? 0 : kb.stride(0);
  }
  return p;
}

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  bool same = t.dim() == like.dim() && t.scalar_type() == like.scalar_type();
  for (int64_t i = 0; same && i < t.dim(); ++i)
    same = t.size(i) == like.size(i);
  ARCORE_CHECK(same, op, "expected ", name, " of shape ", shape_of(like), " and dtype ",
               torch::headeronly::toString(like.scalar_type()), " but got ", shape_of(t), " and ",
               torch::headeronly::toString(t.scalar_type()));
}

const float* check_rows(const char* op, const char* name, const Tensor& t, const Problem& p) {
  ARCORE_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 3 && t.size(0) == p.batch &&
                   t.size(1) == p.heads && t.size(2) == p.nq,
               op, "expected ", name, " float32 of shape (", p.batch, ", ", p.heads, ", ", p.nq, ") but got ",
               torch::headeronly::toString(t.scalar_type()), " ", shape_of(t));
  return static_cast<const float*>(t.data_ptr());
}

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
                                       const Tensor& bounds, const OptionalTensor& key_bounds, double scale) {
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
                                                const OptionalTensor& key_bounds, double scale) {
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
      "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor bounds, Tensor? key_bounds, float scale)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "block_sparse_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out,"
      " Tensor lse, Tensor bounds, Tensor? key_bounds, float scale) -> (Tensor grad_q, Tensor grad_k, Tensor "
      "grad_v)");
}

STABLE_TORCH_LIBRARY_IMPL(arcore, CPU, m) {
  m.impl("block_sparse_attention", TORCH_BOX(&arcore::block_sparse_attention::forward_cpu));
  m.impl("block_sparse_attention_backward", TORCH_BOX(&arcore::block_sparse_attention::backward_cpu));
}
