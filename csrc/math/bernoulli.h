// The Bernoulli decoder's log-likelihood, log p(x|z) = x log y + (1 - x) log(1 - y), y = sigmoid(logit)
// (Kingma & Welling, equation 11), from the logit l and the target x in [0, 1].
//
// With t = exp(-|l|) <= 1 nothing overflows and nothing cancels:
//   log p     = x l - max(l, 0) - log(1 + t) = (x - [l > 0]) l - log(1 + t)
//   d/dl      = x - y     = (x - [l > 0]) + sign(l) t / (1 + t)
//   d2/dl2    = -y (1 - y) = -t / (1 + t)^2
//   d/dx      = l
#pragma once

#include "math.h"

namespace vae_fast {

// x - [l > 0], exact
template <class V>
VAE_FAST_INLINE V bernoulli_residual_sign(V l, V x) {
  return l > V{} ? x - constant<V>(1.0) : x;
}

template <class V>
VAE_FAST_INLINE V bernoulli_log_likelihood(V l, V x) {
  V residual = bernoulli_residual_sign(l, x);
  V linear = residual == V{} ? V{} : residual * l;  // 0 * inf is 0 here: a certain and right prediction costs nothing
  return linear - Math<V>::log1p(Math<V>::exp(-Math<V>::abs(l)));
}

template <class V>
VAE_FAST_INLINE V bernoulli_grad_logit(V l, V x) {
  V t = Math<V>::exp(-Math<V>::abs(l));
  V tail = t / (t + 1.0f);  // sigmoid(-|l|)
  return bernoulli_residual_sign(l, x) + (l > V{} ? tail : -tail);
}

// log p and d/dl log p, with t computed once
template <class V>
struct BernoulliTerms {
  V log_likelihood, grad_logit;
};

template <class V>
VAE_FAST_INLINE BernoulliTerms<V> bernoulli_terms(V l, V x) {
  V t = Math<V>::exp(-Math<V>::abs(l));
  V tail = t / (t + 1.0f);
  V residual = bernoulli_residual_sign(l, x);
  V linear = residual == V{} ? V{} : residual * l;
  return {linear - Math<V>::log1p(t), residual + (l > V{} ? tail : -tail)};
}

// d2/dl2 log p
template <class V>
VAE_FAST_INLINE V bernoulli_curvature(V l) {
  V t = Math<V>::exp(-Math<V>::abs(l));
  V y = t / (t + 1.0f);
  return -(y * (constant<V>(1.0) - y));
}

}  // namespace vae_fast
