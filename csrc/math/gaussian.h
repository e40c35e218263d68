// Gaussians with a diagonal covariance exp(logvar): the KL divergence to N(0, I), the log-likelihood of a Gaussian
// decoder and the reparameterized sample (Kingma & Welling, equations 4, 10, 12). One latent or feature at a time.
//
// M is the arithmetic: Math<V>, or HalfPrecisionMath for what came in half precision.
#pragma once

#include "math.h"

namespace vae_fast {

// KL(N(mu, exp(logvar)) || N(0, 1)) = -1/2 (1 + logvar - mu^2 - exp(logvar)) = 1/2 (mu^2 + expm1(logvar) - logvar);
// kept in one piece, expm1(logvar) - logvar loses no digits where the posterior is close to the prior.
template <class V, class M = Math<V>>
VAE_FAST_INLINE V gaussian_kl(V mu, V logvar) {
  return constant<V>(0.5) * Math<V>::fma(mu, mu, M::expm1_minus_identity(logvar));
}

// d KL / d mu = mu, d2 KL / d mu2 = 1
// d KL / d logvar = expm1(logvar) / 2, d2 KL / d logvar2 = exp(logvar) / 2
template <class V, class M = Math<V>>
VAE_FAST_INLINE V gaussian_kl_grad_logvar(V logvar) {
  return constant<V>(0.5) * M::expm1(logvar);
}

template <class V>
VAE_FAST_INLINE V gaussian_kl_curvature_logvar(V logvar) {
  return constant<V>(0.5) * Math<V>::exp(logvar);
}

// sigma = exp(logvar / 2)
template <class V, class M = Math<V>>
VAE_FAST_INLINE V standard_deviation(V logvar) {
  return M::exp(constant<V>(0.5) * logvar);
}

// z = mu + sigma eps; dz/dmu = 1, dz/dlogvar = sigma eps / 2, d2z/dlogvar2 = sigma eps / 4
template <class V, class M = Math<V>>
VAE_FAST_INLINE V reparameterize(V mu, V logvar, V eps) {
  return Math<V>::fma(standard_deviation<V, M>(logvar), eps, mu);
}

// log N(x; mean, exp(logvar)) = -1/2 (log(2 pi) + logvar + (x - mean)^2 exp(-logvar)).
//
// With the residual d = x - mean, the variance v = exp(logvar) and s = d / v:
//   d/dmean  = s,         d/dlogvar = (d s - 1) / 2,    d/dx = -s
//   d2/dmean2 = -1 / v,   d2/dmean dlogvar = -s,        d2/dlogvar2 = -d s / 2
// exp(logvar) is divided by rather than exp(-logvar) multiplied: a residual of zero then costs nothing at any variance.
template <class V>
struct GaussianResidual {
  V d, v, s;
  VAE_FAST_INLINE GaussianResidual(V mean, V logvar, V x) : d(x - mean), v(Math<V>::exp(logvar)), s(d / v) {}
  // of a variance that many residuals share, and one over it
  VAE_FAST_INLINE GaussianResidual(V mean, V x, V variance, V precision) : d(x - mean), v(variance), s(d * precision) {}
  VAE_FAST_INLINE V log_likelihood(V logvar) const {
    return constant<V>(-0.5) * Math<V>::fma(d, s, logvar + constant<V>(1.8378770664093454836));  // log(2 pi)
  }
  VAE_FAST_INLINE V grad_mean() const { return s; }
  VAE_FAST_INLINE V grad_logvar() const { return constant<V>(0.5) * Math<V>::fma(d, s, constant<V>(-1.0)); }
  VAE_FAST_INLINE V curvature_mean() const { return constant<V>(-1.0) / v; }
  VAE_FAST_INLINE V curvature_mixed() const { return -s; }
  VAE_FAST_INLINE V curvature_logvar() const { return constant<V>(-0.5) * d * s; }
};

}  // namespace vae_fast
