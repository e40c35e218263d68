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

// exp(r) = 1 + r + r^2 (c0 + c1 r + ...) on |r| <= ln(2)/2; Chebyshev fit, error 2e-10 of the result.
template <class V>
VAE_FAST_INLINE V expm1_reduced(V r) {
  V p = Math<V>::fma(r, constant<V>(1.98912474e-4), constant<V>(1.39338810e-3));
  p = Math<V>::fma(p, r, constant<V>(8.33331069e-3));
  p = Math<V>::fma(p, r, constant<V>(4.16664628e-2));
  p = Math<V>::fma(p, r, constant<V>(1.66666667e-1));
  p = Math<V>::fma(p, r, constant<V>(0.5));
  return Math<V>::fma(p * r, r, r);
}

// log(1 + f) = 2 atanh(s), s = f / (2 + f), for f in [sqrt(1/2) - 1, 1]: 2 s + s y q(y), y = s^2 <= 1/9; Chebyshev fit
// of q, error 1e-9 of the result. Written as f - (f^2/2 - s (f^2/2 + y q)), which is the same and rounds last what is
// largest. Accurate near f = 0, where the log of a rounded 1 + f would not be.
template <class V>
VAE_FAST_INLINE V log1p_polynomial(V f) {
  V s = f / (f + constant<V>(2.0));
  V y = s * s;
  V q = Math<V>::fma(y, constant<V>(0.232243292), constant<V>(0.217065758));
  q = Math<V>::fma(q, y, constant<V>(0.285923579));
  q = Math<V>::fma(q, y, constant<V>(0.399997063));
  q = Math<V>::fma(q, y, constant<V>(0.666666673));
  V half_square = constant<V>(0.5) * f * f;
  return f - (half_square - s * Math<V>::fma(y, q, half_square));
}

// log(1 + t) for t in [0, 1] without a division: t + t^2 q(t), minimax fit of the whole, relative error 3e-8 before
// rounding and 1.7e-7 with it.
template <class V>
VAE_FAST_INLINE V log1p_unit(V t) {
  V q = Math<V>::fma(t, constant<V>(0.00536482641), constant<V>(-0.0300658010));
  q = Math<V>::fma(q, t, constant<V>(0.0792045519));
  q = Math<V>::fma(q, t, constant<V>(-0.137538031));
  q = Math<V>::fma(q, t, constant<V>(0.191536561));
  q = Math<V>::fma(q, t, constant<V>(-0.248571634));
  q = Math<V>::fma(q, t, constant<V>(0.333213240));
  q = Math<V>::fma(q, t, constant<V>(-0.499996483));
  return Math<V>::fma(q * t, t, t);
}

template <>
struct Math<float> {
  using Scalar = float;
  using Int = int32_t;
  using Uint = uint32_t;
  static VAE_FAST_INLINE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
  static VAE_FAST_INLINE float abs(float a) { return ::fabsf(a); }
  static VAE_FAST_INLINE float sqrt(float a) { return ::sqrtf(a); }
  static VAE_FAST_INLINE float exp(float a) { return ::expf(a); }
  static VAE_FAST_INLINE float expm1(float a) { return ::expm1f(a); }
  // log(1 + t) for t in [0, 1]
  static VAE_FAST_INLINE float log1p(float t) { return log1p_unit(t); }
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
  static VAE_FAST_INLINE double abs(double a) { return ::fabs(a); }
  static VAE_FAST_INLINE double sqrt(double a) { return ::sqrt(a); }
  static VAE_FAST_INLINE double exp(double a) { return ::exp(a); }
  static VAE_FAST_INLINE double expm1(double a) { return ::expm1(a); }
  static VAE_FAST_INLINE double log1p(double t) { return ::log1p(t); }
};

// The arithmetic of floats that came in half precision, where a GPU's instructions and not its memory are the limit:
// relative error 5e-7, for exponents below -8 up to 2e-6, against the 5e-4 (float16) or 4e-3 (bfloat16) to which the
// input itself is known.
struct HalfPrecisionMath : Math<float> {
  // Below 2^-126 the result is 0. Without a reduction: the rounding of a log2(e) is all that is lost.
  static VAE_FAST_INLINE float exp(float a) {
    float power = a * 1.44269504f;
#if defined(__CUDA_ARCH__)
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(power));
    return result;
#else
    return ::exp2f(power);
#endif
  }
  // log(1 + t) for t in [0, 1]: t p(t), minimax fit, error 2.2e-7 before rounding
  static VAE_FAST_INLINE float log1p(float t) {
    float p = fma(t, -0.00877895858f, 0.0449866541f);
    p = fma(p, t, -0.109022923f);
    p = fma(p, t, 0.178472087f);
    p = fma(p, t, -0.245368659f);
    p = fma(p, t, 0.332840651f);
    p = fma(p, t, -0.499981791f);
    return t * fma(p, t, 1.0f);
  }
};

// a / b for b in [1, 2]: the hardware's reciprocal and a Newton step, without the branches of a division. Error 0.9
// units in the last place where the reciprocal errs by one.
template <class V>
VAE_FAST_INLINE V quotient(V a, V b) {
  return a / b;
}
#if defined(__CUDA_ARCH__)
template <>
VAE_FAST_INLINE float quotient(float a, float b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  const float product = a * inverse;
  return ::fmaf(inverse, ::fmaf(-b, product, a), product);
}
#endif

}  // namespace vae_fast
