// Rows of several sequences, cut into short runs of steps; no torch types.
#pragma once

#include <cstdint>

namespace arcore {

// Longest run of steps that a scan handles at once, and the distance of the states that selective_scan's
// forward keeps for its backward. python/arcore/ops/selective_scan.py has it too (CHUNK).
constexpr int64_t kChunk = 64;

// At most kChunk steps of one row that belong to one sequence. Chunks that start a sequence load its initial
// state, those that end one store its last state.
struct Chunk {
  int64_t begin;  // in scan order
  int64_t length;
  int64_t sequence;  // row of initial_state and last_state, -1: the batch row
  int64_t slot;      // number of the state before this chunk among those that are kept, -1 for the first of a
                     // sequence
  bool first, last;
  bool zero_start;  // the sequence starts from zero, whatever initial_state holds
  bool keep_last;   // its last state is a result
  // Sequence ids of its steps, or null if none is padding: a step with a negative id is skipped.
  const int32_t* ids;
  int64_t id_stride;
};

}  // namespace arcore
