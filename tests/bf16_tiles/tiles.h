// AMX's tile instructions in plain C++, for kernels that are compiled with this in front of them. Stricter
// than the hardware: shapes that do not fit, tiles without a configuration and a configuration that is left
// behind end the process.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// How many tile products there were, so that a test can say that it has tested something.
extern "C" __attribute__((weak, visibility("default"))) int64_t arcore_tile_products = 0;

namespace arcore_tiles {
namespace {

struct Tile {
  unsigned char rows[16][64];
};

struct State {
  bool configured = false;
  int rows[8] = {}, bytes[8] = {};
  Tile tiles[8];
  ~State() {
    if (configured) std::fputs("tiles: a thread ended without a release\n", stderr);
  }
};

inline State& state() {
  static thread_local State current;
  return current;
}

inline void demand(bool fits, const char* what) {
  if (fits) return;
  std::fprintf(stderr, "tiles: %s\n", what);
  std::abort();
}

inline void loadconfig(const void* memory) {
  unsigned char config[64];
  std::memcpy(config, memory, sizeof(config));
  State& s = state();
  demand(config[0] == 1, "palette 1 alone is known");
  for (int t = 0; t < 8; ++t) {
    s.bytes[t] = config[16 + 2 * t] | config[17 + 2 * t] << 8;
    s.rows[t] = config[48 + t];
    demand(s.bytes[t] <= 64 && s.rows[t] <= 16, "a tile has up to 16 rows of 64 bytes");
    std::memset(&s.tiles[t], 0, sizeof(Tile));
  }
  for (int i = 1; i < 16; ++i)
    demand(config[i] == 0, "reserved bytes and the start row are 0");
  s.configured = true;
}

inline void release() {
  state().configured = false;
}

inline Tile& tile(int t) {
  demand(state().configured, "no configuration");
  demand(state().rows[t] > 0 && state().bytes[t] > 0, "the configuration has no such tile");
  return state().tiles[t];
}

inline void loadd(int t, const void* base, size_t stride) {
  Tile& to = tile(t);
  std::memset(&to, 0, sizeof(Tile));
  for (int r = 0; r < state().rows[t]; ++r)
    std::memcpy(to.rows[r], static_cast<const unsigned char*>(base) + static_cast<size_t>(r) * stride,
                static_cast<size_t>(state().bytes[t]));
}

inline void stored(int t, void* base, size_t stride) {
  const Tile& from = tile(t);
  for (int r = 0; r < state().rows[t]; ++r)
    std::memcpy(static_cast<unsigned char*>(base) + static_cast<size_t>(r) * stride, from.rows[r],
                static_cast<size_t>(state().bytes[t]));
}

inline void zero(int t) {
  std::memset(&tile(t), 0, sizeof(Tile));
}

// Products take numbers below 2^-126 as 0, whatever the control register says.
inline float flushed(float x) {
  return x < 0x1p-126f && x > -0x1p-126f ? 0.0f : x;
}
inline float widened(const unsigned char* bytes) {
  const uint32_t bits = static_cast<uint32_t>(bytes[0] | bytes[1] << 8) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return flushed(x);
}

// c += a b, where rows of a and columns of b are pairs of bfloat16.
inline void dpbf16ps(int c, int a, int b) {
  ++arcore_tile_products;
  const State& s = state();
  Tile& sums = tile(c);
  const Tile &left = tile(a), &right = tile(b);
  demand(c != a && c != b && a != b, "three different tiles");
  demand(s.rows[c] == s.rows[a] && s.bytes[c] == s.bytes[b] && s.bytes[a] == 4 * s.rows[b],
         "the shapes of a product do not fit");
  for (int m = 0; m < s.rows[a]; ++m)
    for (int k = 0; k < s.bytes[a] / 4; ++k)
      for (int n = 0; n < s.bytes[b] / 4; ++n) {
        float sum;
        std::memcpy(&sum, sums.rows[m] + 4 * n, sizeof(sum));
        for (int half = 0; half < 4; half += 2)
          sum = flushed(sum + widened(left.rows[m] + 4 * k + half) * widened(right.rows[k] + 4 * n + half));
        std::memcpy(sums.rows[m] + 4 * n, &sum, sizeof(sum));
      }
}

}  // namespace
}  // namespace arcore_tiles

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig ::arcore_tiles::loadconfig
#define _tile_release ::arcore_tiles::release
#define _tile_loadd ::arcore_tiles::loadd
#define _tile_stored ::arcore_tiles::stored
#define _tile_zero ::arcore_tiles::zero
#define _tile_dpbf16ps ::arcore_tiles::dpbf16ps
