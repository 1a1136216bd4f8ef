// What forward and backward on sm_80 share: a block owns kCudaChannels channels of kCudaSteps steps and
// stages them, with the steps around them that taps reach, as float32 in shared memory.
#pragma once

#include "causal_conv1d/params.h"
#include "common/sm80/device.h"
#include "common/sm80/launch.h"
#include "common/sm80/sequence_window.cuh"

namespace arcore::causal_conv1d {

constexpr int kConvThreads = 256;
constexpr int kLanesOfChannel = kConvThreads / kCudaChannels;  // each takes two times four steps
static_assert(kCudaSteps == 2 * 4 * kLanesOfChannel);

// Steps beside a run that are staged too: at least width - 1, and whole 16-byte words.
ARCORE_DEVICE constexpr int halo_of(int width) {
  return (width - 1 + 7) / 8 * 8;
}
constexpr int host_halo_of(int64_t width) {
  return static_cast<int>((width - 1 + 7) / 8 * 8);
}
constexpr int64_t runs_of(int64_t length) {
  return length <= kCudaSteps ? 1 : (length + kCudaSteps - 1) / kCudaSteps;
}

struct Block {
  int64_t run, runs, batch, channel, begin;
  int channels;

  ARCORE_DEVICE explicit Block(const Problem& p) {
    runs = p.length <= kCudaSteps ? 1 : (p.length + kCudaSteps - 1) / kCudaSteps;
    const int64_t tiles = (p.dim + kCudaChannels - 1) / kCudaChannels;
    run = block_x() % runs;
    channel = block_x() / runs % tiles * kCudaChannels;
    batch = block_x() / runs / tiles;
    begin = run * kCudaSteps;
    const int64_t left = p.dim - channel;
    channels = static_cast<int>(left < kCudaChannels ? left : kCudaChannels);
  }
};

inline int64_t blocks_of(const Problem& p) {
  return p.batch * runs_of(p.length) * ((p.dim + kCudaChannels - 1) / kCudaChannels);
}

ARCORE_DEVICE int32_t id_at(const SequenceIds& ids, int64_t batch, int64_t t) {
  return load_readonly(ids.data + batch * ids.batch + t * ids.time);
}

// The first id of a row that is not negative, or, backwards, the last; -1 if all are. All threads of the
// block take part; `scratch` is shared memory.
ARCORE_DEVICE int32_t real_id(const SequenceIds& ids, int64_t batch, int64_t length, bool backwards,
                              uint32_t* scratch) {
  for (int64_t begin = 0; begin < length; begin += kConvThreads) {
    const int64_t i = begin + thread_index();
    const int32_t id = i < length ? id_at(ids, batch, backwards ? length - 1 - i : i) : -1;
    if (thread_index() == 0) *scratch = kConvThreads;
    if (!sync_threads_or(id >= 0)) continue;
    if (id >= 0) atomic_min(scratch, static_cast<uint32_t>(thread_index()));
    sync_threads();
    const int64_t found = begin + *scratch;
    sync_threads();
    return id_at(ids, batch, backwards ? length - 1 - found : found);
  }
  return -1;
}

// Ids of steps [begin, begin + count): those before the row belong to its first sequence.
ARCORE_DEVICE void load_ids(const SequenceIds& ids, int64_t batch, int64_t length, int64_t begin, int count,
                            int32_t first, int32_t* shared) {
  for (int k = thread_index(); k < count; k += kConvThreads) {
    const int64_t t = begin + k;
    store_shared(shared + k, t < 0 ? first : t < length ? id_at(ids, batch, t) : int32_t{-1});
  }
}

// The inputs before the row.
struct History {
  const Problem& p;
  const float* data;
  int64_t batch, channel;

  ARCORE_DEVICE float operator()(int c, int64_t t) const {
    const int64_t before = p.width - 1;
    if (data == nullptr || t < -before) return 0.0f;
    return load_readonly(data + (batch * p.dim + channel + c) * before + before + t);
  }
};

// Weights of one channel. kWidth = 0: the width is known at run time only, and they are read where needed.
template <int kWidth>
struct Taps {
  float held[kWidth > 0 ? kWidth : 1];
  const float* data;
  int count;

  ARCORE_DEVICE Taps(const Problem& p, const float* weight, int64_t channel) {
    data = weight + channel * p.width;
    count = static_cast<int>(p.width);
    ARCORE_UNROLL
    for (int j = 0; j < kWidth; ++j)
      held[j] = load_readonly(data + j);
  }
  ARCORE_DEVICE int width() const { return kWidth > 0 ? kWidth : count; }
  ARCORE_DEVICE float at(int j) const {
    if constexpr (kWidth > 0)
      return held[j];
    else
      return load_readonly(data + j);
  }
};

// Runs f(j) for all taps, unrolled where their number is known.
template <int kWidth, typename F>
ARCORE_DEVICE void for_each_tap(int width, const F& f) {
  if constexpr (kWidth > 0) {
    ARCORE_UNROLL
    for (int j = 0; j < kWidth; ++j)
      f(j);
  } else {
    ARCORE_NO_UNROLL
    for (int j = 0; j < width; ++j)
      f(j);
  }
}

// at(k), k from -4 to 3: what lies k steps from `from` in a channel's row. In registers where the width is
// known, else read one by one, and then k may be any.
template <int kWidth>
struct Inputs8 {
  float held[8];
  const float* row;

  ARCORE_DEVICE explicit Inputs8(const float* from) : row(from) {
    if constexpr (kWidth > 0) {
      static_assert(kWidth <= 5);
      const Float4 low = load_shared(reinterpret_cast<const Float4*>(from - 4));
      const Float4 high = load_shared(reinterpret_cast<const Float4*>(from));
      ARCORE_UNROLL
      for (int k = 0; k < 4; ++k) {
        held[k] = low.x[k];
        held[4 + k] = high.x[k];
      }
    }
  }
  ARCORE_DEVICE float at(int k) const {
    if constexpr (kWidth > 0)
      return held[4 + k];
    else
      return load_shared(row + k);
  }
};

// Four outputs before the activation; `id` is the id of the first of them, or null.
template <int kWidth>
ARCORE_DEVICE void filter_four(const Taps<kWidth>& taps, float bias, const Inputs8<kWidth>& x,
                               const int32_t* id, float (&y)[4]) {
  ARCORE_UNROLL
  for (int k = 0; k < 4; ++k)
    y[k] = bias;
  for_each_tap<kWidth>(taps.width(), [&](int j) {
    ARCORE_UNROLL
    for (int k = 0; k < 4; ++k) {
      const int from = k - taps.width() + 1 + j;
      const bool use = id == nullptr || load_shared(id + from) == load_shared(id + k);
      y[k] = fused_multiply_add(taps.at(j), use ? x.at(from) : 0.0f, y[k]);
    }
  });
}

}  // namespace arcore::causal_conv1d
