// Forward of the causal convolution for GPUs from sm_80 on.
#pragma once

#include "causal_conv1d/conv_sm80.cuh"

namespace arcore::causal_conv1d {

// Shared memory: inputs [channel][halo + steps], outputs [channel][steps], ids, a number for real_id.
struct ForwardLayout {
  int halo, pitch, inputs, outputs, ids, bytes;

  ARCORE_DEVICE explicit ForwardLayout(int with_halo) {
    halo = with_halo;
    pitch = halo + kCudaSteps + 4;
    inputs = kCudaChannels * pitch;
    outputs = kCudaChannels * (kCudaSteps + 4);
    ids = halo + kCudaSteps;
    bytes = (inputs + outputs + ids + 1) * 4;
  }
};

// The last width - 1 inputs of the row's last sequence, those before the row included.
ARCORE_DEVICE void store_final(const ForwardCuda& cuda, const Block& block, int32_t first, int32_t last) {
  const Problem& p = cuda.args.problem;
  const Sequence &x = cuda.args.in.x, &to = cuda.final_states;
  const int64_t before = p.width - 1;
  const History history{p, cuda.args.in.history, block.batch, block.channel};
  for (int64_t i = thread_index(); i < block.channels * before; i += kConvThreads) {
    const int c = static_cast<int>(i / before);
    const int64_t j = i % before, t = p.length - before + j;
    float value = 0.0f;
    const int32_t own = cuda.ids.data == nullptr ? last : t < 0 ? first : id_at(cuda.ids, block.batch, t);
    if (cuda.ids.data == nullptr || (last >= 0 && own == last))
      value = t < 0 ? history(c, t)
                    : load_any(x.data, x.dtype, sequence_at(x, block.batch, block.channel + c, t));
    store_any(to.data, to.dtype, sequence_at(to, block.batch, block.channel + c, j), value);
  }
}

template <int kWidth>
ARCORE_LAUNCH_BOUNDS(kConvThreads, 4)
ARCORE_KERNEL conv_forward(ARCORE_KERNEL_ARGS ForwardCuda cuda) {
  const Problem& p = cuda.args.problem;
  const Inputs& in = cuda.args.in;
  const ForwardLayout layout(halo_of(kWidth > 0 ? kWidth : static_cast<int>(p.width)));
  const Block block(p);
  float* inputs = reinterpret_cast<float*>(shared_memory());
  float* outputs = inputs + layout.inputs;
  int32_t* ids = reinterpret_cast<int32_t*>(outputs + layout.outputs);
  uint32_t* scratch = reinterpret_cast<uint32_t*>(ids + layout.ids);
  constexpr int kOutPitch = kCudaSteps + 4;

  const bool marked = cuda.ids.data != nullptr, is_last = block.run == block.runs - 1;
  // What lies before the row matters to its first steps, and to the final state of a short row.
  const bool needs_first = marked && (block.begin < p.width - 1 || (is_last && p.length < p.width - 1));
  const int32_t first = needs_first ? real_id(cuda.ids, block.batch, p.length, false, scratch) : -1;
  const int64_t from = block.begin - layout.halo;
  load_window<kCudaChannels>(
      in.x,
      {block.batch, block.channel, from, p.length, block.channels, layout.halo + kCudaSteps, layout.pitch},
      inputs, History{p, in.history, block.batch, block.channel});
  if (marked) load_ids(cuda.ids, block.batch, p.length, from, layout.ids, first, ids);
  sync_threads();

  const int c = thread_index() / kLanesOfChannel, lane = thread_index() % kLanesOfChannel;
  const int64_t channel = block.channel + (c < block.channels ? c : 0);
  const Taps<kWidth> taps(p, in.weight, channel);
  const float bias = in.bias != nullptr ? load_readonly(in.bias + channel) : 0.0f;
  ARCORE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int q = 4 * lane + half * (kCudaSteps / 2);
    const Inputs8<kWidth> x(inputs + c * layout.pitch + layout.halo + q);
    const int32_t* id = marked ? ids + layout.halo + q : nullptr;
    float y[4];
    filter_four(taps, bias, x, id, y);
    Float4 out;
    ARCORE_UNROLL
    for (int k = 0; k < 4; ++k) {
      out.x[k] = p.silu ? y[k] * sigmoid(y[k]) : y[k];
      if (marked && load_shared(id + k) < 0) out.x[k] = 0.0f;
    }
    store_shared(reinterpret_cast<Float4*>(outputs + c * kOutPitch + q), out);
  }
  sync_threads();
  store_window<kCudaChannels>(
      cuda.args.out,
      {block.batch, block.channel, block.begin, p.length, block.channels, kCudaSteps, kOutPitch}, outputs);
  if (is_last) {
    const int32_t last = marked ? real_id(cuda.ids, block.batch, p.length, true, scratch) : -1;
    store_final(cuda, block, first, last);
  }
}

template <int kWidth>
int launch_forward(const ForwardCuda& cuda, void* stream) {
  const Problem& p = cuda.args.problem;
  const int halo = host_halo_of(kWidth > 0 ? kWidth : p.width);
  const int64_t floats = kCudaChannels * (halo + 2 * kCudaSteps + 8) + halo + kCudaSteps + 1;
  return launch(conv_forward<kWidth>, {blocks_of(p), 1, 1, kConvThreads, floats * 4}, stream, cuda);
}

}  // namespace arcore::causal_conv1d
