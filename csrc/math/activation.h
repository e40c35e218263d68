// The hidden layers' nonlinearities, and their derivatives from what they returned.
#pragma once

#include "math.h"

namespace vae_fast {

// tanh a = -e / (e + 2) with e = expm1(-2 |a|), and a's sign: no digits cancel near 0, nothing overflows.
template <class V>
VAE_FAST_INLINE V tanh_by_exponent(V a) {
  V e = Math<V>::expm1(constant<V>(2.0) * Math<V>::minus_abs(a));
  V magnitude = Math<V>::quotient(e, e + constant<V>(2.0));
  return a > V{} ? -magnitude : magnitude;
}

template <class V>
VAE_FAST_INLINE V tanh_derivative(V tanh) {
  return constant<V>(1.0) - tanh * tanh;
}

template <class V>
VAE_FAST_INLINE V relu(V a) {
  return a <= V{} ? V{} : a;  // keeps NaN
}

template <class V>
VAE_FAST_INLINE V relu_derivative(V relu) {
  return relu > V{} ? constant<V>(1.0) : V{};
}

// log(1 + e^a) = max(a, 0) + log1p(e^-|a|). It is log 2, not 0, at 0.
template <class V>
VAE_FAST_INLINE V softplus(V a) {
  return relu(a) + Math<V>::log1p_nonnegative(Math<V>::exp_nonpositive(Math<V>::minus_abs(a)));
}

// sigmoid a = 1 - e^-softplus(a)
template <class V>
VAE_FAST_INLINE V softplus_derivative(V softplus) {
  return -Math<V>::expm1(-softplus);
}

}  // namespace vae_fast
