// Argument checks and views that the CPU and the CUDA side of block_sparse_attention share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "block_sparse_attention/params.h"
#include "common/check.h"

namespace arcore::block_sparse_attention {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "block_sparse_attention";
constexpr const char* kBackwardOp = "block_sparse_attention_backward";
constexpr const char* kTangentOp = "block_sparse_attention_jvp";
constexpr const char* kPlanOp = "interval_tile_plan";

// What an op takes beside q, k, v and the row bounds.
struct MaskTensors {
  const Tensor& bounds;
  const OptionalTensor& key_bounds;
  const OptionalTensor& tree_words;
  const OptionalTensor& tree_prefix;
};

// Kernels read rows of D contiguous elements.
inline Tensor with_contiguous_rows(const Tensor& t) {
  return t.numel() == 0 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

inline Tensor4 view(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

inline KeyBias check_bias(const char* op, const char* name, const Tensor& t, const Tensor& q, int64_t nk) {
  ARCORE_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 3 &&
                   (t.size(0) == 1 || t.size(0) == q.size(0)) && (t.size(1) == 1 || t.size(1) == q.size(1)) &&
                   t.size(2) == nk && t.is_contiguous(),
               op, "expected ", name, " float32 of shape [1 or ", q.size(0), ", 1 or ", q.size(1), ", ", nk,
               "], contiguous, but got ", torch::headeronly::toString(t.scalar_type()), " ", shape_of(t));
  check_device(op, name, t, q);
  return {static_cast<const float*>(t.data_ptr()), t.size(0) == 1 ? 0 : t.stride(0),
          t.size(1) == 1 ? 0 : t.stride(1)};
}

inline Problem check_problem(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                             const MaskTensors& mask, const OptionalTensor& key_bias, double scale) {
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
  ARCORE_CHECK(v.dim() == 4 && v.size(0) == p.batch && v.size(1) == p.kv_heads && v.size(2) == p.nk, op,
               "expected v of shape (", p.batch, ", ", p.kv_heads, ", ", p.nk, ", Dv), to fit k, but got ",
               shape_of(v));
  p.v_dim = v.size(3);
  ARCORE_CHECK(p.kv_heads == 0 ? p.heads == 0 : p.heads % p.kv_heads == 0, op,
               "expected the heads of q to be a multiple of those of k but got H=", p.heads,
               " and Hkv=", p.kv_heads);
  ARCORE_CHECK(p.dim >= 1 && p.v_dim >= 1, op, "expected a head_dim of at least 1 but got q ", shape_of(q),
               " and v ", shape_of(v));
  p.dtype = storage_type(q, op, "q");
  ARCORE_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), op,
               "expected q, k and v of one dtype but got ", torch::headeronly::toString(q.scalar_type()),
               ", ", torch::headeronly::toString(k.scalar_type()), " and ",
               torch::headeronly::toString(v.scalar_type()));
  p.scale = static_cast<float>(scale);

  const Tensor& bounds = mask.bounds;
  ARCORE_CHECK(bounds.scalar_type() == ScalarType::Int, op, "expected bounds of dtype int32 but got ",
               torch::headeronly::toString(bounds.scalar_type()));
  ARCORE_CHECK(bounds.dim() == 4 && (bounds.size(3) == 2 || bounds.size(3) == 4) && bounds.size(2) == p.nq &&
                   (bounds.size(0) == 1 || bounds.size(0) == p.batch) &&
                   (bounds.size(1) == 1 || bounds.size(1) == p.heads),
               op, "expected bounds of shape [1 or ", p.batch, ", 1 or ", p.heads, ", ", p.nq,
               ", 2 or 4] but got ", shape_of(bounds));
  check_device(op, "k", k, q);
  check_device(op, "v", v, q);
  check_device(op, "bounds", bounds, q);
  ARCORE_CHECK(bounds.is_contiguous(), op, "expected bounds to be contiguous");
  p.mask.intervals = static_cast<int>(bounds.size(3) / 2);
  p.mask.bounds = static_cast<const int32_t*>(bounds.data_ptr());
  p.mask.batch = bounds.size(0) == 1 ? 0 : bounds.stride(0);
  p.mask.head = bounds.size(1) == 1 ? 0 : bounds.stride(1);
  if (mask.key_bounds.has_value()) {
    const Tensor& kb = *mask.key_bounds;
    ARCORE_CHECK(kb.scalar_type() == ScalarType::Int, op, "expected key_bounds of dtype int32 but got ",
                 torch::headeronly::toString(kb.scalar_type()));
    ARCORE_CHECK(
        kb.dim() == 3 && kb.size(2) == 2 && kb.size(1) == p.nk && (kb.size(0) == 1 || kb.size(0) == p.batch),
        op, "expected key_bounds of shape [1 or ", p.batch, ", ", p.nk, ", 2] but got ", shape_of(kb));
    check_device(op, "key_bounds", kb, q);
    ARCORE_CHECK(kb.is_contiguous(), op, "expected key_bounds to be contiguous");
    p.mask.key_bounds = static_cast<const int32_t*>(kb.data_ptr());
    p.mask.key_batch = kb.size(0) == 1 ? 0 : kb.stride(0);
  }
  ARCORE_CHECK(mask.tree_words.has_value() == mask.tree_prefix.has_value(), op,
               "expected tree_words and tree_prefix together but got one of them; pass both or none");
  if (mask.tree_words.has_value()) {
    const Tensor &words = *mask.tree_words, &prefix = *mask.tree_prefix;
    ARCORE_CHECK(words.scalar_type() == ScalarType::Long && words.dim() == 3 &&
                     (words.size(0) == 1 || words.size(0) == p.batch) && words.size(1) == p.nq &&
                     words.size(2) >= 1 && words.is_contiguous(),
                 op, "expected tree_words int64 of shape [1 or ", p.batch, ", ", p.nq,
                 ", words], contiguous, but got ", torch::headeronly::toString(words.scalar_type()), " ",
                 shape_of(words));
    ARCORE_CHECK(prefix.scalar_type() == ScalarType::Int && prefix.dim() == 1 &&
                     (prefix.size(0) == 1 || prefix.size(0) == p.batch) && prefix.is_contiguous(),
                 op, "expected tree_prefix int32 of shape [1 or ", p.batch, "], contiguous, but got ",
                 torch::headeronly::toString(prefix.scalar_type()), " ", shape_of(prefix));
    check_device(op, "tree_words", words, q);
    check_device(op, "tree_prefix", prefix, q);
    p.mask.words = static_cast<const int64_t*>(words.data_ptr());
    p.mask.words_batch = words.size(0) == 1 ? 0 : words.stride(0);
    p.mask.words_per_row = words.size(2);
    p.mask.prefix = static_cast<const int32_t*>(prefix.data_ptr());
    p.mask.prefix_batch = prefix.size(0) == 1 ? 0 : 1;
  }
  if (key_bias.has_value()) p.bias = check_bias(op, "key_bias", *key_bias, q, p.nk);
  return p;
}

// [B, H, Nq, dim] in the dtype and on the device of q.
inline void check_rows_of(const char* op, const char* name, const Tensor& t, const Tensor& q, int64_t dim) {
  ARCORE_CHECK(t.dim() == 4 && t.scalar_type() == q.scalar_type() && t.size(0) == q.size(0) &&
                   t.size(1) == q.size(1) && t.size(2) == q.size(2) && t.size(3) == dim,
               op, "expected ", name, " of shape (", q.size(0), ", ", q.size(1), ", ", q.size(2), ", ", dim,
               ") and dtype ", torch::headeronly::toString(q.scalar_type()), " but got ", shape_of(t),
               " and ", torch::headeronly::toString(t.scalar_type()));
  check_device(op, name, t, q);
}

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  bool same = t.dim() == like.dim() && t.scalar_type() == like.scalar_type();
  for (int64_t i = 0; same && i < t.dim(); ++i)
    same = t.size(i) == like.size(i);
  ARCORE_CHECK(same, op, "expected ", name, " of shape ", shape_of(like), " and dtype ",
               torch::headeronly::toString(like.scalar_type()), " but got ", shape_of(t), " and ",
               torch::headeronly::toString(t.scalar_type()));
  check_device(op, name, t, like);
}

inline const float* check_rows(const char* op, const char* name, const Tensor& t, const Tensor& q,
                               const Problem& p) {
  check_device(op, name, t, q);
  ARCORE_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 3 && t.size(0) == p.batch &&
                   t.size(1) == p.heads && t.size(2) == p.nq,
               op, "expected ", name, " float32 of shape (", p.batch, ", ", p.heads, ", ", p.nq, ") but got ",
               torch::headeronly::toString(t.scalar_type()), " ", shape_of(t));
  return static_cast<const float*>(t.data_ptr());
}

// All but the plan itself.
inline PlanArgs check_plan(const Tensor& bounds, const OptionalTensor& key_bounds, int64_t nk, int64_t tile_q,
                           int64_t tile_k, bool by_key, bool halves, bool visits) {
  ARCORE_CHECK(bounds.scalar_type() == ScalarType::Int && bounds.dim() == 4 && bounds.is_contiguous() &&
                   (bounds.size(3) == 2 || bounds.size(3) == 4),
               kPlanOp, "expected bounds int32 of shape [B, H, Nq, 2 or 4], contiguous, but got ",
               torch::headeronly::toString(bounds.scalar_type()), " ", shape_of(bounds));
  ARCORE_CHECK(tile_q >= 1 && tile_q <= 1 << 20 && tile_k >= 1 && tile_k <= 1 << 20, kPlanOp,
               "expected tile_q and tile_k from 1 to 2^20 but got ", tile_q, " and ", tile_k);
  ARCORE_CHECK(nk >= 0, kPlanOp, "expected nk >= 0 but got ", nk);
  ARCORE_CHECK(!halves || (by_key ? tile_k : tile_q) % 2 == 0, kPlanOp,
               "expected an even tile where halves are asked for but got ", by_key ? tile_k : tile_q);
  ARCORE_CHECK(!halves || !visits, kPlanOp, "expected halves or visits, not both");
  PlanArgs args{};
  args.batch = bounds.size(0);
  args.heads = bounds.size(1);
  args.nq = bounds.size(2);
  args.nk = nk;
  args.mask.intervals = static_cast<int>(bounds.size(3) / 2);
  args.mask.bounds = static_cast<const int32_t*>(bounds.data_ptr());
  args.mask.batch = args.batch == 1 ? 0 : bounds.stride(0);
  args.mask.head = args.heads == 1 ? 0 : bounds.stride(1);
  if (key_bounds.has_value()) {
    const Tensor& kb = *key_bounds;
    ARCORE_CHECK(
        kb.scalar_type() == ScalarType::Int && kb.dim() == 3 && kb.is_contiguous() && kb.size(1) == nk &&
            kb.size(2) == 2 && (kb.size(0) == 1 || args.batch == 1 || kb.size(0) == args.batch),
        kPlanOp, "expected key_bounds int32 of shape [1 or ", args.batch, ", ", nk,
        ", 2], contiguous, but got ", torch::headeronly::toString(kb.scalar_type()), " ", shape_of(kb));
    check_device(kPlanOp, "key_bounds", kb, bounds);
    args.mask.key_bounds = static_cast<const int32_t*>(kb.data_ptr());
    args.mask.key_batch = kb.size(0) == 1 ? 0 : kb.stride(0);
    args.batch = std::max(args.batch, kb.size(0));
  }
  args.tile_q = static_cast<int>(tile_q);
  args.tile_k = static_cast<int>(tile_k);
  args.by_key = by_key;
  args.halves = halves;
  args.visits = visits;
  const int64_t across_q = (args.nq + tile_q - 1) / tile_q, across_k = (nk + tile_k - 1) / tile_k;
  args.rows = by_key ? across_k : across_q;
  args.columns = by_key ? across_q : across_k;
  args.pitch = 2 + (visits ? 2 : 1) * args.columns;
  return args;
}

}  // namespace arcore::block_sparse_attention
