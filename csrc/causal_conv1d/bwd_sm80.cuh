// Backward of the causal convolution for GPUs from sm_80 on. With h_t the gradient before the activation,
// which a block finds again for its steps and the width - 1 behind them: dx_s = sum_j w_j h_(s + width - 1 -
// j), and dw_j = sum_t h_t x_(t - width + 1 + j), summed over the block's steps here and over blocks
// afterwards, in their order.
#pragma once

#include "causal_conv1d/conv_sm80.cuh"

namespace arcore::causal_conv1d {

// Sums over the lanes of a channel; all of them get the result.
ARCORE_DEVICE float sum_of_channel(float value) {
  ARCORE_UNROLL
  for (int mask = kLanesOfChannel / 2; mask > 0; mask >>= 1)
    value += shuffle_xor(value, mask);
  return value;
}

// The gradient of the final state that reaches step t.
struct FromFinal {
  const BackwardCuda& cuda;
  const Block& block;
  int32_t last;

  ARCORE_DEVICE float operator()(int c, int64_t t, int32_t id) const {
    const Problem& p = cuda.args.problem;
    const int64_t before = p.width - 1, j = t - (p.length - before);
    if (cuda.grad_final == nullptr || j < 0 || j >= before) return 0.0f;
    if (cuda.ids.data != nullptr && (last < 0 || id != last)) return 0.0f;
    return load_readonly(cuda.grad_final + (block.batch * p.dim + block.channel + c) * before + j);
  }
};

template <int kWidth>
ARCORE_LAUNCH_BOUNDS(kConvThreads, 3)
ARCORE_KERNEL conv_backward(ARCORE_KERNEL_ARGS BackwardCuda cuda) {
  const Problem& p = cuda.args.problem;
  const Inputs& in = cuda.args.in;
  const int width = kWidth > 0 ? kWidth : static_cast<int>(p.width), halo = halo_of(width);
  const Block block(p);
  // Steps [begin - halo, begin + kCudaSteps + halo) of x, from begin on of h; dx of the block.
  const int count = kCudaSteps + 2 * halo, pitch = count + 4;
  const int h_count = kCudaSteps + halo, h_pitch = h_count + 4;
  constexpr int kOutPitch = kCudaSteps + 4;
  float* inputs = reinterpret_cast<float*>(shared_memory());
  float* grads = inputs + kCudaChannels * pitch;
  float* results = grads + kCudaChannels * h_pitch;
  int32_t* ids = reinterpret_cast<int32_t*>(results + kCudaChannels * kOutPitch);
  uint32_t* scratch = reinterpret_cast<uint32_t*>(ids + count);

  const bool marked = cuda.ids.data != nullptr;
  const int32_t first =
      marked && block.begin < p.width - 1 ? real_id(cuda.ids, block.batch, p.length, false, scratch) : -1;
  const bool reaches_end = cuda.grad_final != nullptr && block.begin + kCudaSteps > p.length - p.width + 1;
  const int32_t last = marked && reaches_end ? real_id(cuda.ids, block.batch, p.length, true, scratch) : -1;
  load_window<kCudaChannels>(
      in.x, {block.batch, block.channel, block.begin - halo, p.length, block.channels, count, pitch}, inputs,
      History{p, in.history, block.batch, block.channel});
  if (cuda.args.grad_out.data != nullptr) {
    load_window<kCudaChannels>(
        cuda.args.grad_out,
        {block.batch, block.channel, block.begin, p.length, block.channels, h_count, h_pitch}, grads,
        [](int, int64_t) { return 0.0f; });
  } else {
    for (int i = thread_index(); i < kCudaChannels * h_pitch; i += kConvThreads)
      store_shared(grads + i, 0.0f);
  }
  if (marked) load_ids(cuda.ids, block.batch, p.length, block.begin - halo, count, first, ids);
  sync_threads();

  // grads becomes h, 0 on padding and behind the row.
  const int quads = h_count / 4;
  for (int i = thread_index(); i < kCudaChannels * quads; i += kConvThreads) {
    const int c = i / quads, q = i % quads * 4;
    const int64_t channel = block.channel + (c < block.channels ? c : 0);
    auto* at = reinterpret_cast<Float4*>(grads + c * h_pitch + q);
    Float4 h = load_shared(at);
    const int32_t* id = marked ? ids + halo + q : nullptr;
    float y[4] = {};
    if (p.silu) {
      const Taps<kWidth> taps(p, in.weight, channel);
      const float bias = in.bias != nullptr ? load_readonly(in.bias + channel) : 0.0f;
      filter_four(taps, bias, Inputs8<kWidth>(inputs + c * pitch + halo + q), id, y);
    }
    ARCORE_UNROLL
    for (int k = 0; k < 4; ++k) {
      const float s = sigmoid(y[k]);
      if (p.silu) h.x[k] *= s * fused_multiply_add(y[k], 1.0f - s, 1.0f);
      if (block.begin + q + k >= p.length || (marked && load_shared(id + k) < 0)) h.x[k] = 0.0f;
    }
    store_shared(at, h);
  }
  sync_threads();

  const int c = thread_index() / kLanesOfChannel, lane = thread_index() % kLanesOfChannel;
  const bool real = c < block.channels;
  const int64_t channel = block.channel + (real ? c : 0);
  const Taps<kWidth> taps(p, in.weight, channel);
  const FromFinal from_final{cuda, block, last};
  const float *x_row = inputs + c * pitch + halo, *h_row = grads + c * h_pitch;
  float sum_bias = 0.0f;
  ARCORE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int q = 4 * lane + half * (kCudaSteps / 2);
    const Inputs8<kWidth> h(h_row + q + 4);  // h.at(k - 4) is that of step q + k
    Float4 dx{};
    for_each_tap<kWidth>(width, [&](int j) {
      ARCORE_UNROLL
      for (int k = 0; k < 4; ++k) {
        const int to = k + width - 1 - j;  // the output that reads step k through tap j
        const bool use = !marked || load_shared(ids + halo + q + to) == load_shared(ids + halo + q + k);
        dx.x[k] = fused_multiply_add(taps.at(j), use ? h.at(to - 4) : 0.0f, dx.x[k]);
      }
    });
    ARCORE_UNROLL
    for (int k = 0; k < 4; ++k) {
      sum_bias += h.at(k - 4);
      if (reaches_end && real)
        dx.x[k] += from_final(c, block.begin + q + k, marked ? load_shared(ids + halo + q + k) : 0);
    }
    store_shared(reinterpret_cast<Float4*>(results + c * kOutPitch + q), dx);
  }
  const int64_t partial = ((block.batch * block.runs + block.run) * p.dim + channel);
  for_each_tap<kWidth>(width, [&](int j) {
    float sum = 0.0f;
    ARCORE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int q = 4 * lane + half * (kCudaSteps / 2);
      const Inputs8<kWidth> h(h_row + q + 4), x(x_row + q);
      ARCORE_UNROLL
      for (int k = 0; k < 4; ++k) {
        const int from = k - width + 1 + j;
        const bool use = block.begin + q + k < p.length &&
                         (!marked || (load_shared(ids + halo + q + k) >= 0 &&
                                      load_shared(ids + halo + q + from) == load_shared(ids + halo + q + k)));
        sum = fused_multiply_add(h.at(k - 4), use ? x.at(from) : 0.0f, sum);
      }
    }
    sum = sum_of_channel(sum);
    if (real && lane == 0) store_global(cuda.args.partial_weight + partial * width + j, sum);
  });
  sum_bias = sum_of_channel(sum_bias);
  if (real && lane == 0) store_global(cuda.args.partial_bias + partial, sum_bias);

  // The inputs before the row.
  if (block.run == 0 && cuda.args.grad_history != nullptr) {
    const int before = width - 1;
    for (int i = thread_index(); i < block.channels * before; i += kConvThreads) {
      const int ch = i / before, s = i % before - before;
      const int32_t own = marked ? load_shared(ids + halo + s) : 0;
      float sum = 0.0f;
      for (int j = 0; j < width; ++j) {
        const int to = s + width - 1 - j;
        if (to < 0 || (marked && (own < 0 || load_shared(ids + halo + to) != own))) continue;
        sum = fused_multiply_add(load_readonly(in.weight + (block.channel + ch) * width + j),
                                 load_shared(grads + ch * h_pitch + to), sum);
      }
      sum += from_final(ch, s, own);
      store_global(cuda.args.grad_history + (block.batch * p.dim + block.channel + ch) * before + before + s,
                   sum);
    }
  }
  sync_threads();
  store_window<kCudaChannels>(
      cuda.args.grad_x,
      {block.batch, block.channel, block.begin, p.length, block.channels, kCudaSteps, kOutPitch}, results);
}

template <int kWidth>
int launch_backward(const BackwardCuda& cuda, void* stream) {
  const Problem& p = cuda.args.problem;
  const int halo = host_halo_of(kWidth > 0 ? kWidth : p.width);
  const int64_t floats = kCudaChannels * (3 * kCudaSteps + 3 * halo + 12) + kCudaSteps + 2 * halo + 1;
  return launch(conv_backward<kWidth>, {blocks_of(p), 1, 1, kConvThreads, floats * 4}, stream, cuda);
}

}  // namespace arcore::causal_conv1d
