// What an optimizer does to a coordinate (math/optimizer.h), from its numbers.
#pragma once

#include "../math/optimizer.h"
#include "network.h"

namespace vae_fast::engine {

inline UpdateRule rule_of(const Optimizer& o) {
  const bool adam = o.kind == OptimizerKind::adam || o.kind == OptimizerKind::adamw;
  UpdateRule rule = {};
  rule.kind = adam                               ? UpdateKind::adam
              : o.kind == OptimizerKind::adagrad ? UpdateKind::adagrad
              : o.momentum != 0                  ? UpdateKind::momentum
                                                 : UpdateKind::sgd;
  rule.states = o.states();
  rule.eps = static_cast<float>(o.eps);
  rule.beta1 = static_cast<float>(o.beta1);
  rule.beta2 = static_cast<float>(o.beta2);
  rule.beta1_rest = static_cast<float>(1.0 - o.beta1);
  rule.beta2_rest = static_cast<float>(1.0 - o.beta2);
  rule.momentum = static_cast<float>(o.momentum);
  const bool adds = o.kind == OptimizerKind::sgd || o.kind == OptimizerKind::adam;
  rule.added_decay = adds ? static_cast<float>(o.weight_decay) : 0.0f;
  rule.kept = o.kind == OptimizerKind::adamw ? static_cast<float>(1.0 - o.lr * o.weight_decay) : 1.0f;
  return rule;
}

}  // namespace vae_fast::engine
