// What a step of SGD, Adagrad, Adam and AdamW does to one coordinate; the formulas of vae_fast/optim.py and
// torch.optim.
//
// g is the gradient of what descends, w the parameter, s0 and s1 its state (momentum's m; Adagrad's G; Adam's m and v):
//   sgd      g += weight_decay w;  s0 = momentum s0 + g;  w -= lr s0         (with momentum 0: w -= lr g)
//   adagrad  s0 += g^2;  w -= lr g / sqrt(s0 + eps), nothing during the accumulate-only start
//   adam     g += weight_decay w;  s0 = beta1 s0 + (1 - beta1) g;  s1 = beta2 s1 + (1 - beta2) g^2;
//            w -= lr / (1 - beta1^t) s0 / (sqrt(s1) / sqrt(1 - beta2^t) + eps)
//   adamw    w *= 1 - lr weight_decay, then as adam without its weight_decay
// What changes from step to step, and not from coordinate to coordinate, is StepFactors.
#pragma once

#include "math.h"

namespace vae_fast {

enum class UpdateKind : int32_t { sgd, momentum, adagrad, adam };

struct UpdateRule {
  UpdateKind kind;
  int states;  // of s0, s1, how many there are
  float eps, beta1, beta2, momentum;
  float beta1_rest, beta2_rest;  // 1 - beta, which a float beta has lost digits of
  float added_decay;             // added_decay w is added to g
  float kept;                    // w is multiplied by it first: 1, or adamw's 1 - lr weight_decay
};

struct StepFactors {
  float step_size;  // lr, adam's lr / (1 - beta1^t), or 0 in the accumulate-only start
  float root_bias;  // adam's sqrt(1 - beta2^t)
};

// Of update number t, from 1 on; in double, so that 1 - beta^t keeps its digits.
VAE_FAST_INLINE StepFactors step_factors(UpdateKind kind, double lr, double beta1, double beta2,
                                         int64_t accumulate_steps, int64_t t) {
  if (kind == UpdateKind::adagrad) return {t <= accumulate_steps ? 0.0f : static_cast<float>(lr), 1.0f};
  if (kind != UpdateKind::adam) return {static_cast<float>(lr), 1.0f};
  const double power = static_cast<double>(t);
  return {static_cast<float>(lr / (1.0 - ::pow(beta1, power))), static_cast<float>(::sqrt(1.0 - ::pow(beta2, power)))};
}

// kDecays: whether the rule's decays may be other than none
template <bool kDecays = true, class V>
VAE_FAST_INLINE void update(const UpdateRule& rule, const StepFactors& factors, V g, V& w, V& s0, V& s1) {
  using M = Math<V>;
  if constexpr (kDecays) {
    w = w * rule.kept;
    g = M::fma(w, V{} + rule.added_decay, g);
  }
  if (rule.kind == UpdateKind::adagrad) {
    s0 = M::fma(g, g, s0);
    w = w - factors.step_size * g * M::inverse_sqrt(s0 + rule.eps);
  } else if (rule.kind == UpdateKind::adam) {
    s0 = rule.beta1 * s0 + rule.beta1_rest * g;
    s1 = rule.beta2 * s1 + rule.beta2_rest * g * g;
    w = w - factors.step_size * s0 / (M::sqrt(s1) / factors.root_bias + rule.eps);
  } else {
    if (rule.kind == UpdateKind::momentum) g = s0 = M::fma(s0, V{} + rule.momentum, g);
    w = w - factors.step_size * g;
  }
}

}  // namespace vae_fast
