// What an op that writes into its argument must know: that no two of its elements share memory, and that no
// other argument reads what is written.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <utility>
#include <vector>

#include "common/check.h"

namespace arcore {

// The bytes between the first and the last element of a tensor.
struct ByteRange {
  std::uintptr_t begin, end;
};

inline int64_t bytes_of(const torch::stable::Tensor& t) {
  return static_cast<int64_t>(t.element_size());
}

inline ByteRange byte_range(const torch::stable::Tensor& t) {
  const auto first = reinterpret_cast<std::uintptr_t>(t.data_ptr());
  if (t.numel() == 0) return {first, first};
  std::uintptr_t last = first;
  for (int64_t i = 0; i < t.dim(); ++i)
    last += static_cast<std::uintptr_t>((t.size(i) - 1) * t.stride(i) * bytes_of(t));
  return {first, last + static_cast<std::uintptr_t>(bytes_of(t))};
}

// Whether every element has memory of its own, as far as sorted strides tell: each dimension steps over all
// that lies within it. Layouts that interleave without meeting are refused too; nobody keeps states in one.
inline bool has_own_memory(const torch::stable::Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) == 0) return true;
    if (t.size(i) > 1) dims.emplace_back(t.stride(i), t.size(i));
  }
  std::sort(dims.begin(), dims.end());
  int64_t within = 1;
  for (const auto& [stride, size] : dims) {
    if (stride < within) return false;
    within += (size - 1) * stride;
  }
  return true;
}

// Calls f(address) for every element.
template <typename F>
void for_each_address(const torch::stable::Tensor& t, const F& f) {
  std::vector<int64_t> at(static_cast<size_t>(t.dim()), 0);
  const auto first = reinterpret_cast<std::uintptr_t>(t.data_ptr());
  if (t.numel() == 0) return;
  while (true) {
    std::uintptr_t address = first;
    for (int64_t i = 0; i < t.dim(); ++i)
      address += static_cast<std::uintptr_t>(at[static_cast<size_t>(i)] * t.stride(i) * bytes_of(t));
    f(address);
    int64_t i = t.dim() - 1;
    for (; i >= 0; --i) {
      if (++at[static_cast<size_t>(i)] < t.size(i)) break;
      at[static_cast<size_t>(i)] = 0;
    }
    if (i < 0) return;
  }
}

// Whether two tensors share an element. Exact; slow only where one lies in the gaps of the other.
inline bool share_memory(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  const ByteRange x = byte_range(a), y = byte_range(b);
  if (x.end <= y.begin || y.end <= x.begin || a.numel() == 0 || b.numel() == 0) return false;
  if (a.is_contiguous() && b.is_contiguous()) return true;
  const std::uintptr_t begin = std::min(x.begin, y.begin);
  std::vector<bool> taken(static_cast<size_t>(std::max(x.end, y.end) - begin));
  for_each_address(a, [&](std::uintptr_t address) {
    for (int64_t i = 0; i < bytes_of(a); ++i)
      taken[static_cast<size_t>(address - begin) + static_cast<size_t>(i)] = true;
  });
  bool shared = false;
  for_each_address(b, [&](std::uintptr_t address) {
    for (int64_t i = 0; i < bytes_of(b); ++i)
      shared = shared || taken[static_cast<size_t>(address - begin) + static_cast<size_t>(i)];
  });
  return shared;
}

inline void check_written(const char* op, const char* name, const torch::stable::Tensor& t) {
  ARCORE_CHECK(has_own_memory(t), op, "expected ", name,
               " whose elements have memory of their own but got one of shape ", shape_of(t),
               " in which several share it, as expand() makes; write into ", name, ".clone()");
}

inline void check_not_written(const char* op, const char* name, const torch::stable::Tensor& t,
                              const char* written, const torch::stable::Tensor& target) {
  ARCORE_CHECK(!share_memory(target, t), op, "expected ", name, " apart from ", written,
               ", which is written in place, but they share memory; pass ", name, ".clone()");
}

}  // namespace arcore
