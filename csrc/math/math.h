// The arithmetic that the formulas of this folder are written in, for one value or for a vector of them.
//
// A formula here is a template over V: float or double (host and device), or a CPU vector of floats, for which
// cpu/vector.h specialises Math<V>. Comparisons of V give something that `?:` takes, so one line serves all of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define VAE_FAST_INLINE __host__ __device__ __forceinline__
#else
#define VAE_FAST_INLINE inline __attribute__((always_inline))
#endif

namespace vae_fast {

template <class V>
struct Math;

template <class V>
VAE_FAST_INLINE V constant(double value) {
  return V{} + static_cast<typename Math<V>::Scalar>(value);
}

// (exp(r) - 1 - r) / r^2 on |r| <= ln(2)/2; minimax fit, error 6e-8; of exp(r) that is 1.3e-8.
template <class V>
VAE_FAST_INLINE V exp_from_second_order(V r) {
  V y = r * r;
  V even = Math<V>::fma(y, constant<V>(1.400233460e-3), constant<V>(4.166564542e-2));
  V odd = Math<V>::fma(y, constant<V>(8.362979313e-3), constant<V>(1.666657876e-1));
  even = Math<V>::fma(even, y, constant<V>(5.000000134e-1));
  return Math<V>::fma(odd, r, even);
}

// log(1 + t) = t + t^2 Q(t - 1/2) for t in [0, 1]; minimax fit of degree 8, error 8e-9 of the result, small t included.
// No division: the nearest singularity, t = -1, is far enough for a polynomial to gain a factor of 5.8 a degree.
// Even and odd powers apart: two chains of half the length.
template <class V>
VAE_FAST_INLINE V log1p_unit(V t) {
  V u = t - constant<V>(0.5);
  V y = u * u;
  V even = Math<V>::fma(y, constant<V>(-3.745471802e-3), constant<V>(-1.007513388e-2));
  V odd = Math<V>::fma(y, constant<V>(7.198639839e-3), constant<V>(1.657779659e-2));
  even = Math<V>::fma(even, y, constant<V>(-2.890845556e-2));
  odd = Math<V>::fma(odd, y, constant<V>(5.109517459e-2));
  even = Math<V>::fma(even, y, constant<V>(-9.323207595e-2));
  odd = Math<V>::fma(odd, y, constant<V>(1.792247822e-1));
  even = Math<V>::fma(even, y, constant<V>(-3.781395563e-1));
  return Math<V>::fma(Math<V>::fma(odd, u, even), t * t, t);
}

// log(1 + f) = f + f^2 Q(f) for f in [sqrt(1/2) - 1, sqrt(2) - 1]; minimax fit, error 4e-9 of the result. Accurate near
// f = 0, where the log of a rounded 1 + f would not be.
template <class V>
VAE_FAST_INLINE V log1p_near_zero(V f) {
  V y = f * f;
  V even = Math<V>::fma(y, constant<V>(-7.621122132e-2), constant<V>(-1.324346099e-1));
  V odd = Math<V>::fma(y, constant<V>(1.290466500e-1), constant<V>(1.418183426e-1));
  even = Math<V>::fma(even, y, constant<V>(-1.660901277e-1));
  odd = Math<V>::fma(odd, y, constant<V>(2.000196855e-1));
  even = Math<V>::fma(even, y, constant<V>(-2.500158656e-1));
  odd = Math<V>::fma(odd, y, constant<V>(3.333332599e-1));
  even = Math<V>::fma(even, y, constant<V>(-4.999998829e-1));
  return Math<V>::fma(Math<V>::fma(odd, f, even), y, f);
}

template <>
struct Math<float> {
  using Scalar = float;
  using Int = int32_t;
  using Uint = uint32_t;
  static VAE_FAST_INLINE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
  static VAE_FAST_INLINE float minus_abs(float a) { return -::fabsf(a); }
  static VAE_FAST_INLINE float quotient(float a, float b) { return a / b; }  // b in [1, 2]
  static VAE_FAST_INLINE float sqrt(float a) { return ::sqrtf(a); }
  static VAE_FAST_INLINE float exp(float a) { return ::expf(a); }
  static VAE_FAST_INLINE float exp_nonpositive(float a) { return ::expf(a); }
  static VAE_FAST_INLINE float expm1(float a) { return ::expm1f(a); }
  // exp(a) - 1 - a, which near 0 is what the subtraction would lose
  static VAE_FAST_INLINE float expm1_minus_identity(float a) {
    float series = a * a * exp_from_second_order(a), difference = ::expm1f(a) - a;
    return ::fabsf(a) < 0.34f ? series : difference;
  }
  static VAE_FAST_INLINE float log1p_unit(float t) { return vae_fast::log1p_unit(t); }  // t in [0, 1]
  static VAE_FAST_INLINE float log1p_nonnegative(float t) { return ::log1pf(t); }
  static VAE_FAST_INLINE float from_int(int32_t i) { return static_cast<float>(i); }
  static VAE_FAST_INLINE float from_uint(uint32_t i) { return static_cast<float>(i); }
  // the 64-bit product a m: high and low words
  static VAE_FAST_INLINE void mulhilo(uint32_t a, uint32_t m, uint32_t& hi, uint32_t& lo) {
    uint64_t product = static_cast<uint64_t>(a) * m;
    hi = static_cast<uint32_t>(product >> 32);
    lo = static_cast<uint32_t>(product);
  }
  static VAE_FAST_INLINE uint32_t bits(float a) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(a);
#else
    uint32_t u;
    std::memcpy(&u, &a, sizeof u);
    return u;
#endif
  }
  static VAE_FAST_INLINE float from_bits(uint32_t u) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(u);
#else
    float a;
    std::memcpy(&a, &u, sizeof a);
    return a;
#endif
  }
};

template <>
struct Math<double> {
  using Scalar = double;
  static VAE_FAST_INLINE double fma(double a, double b, double c) { return a * b + c; }
  static VAE_FAST_INLINE double minus_abs(double a) { return -::fabs(a); }
  static VAE_FAST_INLINE double quotient(double a, double b) { return a / b; }
  static VAE_FAST_INLINE double sqrt(double a) { return ::sqrt(a); }
  static VAE_FAST_INLINE double exp(double a) { return ::exp(a); }
  static VAE_FAST_INLINE double exp_nonpositive(double a) { return ::exp(a); }
  static VAE_FAST_INLINE double expm1(double a) { return ::expm1(a); }
  static VAE_FAST_INLINE double expm1_minus_identity(double a) { return ::expm1(a) - a; }
  static VAE_FAST_INLINE double log1p_unit(double t) { return ::log1p(t); }
  static VAE_FAST_INLINE double log1p_nonnegative(double t) { return ::log1p(t); }
};

}  // namespace vae_fast
