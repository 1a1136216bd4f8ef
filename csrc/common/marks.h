// Where the sequences of packed rows begin and end on a GPU, as a mark for each step, which only the device
// reads; no torch types.
#pragma once

#include <cstdint>

namespace arcore {

// What a step of a packed row is, in scan order; the row of initial_state and last_state is mark >> 8.
enum Mark : int32_t {
  kRestart = 1,  // its sequence starts here: from its initial state (cu_seqlens), or from zero (seq_idx)
  kPadding = 2,  // the state passes, the output is 0
  kEnd = 4,      // the state after it is its sequence's last (cu_seqlens)
};

struct MarkArgs {
  int64_t batch, length;
  bool reverse;
  const int32_t* seq_idx;  // or null
  int64_t id_batch, id_time;
  const int64_t* cu_seqlens;  // or null; [sequences + 1]
  int64_t sequences;
  int32_t* marks;  // [batch, length] in scan order
};

// last = first, or zero: what sequences without steps keep. Also the gradients of their initial states.
struct CarryArgs {
  const float* first;  // or null
  float* last;
  int64_t size;
};

}  // namespace arcore
