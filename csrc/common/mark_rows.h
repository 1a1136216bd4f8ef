// The marks of packed rows (common/marks.h) of one call; for cuda.cpp files.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "common/cuda_call.h"
#include "common/marks.h"

namespace arcore {

struct MarkedRows {
  const int32_t* marks;  // [batch, length] in scan order, or null: whole rows
  bool packed;           // cu_seqlens: marks name rows of the states
};

// Sets the marks of rows like `like`, a [batch, ...] tensor, by `launch`; `held` keeps what they point at.
inline MarkedRows mark_rows(const char* op, const torch::stable::Tensor& like, int64_t length,
                            const std::optional<torch::stable::Tensor>& cu_seqlens,
                            const std::optional<torch::stable::Tensor>& seq_idx, bool reverse,
                            std::vector<torch::stable::Tensor>& held, void* stream,
                            int (*launch)(const MarkArgs&, void*)) {
  using torch::headeronly::ScalarType;
  MarkedRows rows{nullptr, false};
  if (!cu_seqlens.has_value() && !seq_idx.has_value()) return rows;
  MarkArgs args{};
  args.batch = like.size(0);
  args.length = length;
  args.reverse = reverse;
  if (seq_idx.has_value()) {
    args.seq_idx = static_cast<const int32_t*>(seq_idx->data_ptr());
    args.id_batch = seq_idx->stride(0);
    args.id_time = seq_idx->stride(1);
  } else {
    held.push_back(torch::stable::contiguous(cu_seqlens->scalar_type() == ScalarType::Long
                                                 ? *cu_seqlens
                                                 : torch::stable::to(*cu_seqlens, ScalarType::Long)));
    args.cu_seqlens = static_cast<const int64_t*>(held.back().data_ptr());
    args.sequences = cu_seqlens->size(0) - 1;
    rows.packed = true;
  }
  held.push_back(torch::stable::new_empty(like, {args.batch, length}, ScalarType::Int));
  args.marks = static_cast<int32_t*>(held.back().data_ptr());
  check_launch(op, launch(args, stream));
  rows.marks = args.marks;
  return rows;
}

}  // namespace arcore
