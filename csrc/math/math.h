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

// a v, the share that a direction v has of a derivative a: nothing of an infinite one where v is zero. NaN stays.
template <class V>
VAE_FAST_INLINE V along(V v, V a) {
  const V none = a == a ? V{} : a;
  return v == V{} ? none : v * a;
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

// a = n ln 2 + r with |r| <= ln(2)/2, and 2^(n + bias), where n + bias + 127 must be in [0, 255]: adding a number of
// magnitude 2^23 rounds to an integer, whose low bits are then moved to where an exponent stands.
template <class V>
struct ReducedExponent {
  using M = Math<V>;
  V r, power;
  VAE_FAST_INLINE ReducedExponent(V a, V bias) {
    V offset = bias + (12582912.0f + 127.0f);
    V shifted = M::fma(a, constant<V>(1.44269504088896341), offset);
    V n = shifted - offset;
    power = M::from_bits(M::bits(shifted) << 23);
    r = M::fma(n, constant<V>(-0.693359375), a);  // ln 2 in two parts: the product with the first is exact
    r = M::fma(n, constant<V>(2.12194440e-4), r);
  }
  VAE_FAST_INLINE V expm1() const { return M::fma(exp_from_second_order(r), r * r, r); }
};

// With p = exp(r) - 1, 2 (p 2^(n - 1) + (2^(n - 1) - 1/2)): 2^n itself overflows at n = 128.
template <class V>
VAE_FAST_INLINE V expm1_by_exponent(V a) {
  ReducedExponent<V> x(Math<V>::at_most(Math<V>::at_least(a, -30.0f), 89.0f), constant<V>(-1.0));
  V half = Math<V>::fma(x.expm1(), x.power, x.power - 0.5f);
  return half + half;
}

// exp(a) - 1 - a, which near 0 is what the subtraction would lose
template <class V>
VAE_FAST_INLINE V expm1_minus_identity_by_exponent(V a) {
  ReducedExponent<V> x(Math<V>::at_most(Math<V>::at_least(a, -30.0f), 89.0f), constant<V>(-1.0));
  V second_order = exp_from_second_order(x.r) * (x.r * x.r);
  V half = Math<V>::fma(second_order + x.r, x.power, x.power - 0.5f);
  return x.power == constant<V>(0.5) ? second_order : half + half - a;  // power is 1/2 where n is 0, and r is a
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

// log(1 + t) for t >= 0: 1 + t = 2^n (1 + f), 1 + f in [sqrt(1/2), sqrt(2)), where f = (t + 1 - 2^n) / 2^n keeps what a
// rounded 1 + t has lost. No division and no branch.
template <class V>
VAE_FAST_INLINE V log1p_by_exponent(V t) {
  using M = Math<V>;
  using Int = typename M::Int;
  Int n = (Int)(M::bits(t + 1.0f) - 0x3F3504F3u) >> 23;  // 0x3F3504F3 is sqrt(1/2)
  V scale = M::from_bits((typename M::Uint)(127 - n) << 23), exponent = M::from_int(n);
  V log = M::fma(exponent, constant<V>(-2.12194440e-4), log1p_near_zero(M::fma(t, scale, scale - 1.0f)));
  return M::fma(exponent, constant<V>(0.693359375), log);  // ln 2 in two parts: the product with this one is exact
}

template <>
struct Math<float> {
  using Scalar = float;
  using Int = int32_t;
  using Uint = uint32_t;
  static VAE_FAST_INLINE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
  static VAE_FAST_INLINE float minus_abs(float a) { return -::fabsf(a); }
  static VAE_FAST_INLINE float copysign(float magnitude, float sign) { return ::copysignf(magnitude, sign); }
  static VAE_FAST_INLINE bool sign_bit(float a) { return static_cast<int32_t>(bits(a)) < 0; }  // also of -0 and NaN
  // a / b for b in [1, 2]; on a GPU the hardware's reciprocal and a Newton step, without the branches of a
  // division; error 0.9 units in the last place where the reciprocal errs by one. For b from 2^-126 to 2^126 too, where
  // it is finite; for a smaller b it is NaN there.
  static VAE_FAST_INLINE float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
    const float product = a * inverse;
    return ::fmaf(inverse, ::fmaf(-b, product, a), product);
#else
    return a / b;
#endif
  }
  static VAE_FAST_INLINE float at_least(float a, float low) { return a < low ? low : a; }  // these keep NaN
  static VAE_FAST_INLINE float at_most(float a, float high) { return a > high ? high : a; }
  static VAE_FAST_INLINE float sqrt(float a) { return ::sqrtf(a); }
#if defined(__CUDA_ARCH__)
  static VAE_FAST_INLINE float inverse_sqrt(float a) {
    return ::rsqrtf(a);
  }  // to 2 ulp, in a tenth of the instructions
#else
  static VAE_FAST_INLINE float inverse_sqrt(float a) { return 1 / ::sqrtf(a); }
#endif
  static VAE_FAST_INLINE float exp(float a) { return ::expf(a); }
  static VAE_FAST_INLINE float exp_nonpositive(float a) { return ::expf(a); }
  static VAE_FAST_INLINE float expm1(float a) { return expm1_by_exponent(a); }
  static VAE_FAST_INLINE float expm1_minus_identity(float a) { return expm1_minus_identity_by_exponent(a); }
  static VAE_FAST_INLINE float log1p_nonnegative(float t) { return log1p_by_exponent(t); }
  static VAE_FAST_INLINE float from_int(int32_t i) { return static_cast<float>(i); }
  static VAE_FAST_INLINE float from_uint(uint32_t i) { return static_cast<float>(i); }
  // the 64-bit product a m: high and low words
  static VAE_FAST_INLINE void mulhilo(uint32_t a, uint32_t m, uint32_t& hi, uint32_t& lo) {
#if defined(__CUDA_ARCH__)
    // Of the same in C++, nvcc 13 adds a zero to every upper word.
    asm("{\n\t.reg .u64 product;\n\tmul.wide.u32 product, %2, %3;\n\tmov.b64 {%1, %0}, product;\n\t}"
        : "=r"(hi), "=r"(lo)
        : "r"(a), "r"(m));
#else
    uint64_t product = static_cast<uint64_t>(a) * m;
    hi = static_cast<uint32_t>(product >> 32);
    lo = static_cast<uint32_t>(product);
#endif
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
  static VAE_FAST_INLINE double copysign(double magnitude, double sign) { return ::copysign(magnitude, sign); }
  static VAE_FAST_INLINE bool sign_bit(double a) { return ::copysign(1.0, a) < 0.0; }
  static VAE_FAST_INLINE double quotient(double a, double b) { return a / b; }
  static VAE_FAST_INLINE double sqrt(double a) { return ::sqrt(a); }
  static VAE_FAST_INLINE double exp(double a) { return ::exp(a); }
  static VAE_FAST_INLINE double exp_nonpositive(double a) { return ::exp(a); }
  static VAE_FAST_INLINE double expm1(double a) { return ::expm1(a); }
  static VAE_FAST_INLINE double expm1_minus_identity(double a) { return ::expm1(a) - a; }
  static VAE_FAST_INLINE double log1p_nonnegative(double t) { return ::log1p(t); }
};

// The arithmetic of floats that came in half precision and, but for expm1_minus_identity, go back to it, where a GPU's
// instructions and not its memory are the limit: relative error 4e-6 against the 5e-4 (float16) or 4e-3 (bfloat16) of
// that rounding.
struct HalfPrecisionMath : Math<float> {
  // Below 2^-126 the result is 0. Without a reduction: the rounding of a log2(e) is all that is lost.
  static VAE_FAST_INLINE float exp(float a) {
    const float power = a * 1.44269504f;
#if defined(__CUDA_ARCH__)
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(power));
    return result;
#else
    return ::exp2f(power);
#endif
  }
  // bfloat16 goes below 2^-126 too.
  static VAE_FAST_INLINE float exp_nonpositive(float a) {
    const float power = a * 1.44269504f;
#if defined(__CUDA_ARCH__)
    float result;
    asm("ex2.approx.f32 %0, %1;" : "=f"(result) : "f"(power));
    return result;
#else
    return ::exp2f(power);
#endif
  }
  // expm1(a) / a by a minimax fit, error 6e-8, where the difference would cancel
  static VAE_FAST_INLINE float expm1(float a) {
    float near = fma(a, 8.3061718e-3f, 4.17779557e-2f);
    near = fma(near, a, 1.666695258e-1f);
    near = fma(near, a, 4.9999816e-1f);
    near = fma(near, a, 9.999999465e-1f);
    return if_near_zero(a, near * a, exp(a) - 1.0f);
  }
  // The result is a float, of which a large one is all exp: that one is Math's. By a minimax fit, error 1e-7, where
  // the difference would cancel.
  static VAE_FAST_INLINE float expm1_minus_identity(float a) {
    float near = fma(a, 1.3956846e-3f, 8.3541119e-3f);
    near = fma(near, a, 4.16662977e-2f);
    near = fma(near, a, 1.666661437e-1f);
    near = fma(near, a, 0.5f);
    return if_near_zero(a, near * (a * a), (Math<float>::exp(a) - 1.0f) - a);
  }

 private:
  // near or far by |a| < 1/4: a choice, of which a compiler does not make a branch
  static VAE_FAST_INLINE float if_near_zero(float a, float near, float far) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("{\n\t.reg .pred is_near;\n\tsetp.lt.f32 is_near, %1, 0f3E800000;\n\tselp.f32 %0, %2, %3, is_near;\n\t}"
        : "=f"(result)
        : "f"(::fabsf(a)), "f"(near), "f"(far));
    return result;
#else
    return ::fabsf(a) < 0.25f ? near : far;
#endif
  }
};

}  // namespace vae_fast
