// Rows in memory and the order of tasks, for the CPU kernels.
#pragma once

#include <limits>
#include <type_traits>

#include "block_sparse_attention/params.h"
#include "common/ask.h"
#include "common/vec.h"

namespace arcore::block_sparse_attention {
namespace ARCORE_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Parallel work units that the backward wants of one batch entry at least; fixed, so that results depend
// neither on the thread count nor on batch mates.
constexpr int64_t kBackwardUnits = 16;

// Visits 0, n-1, 1, n-2, ...: equal shares of consecutive tasks get equal work when work grows with the
// index.
int64_t fold(int64_t i, int64_t n) {
  return i % 2 == 0 ? i / 2 : n - 1 - i / 2;
}

// Hands out parts of a thread's scratch, each on a cache line of its own.
class Scratch {
 public:
  explicit Scratch(float* memory) : next_(memory) {}
  float* take(int64_t floats) {
    float* taken = next_;
    next_ += round_up(floats, 16);
    return taken;
  }

 private:
  float* next_;
};

template <typename F>
void with_storage(StorageType type, F&& f) {
  switch (type) {
    case StorageType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case StorageType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case StorageType::kFloat16:
      return f(static_cast<Half*>(nullptr));
  }
}

int64_t row_offset(const Tensor4& t, int64_t b, int64_t h, int64_t row) {
  return b * t.batch + h * t.head + row * t.row;
}

void write_row(StorageType type, const Tensor4& t, int64_t b, int64_t h, int64_t row, const float* src,
               int64_t n) {
  with_storage(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    from_float(src, static_cast<T*>(t.data) + row_offset(t, b, h, row), n);
  });
}

// n is a multiple of kLanes.
void scale_row(float* x, int64_t n, float factor) {
  const Vec f(factor);
  for (int64_t i = 0; i < n; i += kLanes)
    store(x + i, load(x + i) * f);
}

// Copies the bias of keys [k0, k0 + keys) to a place where whole vectors may be read; nullptr if there is
// none.
const float* tile_bias(const KeyBias& bias, int64_t b, int64_t h, int64_t k0, int64_t keys, float* buffer) {
  if (bias.data == nullptr) return nullptr;
  const float* source = bias.data + b * bias.batch + h * bias.head + k0;
  for (int64_t j = 0; j < keys; ++j)
    buffer[j] = source[j];
  for (int64_t j = keys; j < round_up(keys, kLanes); ++j)
    buffer[j] = 0.0f;
  return buffer;
}

// Whether each pair has one query tile only. Then nobody shares its packed keys, and each key tile is packed
// just before it is used, into scratch that stays in cache, instead of once into the workspace.
bool packs_by_tile(const Problem& p, int64_t tile) {
  return p.heads == p.kv_heads && p.nq <= tile;
}

// The keys and values of the tile behind one that is worked on, for kernels that read them once, tile by
// tile.
struct TileAhead {
  const ForwardArgs& args;
  int64_t b, h, k0, keys;

  TileAhead(const ForwardArgs& args, int64_t b, int64_t h, int64_t k0, int64_t tile)
      : args(args), b(b), h(h), k0(k0), keys(min_of(tile, args.problem.nk - k0)) {}

  // Asks for part `part` of `parts` of its rows.
  __attribute__((always_inline)) void ask(int64_t part, int64_t parts) const {
    const Problem& p = args.problem;
    const int64_t size = p.dtype == StorageType::kFloat32 ? 4 : 2;
    for (int64_t j = keys * part / parts; j < keys * (part + 1) / parts; ++j) {
      ask_for(static_cast<const char*>(args.k.data) + row_offset(args.k, b, h, k0 + j) * size, p.dim * size);
      ask_for(static_cast<const char*>(args.v.data) + row_offset(args.v, b, h, k0 + j) * size,
              p.v_dim * size);
    }
  }
};

void fill_columns(float* x, int64_t begin, int64_t end, float value) {
  for (int64_t j = begin; j < end; ++j)
    x[j] = value;
}

}  // namespace
}  // namespace ARCORE_ISA
}  // namespace arcore::block_sparse_attention
