// What schema.cpp hands to the kernels: raw pointers and int64 strides in elements, no torch types.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace arcore::speculative {

// [B, rows, V] probabilities.
struct Probabilities {
  const void* data;  // null: none given
  int64_t batch, row, token;
};

// int64 [B] or [B, items]; strides 0 where broadcast.
struct Integers {
  const int64_t* data;  // null: none given
  int64_t batch, item;
};

enum class IndexType { kInt32, kInt64, kUInt16 };

// [V, k] token ids near each token, nearest first; ids outside of [0, V) and the token itself are skipped.
struct Neighbours {
  const void* data;  // null: no relaxation
  int64_t token, item;
  int64_t stored, used;
  IndexType type;
};

enum class Rule {
  kTokens,         // accept or reject one proposal after the other
  kBlock,          // the longest prefix of a chain that may stand, all proposals judged together
  kRelaxed,        // a proposal also takes the probability of its neighbours
  kRelaxedCoarse,  // so, but a rejection discards all neighbours, as LANTERN's released code does
  kTypical,        // accept what is likely enough, given the entropy
  kJacobi,         // kTokens on a chain, then fresh drafts for what is left of the window
};

struct Problem {
  Rule rule;
  int64_t batch, nodes, vocab;
  StorageType dtype;
  Probabilities target;  // [B, nodes + 1, V]; row i + 1 follows node i, row 0 follows the prefix
  Probabilities draft;   // [B, nodes, V], rows likewise; none: proposals were chosen, not drawn
  Integers tokens;       // [B, nodes], -1 for padding
  Integers parents;      // [B, nodes], parents[i] < i, -1 for a root; none: a chain
  Integers lengths;      // [B], nodes that count; none: all
  Integers seed, offset;
  Neighbours neighbours;
  double delta;         // relaxation: bound on the moved probability; typical: factor on exp(-entropy)
  double epsilon;       // typical: bound on the threshold
  bool multiplicative;  // relaxation: delta is a multiple of the proposal's own probability
  bool replacement;     // siblings were drawn independently of each other
  bool greedy_bonus;    // typical: the last token is the likeliest one
};

// Contiguous, written for every row of the batch.
struct Results {
  int64_t* tokens;    // [B, nodes + 1]: accepted tokens and the one after them, then -1
  int64_t* accepted;  // [B]
  int64_t* path;      // [B, nodes]: accepted nodes, then -1
  bool* valid;        // [B]
  int64_t* drafts;    // [B, nodes], kJacobi only: drafts of the next window, then -1
};

struct CpuKernels {
  // Bytes of scratch that one thread needs, a multiple of 64.
  int64_t (*scratch_bytes)(const Problem&);
  // Rows [begin, end) of the batch. `scratch` is aligned to 64 bytes.
  void (*verify)(const Problem&, const Results&, void* scratch, int64_t begin, int64_t end);
};

// ---- CUDA ----

struct VerifyCuda {
  Problem problem;
  Results results;
  char* scratch;  // [batch, scratch_bytes], on 16 bytes
  int64_t scratch_bytes;
};

int64_t scratch_bytes_sm80(const Problem&);
// 0 or a cudaError_t.
int launch_verify_sm80(const VerifyCuda&, void* stream);

}  // namespace arcore::speculative
