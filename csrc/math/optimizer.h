// One update of one parameter, from the gradient of what is descended. The coefficients that depend on the step's
// number alone are worked out once for all parameters.
#pragma once

#include "math.h"

namespace vae_fast {

// m = momentum m + g;  w -= rate m
template <class V>
VAE_FAST_INLINE V sgd_update(V w, V g, V& m, float momentum, float rate) {
  m = Math<V>::fma(constant<V>(momentum), m, g);
  return Math<V>::fma(constant<V>(-rate), m, w);
}

// G += g^2;  w -= rate g / sqrt(G + eps)
template <class V>
VAE_FAST_INLINE V adagrad_update(V w, V g, V& G, float rate, float eps) {
  G = Math<V>::fma(g, g, G);
  return w - constant<V>(rate) * g * Math<V>::inverse_sqrt(G + constant<V>(eps));
}

// m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2;  w -= rate m / (sqrt(v) root + eps)
// with rate = lr / (1 - beta1^t) and root = 1 / sqrt(1 - beta2^t)
template <class V>
VAE_FAST_INLINE V adam_update(V w, V g, V& m, V& v, float beta1_rest, float beta2, float beta2_rest, float rate,
                              float root, float eps) {
  m = Math<V>::fma(constant<V>(beta1_rest), g - m, m);
  v = Math<V>::fma(constant<V>(beta2), v, constant<V>(beta2_rest) * g * g);
  return w - constant<V>(rate) * m / Math<V>::fma(Math<V>::sqrt(v), constant<V>(root), constant<V>(eps));
}

}  // namespace vae_fast
