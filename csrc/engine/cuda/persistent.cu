// The kernel of persistent.h. Its blocks are all on the GPU at once (a cooperative launch), and wait for each other at
// events: counters that every block concerned adds one to, once a step. Buffers need no second copy where whoever
// writes them next has waited, through a chain of events, for those who read them; h' alone, which the decoder's update
// reads while the encoder goes on, has two.

// Where a block can have enough shared memory, and there are bulk copies
#if defined(VAE_FAST_CUDA_EMULATION) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
#define VAE_FAST_PERSISTENT
#elif defined(__CUDA_ARCH__)
#pragma nv_diag_suppress 177  // the kernel is empty there, and what it is made of is not used
#endif

#include <algorithm>

#include "../../math/splitmix.h"
#include "persistent.h"
#include "persistent_decoder.cuh"
#include "persistent_encoder.cuh"

namespace vae_fast {
namespace engine {
namespace persistent {
namespace {

template <Precision kPrecision, UpdateKind kKind>
__global__ void __launch_bounds__(kThreads, 1) persistent_kernel(const __grid_constant__ Arguments p) {
#if defined(VAE_FAST_PERSISTENT)
  if (static_cast<int>(blockIdx.x) < p.sizes.encoder_blocks) {
    Encoder<kPrecision, kKind>(p).run();
  } else {
    Decoder<kPrecision, kKind>(p).run();
  }
#endif
}

// --- before and after ------------------------------------------------------------------------------------------------

constexpr int kGatherThreads = 256;
constexpr int kLeastShared = 200 << 10;  // that a block can have where the kernel is not empty

// 16 pixels a thread
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(const __grid_constant__ Gather p) {
  const Here here(p.now, blockIdx.y);
  const int64_t step = here.step;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    p.factors[blockIdx.y] = factors_of(p.optimizer, here.own().lr, *p.updates + step + 1);
  }
  const int64_t pieces = p.row_bytes / 16, piece = static_cast<int64_t>(blockIdx.x) * kGatherThreads + threadIdx.x;
  const int64_t b = piece / pieces, col = piece % pieces * 16;
  if (b >= here.size) return;
  const int64_t row = p.rows[step * p.width + b], seed = p.now.seeds[2 * step + 1];
  uint32_t words[4] = {};
  for (int i = 0; i < 16; ++i) {
    float x = col + i < p.data.cols ? datum(p.data, row, col + i) : 0.0f;
    if (p.data.dynamic && col + i < p.data.cols) x = bernoulli_draw(seed, b * p.data.cols + col + i, x * p.data.scale);
    words[i / 4] |= static_cast<uint32_t>(x) << 8 * (i % 4);
  }
  uint4 all;
  all.x = words[0];
  all.y = words[1];
  all.z = words[2];
  all.w = words[3];
  *reinterpret_cast<uint4*>(p.x + (blockIdx.y * p.most_size + b) * p.row_bytes + col) = all;
}

// A step a block of one warp
__global__ void __launch_bounds__(kWarp) terms_kernel(const __grid_constant__ Launch p, float* terms) {
  const int64_t step = blockIdx.x, size = p.size[step];
  const int lane = static_cast<int>(threadIdx.x);
  double ll = 0.0, kl = 0.0;
  for (int i = lane; i < p.sizes.output_blocks; i += kWarp)
    ll += p.exchanged.ll_parts[step * p.sizes.output_blocks + i];
  for (int64_t i = lane; i < size; i += kWarp) kl += p.exchanged.kl_parts[step * p.sizes.most_size + i];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    ll += __shfl_xor_sync(0xffffffffu, ll, offset);
    kl += __shfl_xor_sync(0xffffffffu, kl, offset);
  }
  if (lane != 0) return;
  ll /= static_cast<double>(size);
  kl /= static_cast<double>(size);
  terms[3 * step] = static_cast<float>(ll - static_cast<double>(p.beta) * kl);
  terms[3 * step + 1] = static_cast<float>(ll);
  terms[3 * step + 2] = static_cast<float>(kl);
}

template <Precision kPrecision, UpdateKind kKind>
int launch_kernel(const Launch& launch, cudaStream_t stream) {
  const auto kernel = persistent_kernel<kPrecision, kKind>;
  const Arguments arguments(launch, Block<kPrecision, kKind>::kParts);
  const size_t bytes = static_cast<size_t>(std::max(arguments.encoder.bytes, arguments.decoder.bytes));
  if (cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)))
    return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(launch.sizes.encoder_blocks + launch.sizes.decoder_blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, arguments);
  return cudaGetLastError();
}

template <Precision kPrecision>
int launch_kernel(const Launch& launch, cudaStream_t stream) {
  switch (launch.rule.kind) {
    case UpdateKind::sgd:
      return launch_kernel<kPrecision, UpdateKind::sgd>(launch, stream);
    case UpdateKind::momentum:
      return launch_kernel<kPrecision, UpdateKind::momentum>(launch, stream);
    case UpdateKind::adagrad:
      return launch_kernel<kPrecision, UpdateKind::adagrad>(launch, stream);
    case UpdateKind::adam:
      return launch_kernel<kPrecision, UpdateKind::adam>(launch, stream);
  }
  return cudaErrorInvalidValue;
}

// Halves of h', of the gradient in the logits and of the columns
struct HalvesOf {
  int64_t hidden, grad, columns;
  explicit HalvesOf(const Sizes& s) {
    const Strides strides(s);
    hidden = int64_t{2} * strides.hidden_chunks * halves_of_chunk(2);
    grad = int64_t{1} * strides.data_chunks * halves_of_chunk(2);
    columns = int64_t{2} * s.hidden_blocks * kUnits * strides.own_columns;
  }
};

}  // namespace

const char* phase_name(bool encoder, int phase) {
  static const char* const names[2][kPhases] = {
      {"wait for z", "decoder's hidden layer", "fetch x", "wait for its units", "logits", "wait for their gradient",
       "backward to z", "update of the hidden layer", "update of the output"},
      {"wait for x", "encoder's hidden layer", "noise", "wait for the heads", "z", "KL", "wait for the gradient in z",
       "gradient in the heads", "wait for it", "backward to the hidden layer", "update"}};
  return names[encoder ? 1 : 0][phase];
}

std::string why_not(const Network& network, const Objective& objective, const Data& data, Precision precision,
                    int64_t models, int64_t most_size, int multiprocessors, int shared_bytes) {
  if (models != 1) return "several models";
  if (network.encoder_hidden.size() != 1 || network.decoder_hidden.size() != 1) return "more than one hidden layer";
  if (network.likelihood != Likelihood::bernoulli) return "a Gaussian decoder";
  if (objective.estimator == Estimator::wake_sleep) return "the estimator \"wake_sleep\"";
  if (objective.num_samples != 1) return "several samples of z";
  if (data.dtype != DType::u8 && data.dtype != DType::bits) return "data that are not bytes or bits";
  if (most_size > kMostRows) return "minibatches of more than 128 datapoints";
  if (network.latent_dim > kMostLatents) return "more than 64 latents";
  if (network.decoder_hidden[0] > kMostUnits || network.encoder_hidden[0] > 8 * multiprocessors)
    return "too many hidden units";
  const Sizes sizes = sizes_of(network, most_size);
  if (sizes.row_bytes > kMostRowBytes) return "more than 1008 pixels";
  if (shared_bytes < kLeastShared) return "a GPU of little shared memory";
  if (sizes.encoder_blocks + sizes.decoder_blocks > multiprocessors) return "more blocks than multiprocessors";
  const int parts = precision == Precision::exact ? 2 : 1;
  const int bytes = std::max(EncoderMemory(sizes, parts).bytes, DecoderMemory(sizes, parts).bytes);
  return bytes > shared_bytes ? "more shared memory than a block can have" : "";
}

Sizes sizes_of(const Network& network, int64_t most_size) {
  Sizes s = {};
  s.data_dim = static_cast<int>(network.data_dim);
  s.latents = static_cast<int>(network.latent_dim);
  s.encoder_units = static_cast<int>(network.encoder_hidden[0]);
  s.decoder_units = static_cast<int>(network.decoder_hidden[0]);
  s.most_size = static_cast<int>(most_size);
  s.rows = ceil_of(s.most_size, 16) * 16;
  s.row_bytes = ceil_of(s.data_dim, 16) / 2 * 32 + 16;
  s.encoder_blocks = ceil_of(s.encoder_units, kUnits);
  s.hidden_blocks = ceil_of(s.decoder_units, kUnits);
  s.output_blocks = ceil_of(s.data_dim, kOuts);
  s.decoder_blocks = std::max(s.hidden_blocks, s.output_blocks);
  return s;
}

Parameters parameters_of(const std::vector<Trained>& p) {
  return {p[0], p[1], {p[2], p[4]}, {p[3], p[5]}, p[6], p[7], p[8], p[9]};
}

Exchanged lay_out(const Sizes& s, int64_t most_steps, void* memory) {
  Exchanged e = {};
  char* at = static_cast<char*>(memory);
  const auto place = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
    at += (count * static_cast<int64_t>(sizeof *pointer) + 255) / 256 * 256;
  };
  const HalvesOf halves(s);
  const Strides strides(s);
  place(e.hidden, halves.hidden);
  place(e.grad, halves.grad);
  place(e.columns, halves.columns);
  place(e.z, int64_t{1} * s.most_size * strides.latents);
  place(e.head_grads, int64_t{2} * s.latents * kColumn);
  place(e.events, kEvents * (kBytesPerLine / 4));
  place(e.x, most_steps * s.most_size * s.row_bytes);
  place(e.head_parts, int64_t{2} * s.most_size * s.encoder_blocks * s.latents);
  place(e.z_parts, int64_t{1} * s.most_size * s.hidden_blocks * strides.latents);
  place(e.cycles, int64_t{kPhases} * (s.encoder_blocks + s.decoder_blocks));
  place(e.ll_parts, most_steps * s.output_blocks);
  place(e.kl_parts, most_steps * s.most_size);
  return e;
}

int64_t bytes_of(const Sizes& s, int64_t most_steps) {
  // The last buffer ends where the next would begin.
  const Exchanged e = lay_out(s, most_steps, nullptr);
  const auto end = reinterpret_cast<uintptr_t>(e.kl_parts + most_steps * s.most_size);
  return static_cast<int64_t>((end + 255) / 256 * 256);
}

int launch(const Gather& gather, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ceil_div(gather.most_size * gather.row_bytes / 16, kGatherThreads)),
                        static_cast<unsigned>(gather.steps));
  config.blockDim = dim3(kGatherThreads);
  config.stream = stream;
  cudaLaunchKernelEx(&config, gather_kernel, gather);
  return cudaGetLastError();
}

int launch(const Launch& launch, float* terms, cudaStream_t stream) {
  const Exchanged& e = launch.exchanged;
  // What no block writes, beyond the last unit, pixel, latent and row, is multiplied by zeros: it must not be NaN.
  // Events begin at 0.
  const size_t bytes =
      reinterpret_cast<uintptr_t>(e.events + kEvents * (kBytesPerLine / 4)) - reinterpret_cast<uintptr_t>(e.hidden);
  if (cudaError_t error = cudaMemsetAsync(e.hidden, 0, bytes, stream)) return error;
  const int error = launch.precision == Precision::exact ? launch_kernel<Precision::exact>(launch, stream)
                                                         : launch_kernel<Precision::fast>(launch, stream);
  if (error) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(launch.steps));
  config.blockDim = dim3(kWarp);
  config.stream = stream;
  cudaLaunchKernelEx(&config, terms_kernel, launch, terms);
  return cudaGetLastError();
}

int out_of_range(const Launch& launch, bool& found, cudaStream_t stream) {
  uint32_t count = 0;
  cudaError_t error = cudaMemcpyAsync(&count, launch.exchanged.events + kOutOfRange * (kBytesPerLine / 4), sizeof count,
                                      cudaMemcpyDeviceToHost, stream);
  if (!error) error = cudaStreamSynchronize(stream);
  found = count != 0;
  return error;
}

}  // namespace persistent
}  // namespace engine
}  // namespace vae_fast
