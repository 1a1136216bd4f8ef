// The rules: which proposals of one batch row stand, and which token follows them. Host and device.
//
// Nothing here walks the vocabulary. That is the part of a `Team`, a vectorised loop on the CPU or a thread
// block on a GPU, which must give the same answers whatever its width:
//
//   float target(row, token), draft(row, token)   one probability
//   int64_t draw_target(row, bits)                the token that inverse_cdf picks from a target row; -1:
//   NaN, infinite
//                                                 or negative numbers, or no mass
//   int64_t argmax_target(row)                    the likeliest token, the lowest of equals; -1: NaN
//   double entropy_target(row, enough)            -sum p log(p + 1e-5), or any number above `enough` if it is
//   above int64_t neighbour(token, i)                   the i-th nearest token, -1: none
//
// and, of one row of unnormalised weights w that a team holds in scratch memory:
//
//   void load(row)                                w = target row
//   Totals residual(row, a, sum_draft)            w = max(a * target - draft, 0)
//   Totals subtract(row, a, b, sum_draft)         w = max(a * w - b * draft, 0)
//   double total()                                sum of w; NaN if one is NaN, infinite or negative
//   float weight(token), void set_weight(token, value), void fill(value)
//   int64_t draw_weights(bits)                    the token that inverse_cdf picks from w as it was summed
//   last; -1: no
//                                                 mass
//   bool removed(token), void remove(token), void restore_removed()   a set of tokens, empty at first
//   double& score(node), int64_t& depth(node)     scratch per node
//
// Sums are those of inverse_cdf.h, integer multiples of 2^-62, so that they do not depend on their order.
//
// All threads of a team take the same way through these functions; only the one that `leads()` writes
// results.
#pragma once

#include <math.h>

#include <cstdint>

#include "common/inverse_cdf.h"
#include "common/philox.h"
#include "speculative/params.h"

// Member functions of host and device. Their classes live in a namespace of the instruction set, where there
// is one.
#if defined(__CUDACC__)
#define ARCORE_MEMBER __host__ __device__ __forceinline__
#else
#define ARCORE_MEMBER
#endif

namespace arcore::speculative {
#if defined(ARCORE_ISA)
inline namespace ARCORE_ISA {
#endif

struct Totals {
  double weights;  // sum of w; NaN if a number is NaN, or one of a summed draft no probability
  double draft;    // sum of the draft row, where it was asked for
};

// The proposals of one batch row: a chain or a tree whose nodes come after their parents.
struct Proposals {
  const int64_t* tokens;
  const int64_t* parents;  // null: a chain
  int64_t token_stride, parent_stride, nodes;

  ARCORE_MEMBER Proposals(const Problem& p, int64_t b)
      : tokens(p.tokens.data + b * p.tokens.batch),
        parents(p.parents.data == nullptr ? nullptr : p.parents.data + b * p.parents.batch),
        token_stride(p.tokens.item),
        parent_stride(p.parents.item),
        nodes(p.lengths.data == nullptr ? p.nodes : p.lengths.data[b * p.lengths.batch]) {
    nodes = nodes < 0 ? 0 : nodes > p.nodes ? p.nodes : nodes;
    if (parents != nullptr) return;
    int64_t length = 0;  // a chain ends where padding begins
    while (length < nodes && token(length) >= 0)
      ++length;
    nodes = length;
  }

  ARCORE_MEMBER int64_t token(int64_t node) const { return tokens[node * token_stride]; }
  ARCORE_MEMBER int64_t parent(int64_t node) const {
    return parents == nullptr ? node - 1 : parents[node * parent_stride];
  }
  // The child of `node` (-1: the prefix) that comes after `previous` (-1: the first), or -1. Padding is no
  // child.
  ARCORE_MEMBER int64_t next_child(int64_t node, int64_t previous) const {
    const int64_t last = parents == nullptr && node + 2 < nodes ? node + 2 : nodes;
    for (int64_t i = (previous > node ? previous : node) + 1; i < last; ++i)
      if (parent(i) == node && token(i) >= 0) return i;
    return -1;
  }
  // Whether an earlier child of `node` proposes the same token as `child`.
  ARCORE_MEMBER bool repeats(int64_t node, int64_t child) const {
    for (int64_t i = next_child(node, -1); i != child; i = next_child(node, i))
      if (token(i) == token(child)) return true;
    return false;
  }
};

// The random numbers of one batch row. A number belongs to a position of the sequence and to a purpose, so no
// two rounds of decoding share one: a round ends before the first position whose numbers it did not use up.
struct Numbers {
  int64_t seed, offset;

  ARCORE_MEMBER Numbers(const Problem& p, int64_t b)
      : seed(p.seed.data[b * p.seed.batch]), offset(p.offset.data[b * p.offset.batch]) {}

  ARCORE_MEMBER uint64_t sample(int64_t step) const {
    return random_bits(seed, offset + step, Stream::kSample);
  }
  ARCORE_MEMBER uint64_t residual(int64_t step) const {
    return random_bits(seed, offset + step, Stream::kResidual);
  }
  ARCORE_MEMBER double coin(int64_t step, int64_t sibling) const {
    return uniform_half_open(random_bits(seed, offset + step, Stream::kCoin, sibling));
  }
};

// What one batch row emits.
struct Emitted {
  int64_t* tokens;
  int64_t* path;
  bool leads;
  int64_t accepted = 0;

  ARCORE_MEMBER void accept(int64_t node, int64_t token) {
    if (leads) {
      tokens[accepted] = token;
      path[accepted] = node;
    }
    ++accepted;
  }
  // The token after the accepted ones; -1 says that there was no distribution to draw it from.
  ARCORE_MEMBER bool finish(int64_t token) {
    if (leads) tokens[accepted] = token;
    return token >= 0;
  }
};

ARCORE_HOST_DEVICE bool is_probability(float x) {
  return x >= 0.0f && x <= 3.402823466e38f;  // false for NaN
}

// u < p / q for u in [0, 1), without the division: q = 0 accepts what p allows, p = 0 never accepts.
ARCORE_HOST_DEVICE bool accepts(double u, double p, double q) {
  return q > 0.0 ? u * q < p : p > 0.0;
}

struct Neighbourhood {
  double mass;      // probability that the proposal takes over
  int64_t count;    // how many of the nearest tokens give it
  bool has_wanted;  // whether `wanted` is one of them
};

// The longest run of nearest tokens whose probabilities, `value(token)`, add up to at most `limit`.
template <class Team, class Value>
ARCORE_HOST_DEVICE Neighbourhood neighbourhood(const Problem& p, Team& team, int64_t token, double limit,
                                               int64_t wanted, const Value& value) {
  Neighbourhood found{0.0, 0, false};
  for (int64_t i = 0; i < p.neighbours.used; ++i) {
    const int64_t near = team.neighbour(token, i);
    if (near >= 0) {
      const double mass = found.mass + value(near);
      if (!(mass <= limit)) break;
      found.mass = mass;
      found.has_wanted |= near == wanted;
    }
    found.count = i + 1;
  }
  return found;
}

template <class Team, class Action>
ARCORE_HOST_DEVICE void for_neighbours(Team& team, int64_t token, int64_t count, const Action& action) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t near = team.neighbour(token, i);
    if (near >= 0) action(near);
  }
}

// Proposals that were chosen, not drawn: a draw from the target decides. It descends to the proposal it hits,
// which is what accepting with probability p(x) and, after a rejection, drawing from p without x amounts to.
template <class Team>
ARCORE_HOST_DEVICE bool follow_draws(const Problem& p, const Proposals& proposals, const Numbers& numbers,
                                     Team& team, Emitted& out) {
  for (int64_t node = -1;;) {
    const int64_t drawn = team.draw_target(node + 1, numbers.sample(out.accepted));
    int64_t child = proposals.next_child(node, -1);
    if (drawn < 0) return false;
    if (p.neighbours.data == nullptr) {
      while (child >= 0 && proposals.token(child) != drawn)
        child = proposals.next_child(node, child);
    } else {
      // A proposal stands for its neighbours too. What a rejected one stood for is gone; `left` normalises
      // the rest.
      double left = 1.0;
      const auto value = [&](int64_t token) -> double {
        return team.removed(token) ? 0.0f : team.target(node + 1, token);
      };
      while (child >= 0) {
        const int64_t token = proposals.token(child), next = proposals.next_child(node, child);
        if (token == drawn) break;
        const double own = value(token);
        const Neighbourhood near =
            neighbourhood(p, team, token, p.delta * (p.multiplicative ? own : left), drawn, value);
        if (near.has_wanted) break;
        child = next;
        if (next < 0) break;
        left -= own + near.mass;
        team.remove(token);
        for_neighbours(team, token, near.count, [&](int64_t other) { team.remove(other); });
      }
      team.restore_removed();
    }
    if (child < 0) return out.finish(drawn);
    out.accept(child, proposals.token(child));
    node = child;
  }
}

// A token of w, or of the target row where rounding left w without mass.
template <class Team>
ARCORE_HOST_DEVICE int64_t draw_residual(Team& team, int64_t row, uint64_t bits) {
  const int64_t token = team.draw_weights(bits);
  return token >= 0 ? token : team.draw_target(row, bits);
}

// Proposals that were drawn from the draft: a coin each. After a rejection the target becomes what it has
// beyond the draft, and the draft loses the proposal where siblings exclude each other.
template <class Team>
ARCORE_HOST_DEVICE bool toss_coins(const Problem& p, const Proposals& proposals, const Numbers& numbers,
                                   Team& team, Emitted& out) {
  const bool relaxed = p.neighbours.data != nullptr;
  for (int64_t node = -1;;) {
    const int64_t row = node + 1;
    int64_t child = proposals.next_child(node, -1);
    if (child < 0) return out.finish(team.draw_target(row, numbers.sample(out.accepted)));

    // The target is now w / weights_left, or the target row as long as nothing was rejected; the draft is the
    // draft row without the rejected siblings, over draft_left.
    bool in_weights = relaxed;
    double weights_left = 1.0, draft_left = 1.0, rejected = 0.0;
    if (relaxed) team.load(row);
    for (int64_t sibling = 0, next; child >= 0; child = next, ++sibling) {
      const int64_t token = proposals.token(child);
      next = proposals.next_child(node, child);
      const float own = in_weights ? team.weight(token) : team.target(row, token);
      const float draft = !p.replacement && proposals.repeats(node, child) ? 0.0f : team.draft(row, token);
      if (!is_probability(own) || !is_probability(draft)) return false;
      Neighbourhood near{0.0, 0, false};
      if (relaxed)
        near = neighbourhood(p, team, token, p.delta * (p.multiplicative ? double{own} : weights_left), -1,
                             [&](int64_t other) -> double { return team.weight(other); });
      const double coin = numbers.coin(out.accepted, sibling);
      if (accepts(coin, (own + near.mass) * draft_left, draft * weights_left)) break;

      if (relaxed) {
        team.set_weight(token, static_cast<float>(own + near.mass));
        for_neighbours(team, token, near.count, [&](int64_t other) { team.set_weight(other, 0.0f); });
      }
      const float scale = static_cast<float>(1.0 / weights_left);
      const float draft_scale = draft_left > 0.0 ? static_cast<float>(1.0 / draft_left) : 0.0f;
      const Totals totals = in_weights ? team.subtract(row, scale, draft_scale, next >= 0)
                                       : team.residual(row, 1.0f, next >= 0);
      in_weights = true;
      rejected += draft;
      weights_left = totals.weights;
      draft_left = p.replacement ? totals.draft : totals.draft - rejected;
      // NaN, or a residual that rounding left empty: no further sibling is judged.
      if (!(weights_left > 0.0)) {
        child = -1;
        break;
      }
    }
    if (child < 0)
      return weights_left >= 0.0 && out.finish(draw_residual(team, row, numbers.residual(out.accepted)));
    out.accept(child, proposals.token(child));
    node = child;
  }
}

// Chosen proposals under the rule of LANTERN's released code: a coin each; a rejection discards the proposal
// and, if it stood for any neighbour, all the neighbours in use and the one after them.
template <class Team>
ARCORE_HOST_DEVICE bool toss_coins_coarsely(const Problem& p, const Proposals& proposals,
                                            const Numbers& numbers, Team& team, Emitted& out) {
  for (int64_t node = -1;;) {
    const int64_t row = node + 1;
    int64_t child = proposals.next_child(node, -1);
    if (child < 0) return out.finish(team.draw_target(row, numbers.sample(out.accepted)));
    double left = 1.0;
    team.load(row);
    if (!(team.total() > 0.0)) return false;
    for (int64_t sibling = 0; child >= 0; child = proposals.next_child(node, child), ++sibling) {
      const int64_t token = proposals.token(child);
      const float own = team.weight(token);
      if (!is_probability(own)) return false;
      const Neighbourhood near =
          neighbourhood(p, team, token, p.delta * (p.multiplicative ? double{own} : left), -1,
                        [&](int64_t other) -> double { return team.weight(other); });
      if (accepts(numbers.coin(out.accepted, sibling), own + near.mass, left)) break;
      team.set_weight(token, 0.0f);
      if (near.count > 0) {
        const int64_t more = p.neighbours.used + 1;
        for_neighbours(team, token, more < p.neighbours.stored ? more : p.neighbours.stored,
                       [&](int64_t other) { team.set_weight(other, 0.0f); });
      }
      left = team.total();
      if (left == 0.0) {
        team.fill(1.0f / static_cast<float>(p.vocab));
        left = team.total();
      }
    }
    if (child < 0) return out.finish(team.draw_weights(numbers.residual(out.accepted)));
    out.accept(child, proposals.token(child));
    node = child;
  }
}

// A chain judged as a whole (arXiv:2403.10444, algorithm 2). `weight` is the paper's p_i, the likelihood
// ratio of the first i proposals, cut off at 1 after each; h_i is the probability that i of them stand, given
// that no more do. One coin serves them all: at least i stand if it is below 1 - (1 - h_i) (1 - h_(i+1)) ...
// It belongs to the first position of the chain, where no other chain starts.
template <class Team>
ARCORE_HOST_DEVICE bool judge_block(const Proposals& proposals, const Numbers& numbers, Team& team,
                                    Emitted& out) {
  int64_t length = 0;
  double weight = 1.0;
  for (; proposals.next_child(length - 1, -1) >= 0; ++length) {
    const int64_t token = proposals.token(length);
    const float own = team.target(length, token), draft = team.draft(length, token);
    if (!is_probability(own) || !is_probability(draft)) return false;
    // A proposal that the draft could not make has an infinite ratio.
    if (draft > 0.0f) weight *= static_cast<double>(own) / draft;
    if (own == 0.0f) weight = 0.0;
    if (weight > 0.0 && (draft == 0.0f || weight > 1.0)) weight = 1.0;
    team.score(length) = weight;
  }
  const double coin = numbers.coin(0, 0);
  double refused = 1.0;  // probability that fewer than `stand` do
  int64_t stand = length;
  for (; stand > 0; --stand) {
    double h = team.score(stand - 1);
    if (stand < length && h > 0.0) {
      const double beyond = team.residual(stand, static_cast<float>(h), false).weights;
      if (!(beyond >= 0.0)) return false;
      h = beyond > 0.0 ? beyond / (beyond + (1.0 - h)) : 0.0;
    }
    refused *= 1.0 - h;
    if (coin < 1.0 - refused) break;
  }
  for (int64_t i = 0; i < stand; ++i)
    out.accept(i, proposals.token(i));
  if (stand == length) return out.finish(team.draw_target(stand, numbers.sample(stand)));
  if (stand == 0 && !(team.residual(0, 1.0f, false).weights >= 0.0)) return false;
  return out.finish(draw_residual(team, stand, numbers.residual(stand)));
}

// Medusa's typical acceptance: the longest path whose proposals are likely enough, the likeliest of equally
// long ones.
template <class Team>
ARCORE_HOST_DEVICE bool accept_typical(const Problem& p, const Proposals& proposals, const Numbers& numbers,
                                       Team& team, Emitted& out) {
  constexpr int64_t kRefused = 0;
  int64_t best = -1;
  for (int64_t i = 0; i < proposals.nodes; ++i)
    team.depth(i) = kRefused;
  for (int64_t node = -1; node < proposals.nodes; ++node) {
    if (node >= 0 && team.depth(node) == kRefused) continue;
    const int64_t row = node + 1, depth = node < 0 ? 1 : team.depth(node) + 1;
    const double score = node < 0 ? 0.0 : team.score(node);
    // What exceeds epsilon exceeds the threshold. Else the entropy H decides, p > delta exp(-H): with the H
    // that the least likely child needs, all of them stand.
    double needed = -1.0;
    for (int64_t child = proposals.next_child(node, -1); child >= 0;
         child = proposals.next_child(node, child)) {
      const float own = team.target(row, proposals.token(child));
      if (!is_probability(own)) return false;
      if (own > p.epsilon || own == 0.0f) continue;
      const double wanted = ::log(p.delta / own);
      if (wanted > needed) needed = wanted;
    }
    const double entropy = needed >= 0.0 ? team.entropy_target(row, needed) : 0.0;
    if (!(entropy >= -1.0)) return false;
    const double threshold = p.delta * ::exp(-entropy);
    for (int64_t child = proposals.next_child(node, -1); child >= 0;
         child = proposals.next_child(node, child)) {
      const float own = team.target(row, proposals.token(child));
      if (own == 0.0f || !(own > p.epsilon || own > threshold)) continue;
      team.depth(child) = depth;
      team.score(child) = score + ::log(static_cast<double>(own));
      if (best < 0 || depth > team.depth(best) ||
          (depth == team.depth(best) && team.score(child) > team.score(best)))
        best = child;
    }
  }
  out.accepted = best < 0 ? 0 : team.depth(best);
  int64_t node = best;
  for (int64_t i = out.accepted; i > 0; --i, node = proposals.parent(node)) {
    if (!out.leads) continue;
    out.tokens[i - 1] = proposals.token(node);
    out.path[i - 1] = node;
  }
  return out.finish(p.greedy_bonus ? team.argmax_target(best + 1)
                                   : team.draw_target(best + 1, numbers.sample(out.accepted)));
}

// One batch row: writes all of its results.
template <class Team>
ARCORE_HOST_DEVICE void verify_row(const Problem& p, const Results& results, int64_t b, Team& team) {
  const Proposals proposals(p, b);
  const Numbers numbers(p, b);
  Emitted out{results.tokens + b * (p.nodes + 1), results.path + b * p.nodes, team.leads()};
  bool valid = false;
  switch (p.rule) {
    case Rule::kTokens:
    case Rule::kRelaxed:
    case Rule::kJacobi:
      valid = p.draft.data == nullptr ? follow_draws(p, proposals, numbers, team, out)
                                      : toss_coins(p, proposals, numbers, team, out);
      break;
    case Rule::kRelaxedCoarse:
      valid = toss_coins_coarsely(p, proposals, numbers, team, out);
      break;
    case Rule::kBlock:
      valid = judge_block(proposals, numbers, team, out);
      break;
    case Rule::kTypical:
      valid = accept_typical(p, proposals, numbers, team, out);
      break;
  }
  // What the window still holds is drafted anew, each position with the number that plain sampling would use
  // there.
  int64_t fresh = 0;
  if (p.rule == Rule::kJacobi && valid)
    for (int64_t row = out.accepted + 1; row <= proposals.nodes && valid; ++row, ++fresh) {
      const int64_t token = team.draw_target(row, numbers.sample(row));
      if (team.leads()) results.drafts[b * p.nodes + fresh] = token;
      valid = token >= 0;
    }
  if (!team.leads()) return;
  results.valid[b] = valid;
  results.accepted[b] = valid ? out.accepted : 0;
  for (int64_t i = valid ? out.accepted + 1 : 0; i <= p.nodes; ++i)
    out.tokens[i] = -1;
  for (int64_t i = valid ? out.accepted : 0; i < p.nodes; ++i)
    out.path[i] = -1;
  if (p.rule == Rule::kJacobi)
    for (int64_t i = valid ? fresh : 0; i < p.nodes; ++i)
      results.drafts[b * p.nodes + i] = -1;
}

#if defined(ARCORE_ISA)
}  // namespace ARCORE_ISA
#endif
}  // namespace arcore::speculative
