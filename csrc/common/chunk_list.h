// Builds the chunks of common/chunk.h; for schema.cpp files.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/chunk.h"
#include "common/sequence_view.h"

namespace arcore {

// Chunks of every row in scan order.
struct ChunkList {
  std::vector<Chunk> chunks;
  std::vector<int64_t> first{0};

  int64_t most = kChunk;  // steps of a chunk

  // Steps [begin, end) in scan order as one sequence.
  void add_sequence(int64_t begin, int64_t end, const Chunk& like) {
    int64_t at = begin;
    do {
      Chunk chunk = like;
      chunk.begin = at;
      chunk.length = std::min(most, end - at);
      chunk.first = at == begin;
      chunk.last = at + chunk.length == end;
      chunk.keep_last = like.keep_last && chunk.last;
      // A chunk that does not start its sequence begins at least kChunk steps after the one before it.
      chunk.slot = chunk.first ? -1 : at / kChunk - 1;
      if (like.ids != nullptr) chunk.ids = like.ids + at * like.id_stride;
      chunks.push_back(chunk);
      at += chunk.length;
    } while (at < end);
  }
  void end_row() { first.push_back(static_cast<int64_t>(chunks.size())); }
};

inline ChunkList whole_rows(int64_t length, int64_t most) {
  ChunkList list;
  list.most = most;
  Chunk like{};
  like.sequence = -1;
  like.keep_last = true;
  list.add_sequence(0, length, like);
  list.end_row();
  return list;
}

// Calls f(sequence, begin, length) for the sequences of a packed row, begin in scan order and sequences too.
template <typename F>
void for_each_sequence(const char* op, int64_t length, const torch::stable::Tensor& cu_seqlens, bool reverse,
                       const F& f) {
  const torch::stable::Tensor bounds =
      torch::stable::contiguous(torch::stable::to(cu_seqlens, torch::headeronly::ScalarType::Long));
  const int64_t* at = static_cast<const int64_t*>(bounds.data_ptr());
  const int64_t count = bounds.size(0) - 1;
  ARCORE_CHECK(at[0] == 0 && at[count] == length, op, "expected cu_seqlens to run from 0 to the length ",
               length, " but it runs from ", at[0], " to ", at[count]);
  for (int64_t i = 0; i < count; ++i)
    ARCORE_CHECK(at[i] <= at[i + 1], op, "expected cu_seqlens not to decrease but entry ", i + 1, " is ",
                 at[i + 1], " after ", at[i]);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t sequence = reverse ? count - 1 - i : i;
    f(sequence, reverse ? length - at[sequence + 1] : at[sequence], at[sequence + 1] - at[sequence]);
  }
}

inline ChunkList packed_row(const char* op, int64_t length, const torch::stable::Tensor& cu_seqlens,
                            bool reverse, int64_t most) {
  ChunkList list;
  list.most = most;
  for_each_sequence(op, length, cu_seqlens, reverse, [&](int64_t sequence, int64_t begin, int64_t steps) {
    Chunk like{};
    like.sequence = sequence;
    like.keep_last = true;
    list.add_sequence(begin, begin + steps, like);
  });
  list.end_row();
  return list;
}

inline ChunkList rows_by_id(int64_t batch, int64_t length, const torch::stable::Tensor& seq_idx, bool reverse,
                            int64_t most) {
  ChunkList list;
  list.most = most;
  const int64_t step = reverse ? -seq_idx.stride(1) : seq_idx.stride(1);
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* ids = static_cast<const int32_t*>(seq_idx.data_ptr()) + b * seq_idx.stride(0);
    if (reverse && length > 0) ids += (length - 1) * seq_idx.stride(1);
    Chunk like{};
    like.sequence = -1;
    int64_t begin = 0;
    int32_t current = -1;
    bool padded = false;
    for (int64_t t = 0; t < length; ++t) {
      const int32_t id = ids[t * step];
      padded = padded || id < 0;
      if (id < 0 || id == current) continue;
      if (current >= 0) {
        like.ids = padded ? ids : nullptr;
        like.id_stride = step;
        list.add_sequence(begin, t, like);
        like.zero_start = true;
        begin = t;
        padded = false;
      }
      current = id;
    }
    like.ids = padded ? ids : nullptr;
    like.id_stride = step;
    like.keep_last = true;
    list.add_sequence(begin, length, like);
    list.end_row();
  }
  if (batch == 0) list.end_row();
  return list;
}

// What can be said of cu_seqlens and seq_idx without reading them.
inline void check_sequences(const char* op, int64_t batch, int64_t length,
                            const std::optional<torch::stable::Tensor>& cu_seqlens,
                            const std::optional<torch::stable::Tensor>& seq_idx) {
  ARCORE_CHECK(!cu_seqlens.has_value() || !seq_idx.has_value(), op,
               "expected cu_seqlens or seq_idx but got both");
  if (cu_seqlens.has_value()) {
    ARCORE_CHECK(batch == 1, op, "expected batch 1 with cu_seqlens but got ", batch);
    ARCORE_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, op,
                 "expected cu_seqlens of shape (num_sequences + 1,) but got ", shape_of(*cu_seqlens));
    ARCORE_CHECK(cu_seqlens->scalar_type() == torch::headeronly::ScalarType::Int ||
                     cu_seqlens->scalar_type() == torch::headeronly::ScalarType::Long,
                 op, "expected cu_seqlens of dtype int32 or int64 but got ",
                 torch::headeronly::toString(cu_seqlens->scalar_type()));
    ARCORE_CHECK(cu_seqlens->size(0) > 1 || length == 0, op,
                 "expected cu_seqlens to run from 0 to the length ", length,
                 " but it has one entry, which is no sequence");
  }
  if (seq_idx.has_value()) {
    check_shape(op, "seq_idx", *seq_idx, {batch, length});
    ARCORE_CHECK(seq_idx->scalar_type() == torch::headeronly::ScalarType::Int, op,
                 "expected seq_idx of dtype int32 but got ",
                 torch::headeronly::toString(seq_idx->scalar_type()));
  }
}

inline ChunkList chunk_list(const char* op, int64_t batch, int64_t length,
                            const std::optional<torch::stable::Tensor>& cu_seqlens,
                            const std::optional<torch::stable::Tensor>& seq_idx, bool reverse,
                            int64_t most = kChunk) {
  check_sequences(op, batch, length, cu_seqlens, seq_idx);
  if (cu_seqlens.has_value()) return packed_row(op, length, *cu_seqlens, reverse, most);
  if (seq_idx.has_value()) return rows_by_id(batch, length, *seq_idx, reverse, most);
  return whole_rows(length, most);
}

}  // namespace arcore
