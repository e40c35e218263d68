// What the engine's kernels do to single numbers: a datum of the training data, a hidden layer's nonlinearity, the
// optimizer's factors of a step.
#pragma once

#include <cuda_runtime.h>

#include "../../math/activation.h"
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

// Of update number t, from 1 on
__device__ __forceinline__ StepFactors factors_of(const Optimizer& o, double lr, int64_t t) {
  const UpdateKind kind = o.kind == OptimizerKind::adagrad ? UpdateKind::adagrad
                          : o.kind == OptimizerKind::sgd   ? UpdateKind::sgd
                                                           : UpdateKind::adam;
  return step_factors(kind, lr, o.beta1, o.beta2, o.accumulate_steps, t);
}

}  // namespace engine
}  // namespace vae_fast
