// New tensors of an op, made without torch's dispatcher: `torch::stable::new_empty` and `empty_like` take as
// long as a small kernel. For schema.cpp files and what they include.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>

#include "common/check.h"

namespace arcore {

// Whether new tensors on CPUs are filled with NaN (integers: -1), so that tests find what is read before it
// is written. torch's own switch for this, `fill_uninitialized_memory`, does not reach what is made here.
inline bool& poison_new_memory() {
  static bool wanted = false;
  return wanted;
}

// Asks for large pages where new memory fills several. A kernel that streams through a fresh result else
// stops at every 4 KiB of it, which can take as long as its work. Only a wish: nothing depends on the answer.
inline void ask_for_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const auto first = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (first + kPage - 1) / kPage * kPage;
  const uintptr_t end = (first + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (end >= begin + 2 * kPage)
    static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE));
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

// Most dimensions that any op has, with room.
constexpr int64_t kMostDims = 8;

inline torch::stable::Tensor make_strided(const torch::stable::Tensor& like, const int64_t* sizes,
                                          const int64_t* strides, int64_t dims,
                                          torch::headeronly::ScalarType type) {
  int32_t device = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle made = nullptr;
  if (aoti_torch_empty_strided(dims, sizes, strides, static_cast<int32_t>(type), device, index, &made) !=
      AOTI_TORCH_SUCCESS) {
    double count = 1.0;
    for (int64_t i = 0; i < dims; ++i)
      count *= static_cast<double>(sizes[i]);
    fail("arcore: could not make a tensor of ", count, " numbers");
  }
  torch::stable::Tensor tensor(made);
  if (like.is_cpu()) {
    int64_t bytes = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
    ask_for_large_pages(tensor.data_ptr(), bytes);
    if (poison_new_memory() && bytes > 0) std::memset(tensor.data_ptr(), 0xff, static_cast<size_t>(bytes));
  }
  return tensor;
}

// As torch's new_empty: contiguous, on the device of `like`, and of its type unless another one is given.
inline torch::stable::Tensor make_empty(const torch::stable::Tensor& like,
                                        torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                        std::optional<torch::headeronly::ScalarType> type = std::nullopt) {
  const auto dims = static_cast<int64_t>(sizes.size());
  std::array<int64_t, kMostDims> strides{};
  int64_t step = 1;
  bool fits = dims <= kMostDims;
  for (int64_t i = dims - 1; fits && i >= 0; --i) {
    strides[static_cast<size_t>(i)] = step;
    const int64_t size = sizes[static_cast<size_t>(i)];
    fits = size >= 0 && !__builtin_mul_overflow(step, std::max<int64_t>(size, 1), &step);
  }
  // Whatever is wrong with the sizes, torch has the words for it.
  if (!fits) return torch::stable::new_empty(like, sizes, type);
  return make_strided(like, sizes.data(), strides.data(), dims, type.value_or(like.scalar_type()));
}

// As torch's empty_like: the strides of `t` where no two of its elements share memory and none lies unused
// between them.
inline torch::stable::Tensor make_empty_like(const torch::stable::Tensor& t) {
  const auto sizes = t.sizes();
  if (t.is_contiguous()) return make_empty(t, sizes);
  const auto dims = static_cast<int64_t>(sizes.size());
  const auto strides = t.strides();
  std::array<int64_t, kMostDims> order{};
  const auto stride = [&](int64_t i) { return strides[static_cast<size_t>(i)]; };
  bool dense = dims <= kMostDims;
  int64_t used = 0;  // dimensions in order of their strides
  for (int64_t i = 0; dense && i < dims; ++i) {
    if (sizes[static_cast<size_t>(i)] == 1) continue;
    int64_t at = used++;
    for (; at > 0 && stride(order[static_cast<size_t>(at - 1)]) > stride(i); --at)
      order[static_cast<size_t>(at)] = order[static_cast<size_t>(at - 1)];
    order[static_cast<size_t>(at)] = i;
  }
  int64_t step = 1;
  for (int64_t i = 0; dense && i < used; ++i) {
    dense = stride(order[static_cast<size_t>(i)]) == step;
    step *= sizes[static_cast<size_t>(order[static_cast<size_t>(i)])];
  }
  if (!dense) return torch::stable::empty_like(t);
  return make_strided(t, sizes.data(), strides.data(), dims, t.scalar_type());
}

}  // namespace arcore
