// The Bernoulli decoder's log-likelihood, log p(x|z) = x log y + (1 - x) log(1 - y), y = sigmoid(logit)
// (Kingma & Welling, equation 11), from the logit l and the target x in [0, 1].
//
// With t = exp(-|l|) <= 1 nothing overflows and nothing cancels:
//   log p     = x l - max(l, 0) - log(1 + t) = (x - [l > 0]) l - log(1 + t)
//   d/dl      = x - y     = (x - [l > 0]) + sign(l) t / (1 + t)
//   d2/dl2    = -y (1 - y) = -t / (1 + t)^2
//   d/dx      = l
// [l > 0] and sign(l) are both taken from the sign bit, which costs less than a comparison: at l = 0, where t = 1,
// either sign gives the same log p and d/dl.
//
// M is the arithmetic: Math<V>, or HalfPrecisionMath for what came in half precision.
#pragma once

#include "math.h"

namespace vae_fast {

// x - [l > 0], exact
template <class V>
VAE_FAST_INLINE V bernoulli_residual_sign(V l, V x) {
  return Math<V>::sign_bit(l) ? x : x - constant<V>(1.0);
}

// (x - [l > 0]) l
template <class V>
VAE_FAST_INLINE V bernoulli_linear(V l, V x) {
  V residual = bernoulli_residual_sign(l, x);
  return residual == V{} ? V{} : residual * l;  // 0 * inf is 0 here: a certain and right prediction costs nothing
}

// The same bits in fewer instructions, for a target that is known to be 0 or 1
template <class V>
VAE_FAST_INLINE V bernoulli_linear(V l, bool x) {
  return x == (l > V{}) ? V{} : Math<V>::minus_abs(l);
}

// t
template <class V, class M = Math<V>>
VAE_FAST_INLINE V bernoulli_odds(V l) {
  return M::exp_nonpositive(M::minus_abs(l));
}

template <class V, class M = Math<V>>
VAE_FAST_INLINE V bernoulli_log_likelihood(V l, V x) {
  return bernoulli_linear(l, x) - M::log1p_nonnegative(bernoulli_odds<V, M>(l));
}

// The sum of log p over kMost pairs (l, x) at most, with one logarithm for all: sum log(1 + t) = log prod (1 + t). What
// is kept is the product minus one, in which small t do not lose their digits; it is less than 2^kMost, so kMost must
// stay below a float's 128. Its relative error becomes an absolute one of the logarithm, less than that of adding up.
template <class V, class M = Math<V>>
class BernoulliSum {
 public:
  static constexpr int kMost = 112;
  template <class X>
  VAE_FAST_INLINE void add(V l, X x, V t) {
    linear_ = linear_ + bernoulli_linear(l, x);
    product_ = M::fma(product_, t, product_ + t);
  }
  template <class X>
  VAE_FAST_INLINE void add(V l, X x) {
    add(l, x, bernoulli_odds<V, M>(l));
  }
  // In fewer instructions. An infinite l with the target that it predicts makes the sum NaN here.
  VAE_FAST_INLINE void add_finite(V l, V x) {
    const V t = bernoulli_odds<V, M>(l);
    linear_ = M::fma(bernoulli_residual_sign(l, x), l, linear_);
    product_ = M::fma(product_, t, product_ + t);
  }
  VAE_FAST_INLINE V log_likelihood() const { return linear_ - M::log1p_nonnegative(product_); }

 private:
  V linear_{}, product_{};
};

template <class V, class M = Math<V>>
VAE_FAST_INLINE V bernoulli_grad_logit(V l, V x, V t) {
  V tail = M::quotient(t, t + constant<V>(1.0));  // sigmoid(-|l|)
  return bernoulli_residual_sign(l, x) + Math<V>::copysign(tail, l);
}

template <class V, class M = Math<V>>
VAE_FAST_INLINE V bernoulli_grad_logit(V l, V x) {
  return bernoulli_grad_logit<V, M>(l, x, bernoulli_odds<V, M>(l));
}

// y
template <class V>
VAE_FAST_INLINE V sigmoid(V l) {
  return -bernoulli_grad_logit(l, V{});
}

// d2/dl2 log p
template <class V, class M = Math<V>>
VAE_FAST_INLINE V bernoulli_curvature(V l) {
  V t = bernoulli_odds<V, M>(l);
  V y = M::quotient(t, t + constant<V>(1.0));
  return -(y * (constant<V>(1.0) - y));
}

}  // namespace vae_fast
