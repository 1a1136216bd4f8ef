// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011). A number is a pure function of (seed of the row, position, stream, index), so it depends neither
// on the place of the row in a batch, nor on the thread, nor on the device.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace arcore {

// What a number is for. Two uses that must be independent at one position have two streams.
enum class Stream : uint32_t {
  kSample = 0,      // the token itself
  kCoin = 1,        // acceptance of a proposal
  kResidual = 2,    // the token after a rejection
  kConfidence = 3,  // noise on confidences
  kGumbel = 4,      // one number per token of the vocabulary
  kDraft = 5,       // proposals of a draft model
};

struct Philox4 {
  uint32_t word[4];
};

ARCORE_HOST_DEVICE Philox4 philox4x32_10(Philox4 counter, uint32_t key0, uint32_t key1) {
  Philox4 c = counter;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xd2511f53u) * c.word[0];
    const uint64_t b = static_cast<uint64_t>(0xcd9e8d57u) * c.word[2];
    c = {{static_cast<uint32_t>(b >> 32) ^ c.word[1] ^ key0, static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ c.word[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return c;
}

// 64 random bits. Key: the seed. Counter: the position, the stream, and index / 2; the low bit of the index
// picks one half of the block. 0 <= index < 2^57: what of index / 2 does not fit into its word lies above the
// stream, which has eight bits.
ARCORE_HOST_DEVICE uint64_t random_bits(int64_t seed, int64_t position, Stream stream, int64_t index = 0) {
  const uint64_t s = static_cast<uint64_t>(seed), p = static_cast<uint64_t>(position);
  const Philox4 counter{{static_cast<uint32_t>(p), static_cast<uint32_t>(p >> 32),
                         static_cast<uint32_t>(stream) | static_cast<uint32_t>(index >> 33) << 8,
                         static_cast<uint32_t>(index >> 1)}};
  const Philox4 r = philox4x32_10(counter, static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32));
  const int half = (index & 1) ? 2 : 0;
  return static_cast<uint64_t>(r.word[half]) | static_cast<uint64_t>(r.word[half + 1]) << 32;
}

// A multiple of 2^-53 in [0, 1): never 1, and fine enough for every probability that float32 can tell apart.
ARCORE_HOST_DEVICE double uniform_half_open(uint64_t bits) {
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

// An odd multiple of 2^-53 in (0, 1): never 0 nor 1, for logarithms. 52 random bits, so that it is exact.
ARCORE_HOST_DEVICE double uniform_open(uint64_t bits) {
  return (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52;
}

}  // namespace arcore
