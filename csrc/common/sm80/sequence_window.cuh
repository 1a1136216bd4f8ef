// Windows of [channel, time] data between global memory in any layout and float32 in shared memory, as
// [channel][step] with `pitch` floats from one channel to the next, or, transposed, [step][channel] with
// `pitch` floats from one step to the next.
#pragma once

#include "common/sm80/sequence.cuh"

namespace arcore {

struct alignas(16) Float4 {
  float x[4];
};

// Steps [begin, begin + count) of `channels` channels from `channel` on, of rows of `length` steps. begin may
// be negative, and the end behind the row. count and pitch are multiples of 8 and 4.
struct Window {
  int64_t batch, channel, begin, length;
  int channels, count, pitch;
};

// How threads share a window: 16 bytes along time each, 16 bytes along channels, or one element each, along
// the direction in which neighbours in memory lie.
enum class Walk { kSteps, kChannels, kElements };

template <typename T, int kChannels>
ARCORE_DEVICE Walk walk_of(const Sequence& s, const T* row, const Window& w) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T)), kBytes = static_cast<int>(sizeof(T));
  // As numbers: a window may begin before the row.
  const int64_t first = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row)) + w.begin * s.time * kBytes;
  if (s.time == 1 || s.time == -1) {
    const int64_t lowest = s.time == 1 ? first : first - (kVector - 1) * kBytes;
    return (lowest & 15) == 0 && (s.channel * kBytes & 15) == 0 ? Walk::kSteps : Walk::kElements;
  }
  const bool whole = kChannels % kVector == 0 && s.channel == 1 && w.channels == kChannels;
  return whole && (first & 15) == 0 && (s.time * kBytes & 15) == 0 ? Walk::kChannels : Walk::kElements;
}

template <typename T, int kVector>
ARCORE_DEVICE void load_vector(const T* from, float (&to)[kVector]) {
  const Vector16 raw = load_readonly(reinterpret_cast<const Vector16*>(from));
  ARCORE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4)
      to[i] = bits_float(raw.word[i]);
    else
      unpack2<T>(raw.word[i], to[2 * i], to[2 * i + 1]);
  }
}
template <typename T, int kVector>
ARCORE_DEVICE void store_vector(T* to, const float (&from)[kVector]) {
  Vector16 raw;
  ARCORE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4)
      raw.word[i] = float_bits(from[i]);
    else
      raw.word[i] = pack2<T>(from[2 * i], from[2 * i + 1]);
  }
  store_global(reinterpret_cast<Vector16*>(to), raw);
}
template <int kVector>
ARCORE_DEVICE void reverse_order(float (&values)[kVector]) {
  ARCORE_UNROLL
  for (int k = 0; k < kVector / 2; ++k) {
    const float swap = values[k];
    values[k] = values[kVector - 1 - k];
    values[kVector - 1 - k] = swap;
  }
}

// before(channel of the window, step) gives what lies at negative steps; behind the row and beyond the
// channels are zeros. All threads of the block take part.
template <typename T, int kChannels, bool kTransposed, typename Before>
ARCORE_DEVICE void load_window_as(const Sequence& s, const Window& w, float* shared, const Before& before) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const T* row = static_cast<const T*>(s.data) + w.batch * s.batch + w.channel * s.channel;
  const auto element = [&](int c, int64_t t) {
    if (c >= w.channels || t >= w.length) return 0.0f;
    return t < 0 ? before(c, t) : to_float(load_readonly(row + c * s.channel + t * s.time));
  };
  const auto place = [&](int c, int k) { return shared + (kTransposed ? k * w.pitch + c : c * w.pitch + k); };
  const Walk walk = walk_of<T, kChannels>(s, row, w);
  const int threads = block_threads();
  if (walk == Walk::kSteps) {
    const int per_row = w.count / kVector;
    for (int i = thread_index(); i < kChannels * per_row; i += threads) {
      const int c = i / per_row, k0 = i % per_row * kVector;
      const int64_t t = w.begin + k0;
      float values[kVector];
      if (c < w.channels && t >= 0 && t + kVector <= w.length) {
        load_vector<T>(row + c * s.channel + (s.time == 1 ? t : -t - (kVector - 1)), values);
        if (s.time != 1) reverse_order(values);
      } else {
        ARCORE_UNROLL
        for (int k = 0; k < kVector; ++k)
          values[k] = element(c, t + k);
      }
      if constexpr (kTransposed) {
        ARCORE_UNROLL
        for (int k = 0; k < kVector; ++k)
          store_shared(place(c, k0 + k), values[k]);
      } else {
        ARCORE_UNROLL
        for (int k = 0; k < kVector; k += 4)
          store_shared(reinterpret_cast<Float4*>(place(c, k0 + k)),
                       Float4{values[k], values[k + 1], values[k + 2], values[k + 3]});
      }
    }
  } else if (walk == Walk::kChannels) {
    constexpr int kPerStep = kChannels < kVector ? 1 : kChannels / kVector;
    for (int i = thread_index(); i < w.count * kPerStep; i += threads) {
      const int k0 = i / kPerStep, c = i % kPerStep * kVector;
      const int64_t t = w.begin + k0;
      float values[kVector];
      if (t >= 0 && t < w.length) {
        load_vector<T>(row + c + t * s.time, values);
      } else {
        ARCORE_UNROLL
        for (int k = 0; k < kVector; ++k)
          values[k] = element(c + k, t);
      }
      ARCORE_UNROLL
      for (int k = 0; k < kVector; ++k)
        store_shared(place(c + k, k0), values[k]);
    }
  } else {
    const bool steps_first = time_is_inner(s);
    for (int i = thread_index(); i < kChannels * w.count; i += threads) {
      const int c = steps_first ? i / w.count : i % kChannels;
      const int k = steps_first ? i % w.count : i / kChannels;
      store_shared(place(c, k), element(c, w.begin + k));
    }
  }
}

// The way back; begin is not negative.
template <typename T, int kChannels>
ARCORE_DEVICE void store_window_as(const Sequence& s, const Window& w, const float* shared) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  T* row = static_cast<T*>(s.data) + w.batch * s.batch + w.channel * s.channel;
  const Walk walk = walk_of<T, kChannels>(s, row, w);
  const int threads = block_threads();
  if (walk == Walk::kSteps) {
    const int per_row = w.count / kVector;
    for (int i = thread_index(); i < w.channels * per_row; i += threads) {
      const int c = i / per_row, k0 = i % per_row * kVector;
      const int64_t t = w.begin + k0;
      float values[kVector];
      ARCORE_UNROLL
      for (int k = 0; k < kVector; k += 4) {
        const Float4 quad = load_shared(reinterpret_cast<const Float4*>(shared + c * w.pitch + k0 + k));
        ARCORE_UNROLL
        for (int m = 0; m < 4; ++m)
          values[k + m] = quad.x[m];
      }
      if (t + kVector <= w.length) {
        if (s.time != 1) reverse_order(values);
        store_vector<T>(row + c * s.channel + (s.time == 1 ? t : -t - (kVector - 1)), values);
      } else {
        ARCORE_UNROLL
        for (int k = 0; k < kVector; ++k)
          if (t + k < w.length)
            store_global(row + c * s.channel + (t + k) * s.time, from_float<T>(values[k]));
      }
    }
  } else if (walk == Walk::kChannels) {
    constexpr int kPerStep = kChannels < kVector ? 1 : kChannels / kVector;
    for (int i = thread_index(); i < w.count * kPerStep; i += threads) {
      const int k0 = i / kPerStep, c = i % kPerStep * kVector;
      if (w.begin + k0 >= w.length) continue;
      float values[kVector];
      ARCORE_UNROLL
      for (int k = 0; k < kVector; ++k)
        values[k] = load_shared(shared + (c + k) * w.pitch + k0);
      store_vector<T>(row + c + (w.begin + k0) * s.time, values);
    }
  } else {
    const bool steps_first = time_is_inner(s);
    for (int i = thread_index(); i < kChannels * w.count; i += threads) {
      const int c = steps_first ? i / w.count : i % kChannels;
      const int k = steps_first ? i % w.count : i / kChannels;
      if (c < w.channels && w.begin + k < w.length)
        store_global(row + c * s.channel + (w.begin + k) * s.time,
                     from_float<T>(load_shared(shared + c * w.pitch + k)));
    }
  }
}

template <int kChannels, bool kTransposed = false, typename Before>
ARCORE_DEVICE void load_window(const Sequence& s, const Window& w, float* shared, const Before& before) {
  switch (s.dtype) {
    case StorageType::kBFloat16:
      return load_window_as<bfloat16, kChannels, kTransposed>(s, w, shared, before);
    case StorageType::kFloat16:
      return load_window_as<float16, kChannels, kTransposed>(s, w, shared, before);
    default:
      return load_window_as<float, kChannels, kTransposed>(s, w, shared, before);
  }
}
template <int kChannels>
ARCORE_DEVICE void store_window(const Sequence& s, const Window& w, const float* shared) {
  switch (s.dtype) {
    case StorageType::kBFloat16:
      return store_window_as<bfloat16, kChannels>(s, w, shared);
    case StorageType::kFloat16:
      return store_window_as<float16, kChannels>(s, w, shared);
    default:
      return store_window_as<float, kChannels>(s, w, shared);
  }
}

}  // namespace arcore
