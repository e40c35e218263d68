// What the native engine trains: a variational auto-encoder of two multi-layer perceptrons, what a step ascends, and
// what updates the parameters. Plain data, no torch; the CPU step and the CUDA step both read it.
//
// Parameters are numbered as torch's named_parameters() gives them: for each hidden layer of the encoder weight and
// bias, then mu's and logvar's; for each hidden layer of the decoder weight and bias, then those of the logits, or of
// the mean and of the logvar. A weight is [out, in] in torch.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "../kernels.h"

namespace vae_fast::engine {

enum class Activation : int8_t { tanh, relu, softplus };
enum class Likelihood : int8_t { bernoulli, gaussian, gaussian_sigmoid_mean };
enum class Estimator : int8_t { sgvb_b, sgvb_a, wake_sleep };
enum class OptimizerKind : int8_t { sgd, adagrad, adam, adamw };
enum class Precision : int8_t { exact, fast };

struct Network {
  int64_t data_dim, latent_dim;
  std::vector<int64_t> encoder_hidden, decoder_hidden;  // widths, from the input on
  Activation activation;
  Likelihood likelihood;
  float logvar_scale = 1;  // the encoder's logvar is logvar_scale W h + b
};

constexpr uint64_t kDreamOfZ = 1, kDreamOfX = 2;  // substreams of a step's noise: z' and x' of wake_sleep

// The objective of a step is the minibatch mean of 1/L sum_l log p(x|z_l) - beta KL, or of SGVB-A's estimate of it,
// plus weight_prior * log N(W; 0, I) for every weight (not bias): weight_prior is 1/N, or 0 for none. By wake_sleep the
// decoder ascends log p(x|z), z ~ q(z|x), and the encoder log q(z'|x') for a dream (z', x') ~ p(z) p(x|z); L and beta
// are then 1.
struct Objective {
  Estimator estimator;
  int64_t num_samples;  // L
  float beta, weight_prior;
};

// As in vae_fast/optim.py and torch.optim; what a kind does not have is not read.
//   sgd      m = momentum m + g;  w -= lr m  (with momentum 0: w -= lr g)
//   adagrad  G += g^2;  w -= lr g / sqrt(G + eps), nothing while step <= accumulate_steps
//   adam     m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;
//            w -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//   adamw    w *= 1 - lr weight_decay first
// weight_decay adds weight_decay w to g in sgd and adam, to every parameter, as torch does.
struct Optimizer {
  OptimizerKind kind;
  double lr, eps, beta1, beta2, momentum, weight_decay;
  int64_t accumulate_steps;
  int states() const {  // tensors of a parameter's shape: adagrad's G; m, v; momentum's m
    if (kind == OptimizerKind::adam || kind == OptimizerKind::adamw) return 2;
    return kind == OptimizerKind::adagrad || momentum != 0 ? 1 : 0;
  }
};

// The training data, resident on the device: x = float(values) * scale; with `dynamic`, each use of a value is a draw
// from Bernoulli(x), of element i of the minibatch [B, D] by word i of the step's binarise seed (vae_fast/batches.py).
struct Data {
  DType dtype;  // u8, f32, or bits: [rows, ceil(cols / 8)] of bytes
  bool dynamic;
  float scale;
  int64_t rows, cols;
  const void* values;
};

// Of one step, means over the minibatch in nats: elbo = log_likelihood - beta kl.
struct Terms {
  float elbo, log_likelihood, kl;
};

// The shapes of the parameters, in their order
inline std::vector<std::vector<int64_t>> parameter_shapes(const Network& network) {
  std::vector<std::vector<int64_t>> shapes;
  const auto layer = [&](int64_t inputs, int64_t outputs) {
    shapes.push_back({outputs, inputs});
    shapes.push_back({outputs});
  };
  int64_t width = network.data_dim;
  for (const int64_t outputs : network.encoder_hidden) layer(std::exchange(width, outputs), outputs);
  for (int i = 0; i < 2; ++i) layer(width, network.latent_dim);
  width = network.latent_dim;
  for (const int64_t outputs : network.decoder_hidden) layer(std::exchange(width, outputs), outputs);
  for (int i = 0; i < (network.likelihood == Likelihood::bernoulli ? 1 : 2); ++i) layer(width, network.data_dim);
  return shapes;
}

// A parameter and what the optimizer keeps of it, as torch has them: contiguous, of the parameter's shape.
struct Parameter {
  float* value;
  float* state[2];  // as many as the optimizer has
};

// The steps of one run, in order: minibatch s is rows[s * width .. + sizes[s]], its seeds are seeds[2 s] (noise) and
// seeds[2 s + 1] (binarising).
struct Steps {
  int64_t count, width;
  const int64_t *rows, *sizes, *seeds;
  int64_t updates_before;  // how many updates the optimizer has made
};

}  // namespace vae_fast::engine
