// What a row's logits become before any filter, for kernels: sources mixed, bias, mask, penalties.
#pragma once

#include "common/sm80/device.h"
#include "common/sm80/row_sums.cuh"
#include "common/sm80/sequence.cuh"
#include "sample/exact.h"
#include "sample/params.h"

namespace arcore::sample {

struct Scalars {
  double temperature, top_p, min_p, typical_p, epsilon, eta;
  int64_t top_k;
  float steepness, repetition, presence, frequency;
  bool greedy, valid;
  const double* weights;
};

ARCORE_DEVICE Scalars scalars_of(const Problem& p, int64_t row) {
  const double* s = p.settings + row * p.settings_stride;
  Scalars out;
  out.temperature = s[kTemperature];
  out.greedy = out.temperature < kLowestTemperature;
  out.valid = settings_hold(s, p.num_sources);
  out.steepness = steepness_of(out.greedy ? 1.0 : out.temperature);
  out.top_k = s[kTopK] >= 1.0 && s[kTopK] < static_cast<double>(p.vocab) ? static_cast<int64_t>(s[kTopK]) : 0;
  out.top_p = s[kTopP];
  out.min_p = s[kMinP];
  out.typical_p = s[kTypicalP];
  out.epsilon = s[kEpsilon];
  out.eta = s[kEta];
  out.repetition = static_cast<float>(s[kRepetition]);
  out.presence = static_cast<float>(s[kPresence]);
  out.frequency = static_cast<float>(s[kFrequency]);
  out.weights = s + kWeights;
  return out;
}

struct Place {
  int64_t outer, inner;
};

ARCORE_DEVICE int64_t row_start(const View& view, Place at) {
  return at.outer * view.outer + at.inner * view.inner;
}
ARCORE_DEVICE float source_at(const View& view, Place at, int64_t token) {
  return load_any(view.data, view.dtype, row_start(view, at) + token * view.last);
}

// A token that source 0 forbids stays forbidden; one that a source of negative weight forbids gets source 0's
// logit in its place.
ARCORE_DEVICE float mixed_logit(const Problem& p, const double* weights, Place at, int64_t token) {
  const float first = source_at(p.sources[0], at, token), w0 = static_cast<float>(weights[0]);
  bool changed = w0 != 1.0f;
  for (int s = 1; s < p.num_sources; ++s)
    changed |= weights[s] != 0.0;
  if (!changed) return first;
  float mixed = multiply_rounded(w0, first);
  for (int s = 1; s < p.num_sources; ++s) {
    const float w = static_cast<float>(weights[s]);
    if (w == 0.0f) continue;
    const float x = source_at(p.sources[s], at, token);
    mixed = fused_multiply_add(w, w < 0.0f && x == -HUGE_VALF ? first : x, mixed);
  }
  return first == -HUGE_VALF ? -HUGE_VALF : mixed;
}

ARCORE_DEVICE float bias_of(const Problem& p, Place at, int64_t token) {
  return p.bias.data == nullptr
             ? 0.0f
             : static_cast<const float*>(p.bias.data)[row_start(p.bias, at) + token * p.bias.last];
}
ARCORE_DEVICE float biased_logit(const Problem& p, const double* weights, Place at, int64_t token) {
  const float x = mixed_logit(p, weights, at, token);
  return p.bias.data == nullptr ? x : add_rounded(x, bias_of(p, at, token));
}

ARCORE_DEVICE bool is_allowed(const Problem& p, Place at, int64_t token) {
  if (p.mask.data == nullptr) return true;
  if (!p.mask_is_packed)
    return static_cast<const uint8_t*>(p.mask.data)[row_start(p.mask, at) + token * p.mask.last] != 0;
  return (static_cast<const uint32_t*>(p.mask.data)[row_start(p.mask, at) + token / 32 * p.mask.last] >>
              (token % 32) &
          1u) != 0u;
}

// ---- eight neighbouring tokens at a time; those from `end` on do not matter ----

constexpr int kEight = 8;

ARCORE_DEVICE bool lies_on(const void* p, int bytes) {
  return (reinterpret_cast<uintptr_t>(p) & static_cast<uintptr_t>(bytes - 1)) == 0;
}

// Elements token, token + 1, ... of a row: 16 bytes a load where they are neighbours and aligned.
template <typename T>
ARCORE_DEVICE void load_row_of(const View& view, int64_t start, int64_t token, int64_t end,
                               float (&x)[kEight]) {
  const T* from = static_cast<const T*>(view.data) + start + token * view.last;
  if (view.last == 1 && token + kEight <= end && lies_on(from, 16)) {
    constexpr int kLoads = kEight * static_cast<int>(sizeof(T)) / 16;
    Vector16 v[kLoads];
    ARCORE_UNROLL
    for (int l = 0; l < kLoads; ++l)
      v[l] = load_readonly(reinterpret_cast<const Vector16*>(from) + l);
    ARCORE_UNROLL
    for (int l = 0; l < kLoads; ++l) {
      ARCORE_UNROLL
      for (int w = 0; w < 4; ++w) {
        if constexpr (sizeof(T) == 4)
          x[4 * l + w] = bits_float(v[l].word[w]);
        else
          unpack2<T>(v[l].word[w], x[8 * l + 2 * w], x[8 * l + 2 * w + 1]);
      }
    }
    return;
  }
  ARCORE_UNROLL
  for (int j = 0; j < kEight; ++j)
    x[j] = token + j < end ? to_float(from[j * view.last]) : 0.0f;
}
ARCORE_DEVICE void load_any_row(const View& view, Place at, int64_t token, int64_t end, float (&x)[kEight]) {
  const int64_t start = row_start(view, at);
  if (view.dtype == StorageType::kBFloat16)
    load_row_of<bfloat16>(view, start, token, end, x);
  else if (view.dtype == StorageType::kFloat16)
    load_row_of<float16>(view, start, token, end, x);
  else
    load_row_of<float>(view, start, token, end, x);
}

// What mixed_logit gives.
ARCORE_DEVICE void mix_eight(const Problem& p, const double* weights, Place at, int64_t token, int64_t end,
                             float (&x)[kEight]) {
  load_any_row(p.sources[0], at, token, end, x);
  const float w0 = static_cast<float>(weights[0]);
  bool changed = w0 != 1.0f;
  for (int s = 1; s < p.num_sources; ++s)
    changed |= weights[s] != 0.0;
  if (!changed) return;
  float mixed[kEight];
  ARCORE_UNROLL
  for (int j = 0; j < kEight; ++j)
    mixed[j] = multiply_rounded(w0, x[j]);
  ARCORE_NO_UNROLL
  for (int s = 1; s < p.num_sources; ++s) {
    const float w = static_cast<float>(weights[s]);
    if (w == 0.0f) continue;
    float y[kEight];
    load_any_row(p.sources[s], at, token, end, y);
    ARCORE_UNROLL
    for (int j = 0; j < kEight; ++j)
      mixed[j] = fused_multiply_add(w, w < 0.0f && y[j] == -HUGE_VALF ? x[j] : y[j], mixed[j]);
  }
  ARCORE_UNROLL
  for (int j = 0; j < kEight; ++j)
    x[j] = x[j] == -HUGE_VALF ? x[j] : mixed[j];
}

// Bit j: token + j is allowed. token is a multiple of 8.
ARCORE_DEVICE uint32_t allowed_eight(const Problem& p, Place at, int64_t token, int64_t end) {
  if (p.mask.data == nullptr) return 0xffu;
  const int64_t start = row_start(p.mask, at);
  if (p.mask_is_packed)
    return static_cast<const uint32_t*>(p.mask.data)[start + token / 32 * p.mask.last] >> (token % 32) &
           0xffu;
  const uint8_t* from = static_cast<const uint8_t*>(p.mask.data) + start + token * p.mask.last;
  uint32_t bits = 0;
  if (p.mask.last == 1 && token + kEight <= end && lies_on(from, 8)) {
    const Vector8 v = load_readonly(reinterpret_cast<const Vector8*>(from));
    ARCORE_UNROLL
    for (int j = 0; j < kEight; ++j)
      bits |= (v.word[j / 4] >> (8 * (j % 4)) & 0xffu) != 0u ? 1u << j : 0u;
    return bits;
  }
  ARCORE_UNROLL
  for (int j = 0; j < kEight; ++j)
    bits |= token + j < end && from[j * p.mask.last] != 0 ? 1u << j : 0u;
  return bits;
}

// The keys of tokens from `token` on, before penalties; kKeyPad from `end` on.
ARCORE_DEVICE void keys_of_eight(const Problem& p, const double* weights, Place at, int64_t token,
                                 int64_t end, int32_t (&key)[kEight]) {
  float x[kEight];
  mix_eight(p, weights, at, token, end, x);
  if (p.bias.data != nullptr) {
    float bias[kEight];
    load_row_of<float>(p.bias, row_start(p.bias, at), token, end, bias);
    ARCORE_UNROLL
    for (int j = 0; j < kEight; ++j)
      x[j] = add_rounded(x[j], bias[j]);
  }
  const uint32_t allowed = allowed_eight(p, at, token, end);
  ARCORE_UNROLL
  for (int j = 0; j < kEight; ++j) {
    key[j] = (allowed >> j & 1u) != 0u ? key_of(x[j]) : kKeyNegInf;
    if (token + j >= end) key[j] = kKeyPad;
  }
}

// ---- penalties ----

ARCORE_DEVICE int64_t prompt_tokens(const Problem& p) {
  return p.prompt.data == nullptr ? 0 : p.prompt_length;
}
ARCORE_DEVICE int64_t listed_tokens(const Problem& p) {
  return prompt_tokens(p) + p.history_length;
}
// Position i of prompt and history, one after the other.
ARCORE_DEVICE int64_t listed_token(const Problem& p, Place at, int64_t i) {
  const int64_t of_prompt = prompt_tokens(p);
  const View& view = i < of_prompt ? p.prompt : p.history;
  const int64_t place = i < of_prompt ? i : i - of_prompt;
  return static_cast<const int64_t*>(view.data)[row_start(view, at) + place * view.last];
}
// The key of a token that occurs `times` times in the history, or in the prompt alone.
ARCORE_DEVICE int32_t penalized_key(const Problem& p, const Scalars& s, Place at, int64_t token,
                                    int32_t times) {
  float x = add_rounded(mixed_logit(p, s.weights, at, token), bias_of(p, at, token));
  x = x < 0.0f ? multiply_rounded(x, s.repetition) : divide_rounded(x, s.repetition);
  x = add_rounded(x, -multiply_rounded(s.frequency, static_cast<float>(times)));
  x = add_rounded(x, -(times > 0 ? s.presence : 0.0f));
  return key_of(x);
}

}  // namespace arcore::sample
