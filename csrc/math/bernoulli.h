// The Bernoulli decoder's log-likelihood, log p(x|z) = x log y + (1 - x) log(1 - y), y = sigmoid(logit)
// (Kingma & Welling, equation 11), from the logit l and the target x in [0, 1].
//
// With t = exp(-|l|) <= 1 nothing overflows and nothing cancels:
//   log p     = x l - max(l, 0) - log(1 + t) = (x - [l > 0]) l - log(1 + t)
//   d/dl      = x - y     = (x - [l > 0]) + sign(l) t / (1 + t)
//   d2/dl2    = -y (1 - y) = -t / (1 + t)^2
//   d/dx      = l
//
// M is the arithmetic: Math<V>, or HalfPrecisionMath for what came in half precision.
#pragma once

#include "math.h"

namespace vae_fast {

// x - [l > 0], exact
template <class V>
VAE_FAST_INLINE V bernoulli_residual_sign(V l, V x) {
  return l > V{} ? x - constant<V>(1.0) : x;
}

// (x - [l > 0]) l, with 0 * inf = 0: a certain and right prediction costs nothing
template <class V>
VAE_FAST_INLINE V bernoulli_linear(V l, V x) {
  V residual = bernoulli_residual_sign(l, x);
  return residual == V{} ? V{} : residual * l;
}

// The same bits in fewer instructions, for a target that is known to be 0 or 1
template <class V>
VAE_FAST_INLINE V bernoulli_linear(V l, bool x) {
  return x == (l > V{}) ? V{} : -Math<V>::abs(l);
}

template <class V, class M = Math<V>, class X>
VAE_FAST_INLINE V bernoulli_log_likelihood(V l, X x) {
  return bernoulli_linear(l, x) - M::log1p(M::exp(-M::abs(l)));
}

// sigmoid(-|l|)
template <class V, class M>
VAE_FAST_INLINE V bernoulli_tail(V l) {
  V t = M::exp(-M::abs(l));
  return quotient(t, V(t + 1.0f));
}

template <class V, class M = Math<V>>
VAE_FAST_INLINE V bernoulli_grad_logit(V l, V x) {
  V tail = bernoulli_tail<V, M>(l);
  return bernoulli_residual_sign(l, x) + (l > V{} ? tail : -tail);
}

// d2/dl2 log p
template <class V, class M = Math<V>>
VAE_FAST_INLINE V bernoulli_curvature(V l) {
  V y = bernoulli_tail<V, M>(l);
  return -(y * (constant<V>(1.0) - y));
}

}  // namespace vae_fast
