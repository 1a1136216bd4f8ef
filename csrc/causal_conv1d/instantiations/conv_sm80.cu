#include "causal_conv1d/conv_sm80.cuh"

namespace arcore::causal_conv1d {

namespace {

int launch_ends(const ForwardCuda& cuda, Stream stream) {
  if (cuda.ids.data == nullptr) return 0;
  return launch(find_ends, {cuda.args.problem.batch, 1, 1, 32, 0}, stream, cuda);
}

}  // namespace

int launch_forward_sm80(const ForwardCuda& cuda, void* stream) {
  const Problem& p = cuda.args.problem;
  int error = launch_ends(cuda, stream);
  if (error != 0) return error;
  error = launch(convolve, {conv_blocks(p.batch * p.dim * p.length), 1, 1, kConvThreads, 0}, stream, cuda);
  if (error != 0) return error;
  return launch(keep_last, {conv_blocks(p.batch * p.dim * (p.width - 1)), 1, 1, kConvThreads, 0}, stream,
                cuda);
}

int launch_backward_sm80(const BackwardCuda& cuda, void* stream) {
  const BackwardArgs& a = cuda.args;
  const Problem& p = a.problem;
  ForwardCuda forward{};
  forward.args.problem = p;
  forward.args.in = a.in;
  forward.ids = cuda.ids;
  int error = launch_ends(forward, stream);
  if (error != 0) return error;
  const int64_t steps = p.length + (a.grad_history == nullptr ? 0 : p.width - 1);
  error = launch(grad_inputs, {conv_blocks(p.batch * p.dim * steps), 1, 1, kConvThreads, 0}, stream, cuda);
  if (error != 0) return error;
  const int64_t time = a.in.x.time < 0 ? -a.in.x.time : a.in.x.time;
  const int64_t channels =
      time <= (a.in.x.channel < 0 ? -a.in.x.channel : a.in.x.channel) ? kConvThreads / 32 : 32;
  const int64_t blocks = p.batch * ((p.dim + channels - 1) / channels);
  const int64_t taps = (p.width + kTapsTogether - 1) / kTapsTogether;
  return launch(grad_weights, {blocks, taps, 1, kConvThreads, (kTapsTogether + 1) * 1024 * 4}, stream, cuda);
}

int launch_update_sm80(const UpdateCuda& cuda, void* stream) {
  return launch(convolve_steps, {conv_blocks(cuda.args.batch * cuda.args.dim), 1, 1, kConvThreads, 0}, stream,
                cuda);
}

}  // namespace arcore::causal_conv1d
