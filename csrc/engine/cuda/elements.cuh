// What the engine's kernels do to single numbers: a datum of the training data, a hidden layer's nonlinearity, a
// latent, the optimizer's factors of a step.
#pragma once

#include <cuda_runtime.h>

#include "../../math/activation.h"
#include "../../math/gaussian.h"
#include "../../math/optimizer.h"
#include "../network.h"

namespace vae_fast {
namespace engine {

__device__ __forceinline__ float datum(const Data& data, int64_t row, int64_t col) {
  if (data.dtype == DType::f32) return static_cast<const float*>(data.values)[row * data.cols + col];
  const uint8_t* bytes = static_cast<const uint8_t*>(data.values);
  if (data.dtype == DType::u8) return static_cast<float>(bytes[row * data.cols + col]);
  return static_cast<float>(bytes[row * ((data.cols + 7) / 8) + col / 8] >> (col & 7) & 1);
}

__device__ __forceinline__ float activate(Activation activation, float a) {
  if (activation == Activation::tanh) return tanh_by_exponent(a);
  return activation == Activation::relu ? relu(a) : softplus(a);
}

// grad act'(a), the derivative from h = act(a)
__device__ __forceinline__ float through_activation(Activation activation, float grad, float h) {
  if (activation == Activation::tanh) return grad * tanh_derivative(h);
  if (activation == Activation::relu) return h > 0.0f ? grad : 0.0f;
  return grad * softplus_derivative(h);
}

// log q(z|x) - log p(z) of one latent, z = mu + sigma eps
__device__ __forceinline__ float sampled_kl(float logvar, float eps, float z) {
  return 0.5f * (z * z - eps * eps - logvar);
}

// kernels.h's LatentBackward of one latent, from the means over its samples of g and of g eps; `own`: whether the model
// has it, and it is not padding.
struct LatentGradient {
  float mu, logvar;  // logvar: times logvar_scale
  __device__ __forceinline__ LatentGradient(Estimator estimator, float beta, float logvar_scale, float mean,
                                            float log_variance, float g, float g_eps, bool own) {
    mu = g;
    logvar = 0.5f * standard_deviation(log_variance) * g_eps;
    if (estimator == Estimator::sgvb_b) {
      mu -= beta * mean;
      logvar -= beta * gaussian_kl_grad_logvar(log_variance);
    } else {
      logvar += own ? 0.5f * beta : 0.0f;
    }
    logvar *= logvar_scale;
  }
};

// Of update number t, from 1 on
__device__ __forceinline__ StepFactors factors_of(const Optimizer& o, double lr, int64_t t) {
  const UpdateKind kind = o.kind == OptimizerKind::adagrad ? UpdateKind::adagrad
                          : o.kind == OptimizerKind::sgd   ? UpdateKind::sgd
                                                           : UpdateKind::adam;
  return step_factors(kind, lr, o.beta1, o.beta2, o.accumulate_steps, t);
}

}  // namespace engine
}  // namespace vae_fast
