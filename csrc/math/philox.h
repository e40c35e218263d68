// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror & Shaw, "Parallel Random Numbers: As Easy as
// 1, 2, 3", SC 2011, and the standard normals made of it. Noise is a pure function of (seed, element index):
//
//   element i is lane i mod 4 of counter (low32(i div 4), high32(i div 4), 0, 0) under the key (low32(seed),
//   high32(seed)); lanes (0, 1) and (2, 3) are Box-Muller pairs (w, w'):  u = (w + 1/2) / 2^32,  angle = pi int32(w') /
//   2^31, normals sqrt(-2 ln u) cos(angle), sqrt(-2 ln u) sin(angle).
//
// float and double round the same exact normal, so a float32 run and its float64 oracle share their noise; the
// float path errs by a few units in the last place everywhere (tests/test_noise.py), on CPU and GPU alike.
#pragma once

#include "math.h"

namespace vae_fast {

// c: the four counter words, replaced by the four random words; for V a vector, of as many counters as it has lanes. A
// counter has one long chain of dependent steps: kTogether of them keep a processor's multipliers busy.
template <class V, int kTogether = 1>
VAE_FAST_INLINE void philox4x32_10(typename Math<V>::Uint (*c)[4], uint32_t key0, uint32_t key1) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int i = 0; i < kTogether; ++i) {
      typename Math<V>::Uint hi0, lo0, hi1, lo1;
      Math<V>::mulhilo(c[i][0], 0xD2511F53u, hi0, lo0);
      Math<V>::mulhilo(c[i][2], 0xCD9E8D57u, hi1, lo1);
      c[i][0] = hi1 ^ c[i][1] ^ key0;
      c[i][1] = lo1;
      c[i][2] = hi0 ^ c[i][3] ^ key1;
      c[i][3] = lo0;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// sqrt(a) for an a well within the normal numbers, correctly rounded. A GPU's sqrtf does the
// same behind a branch for all other a, which keeps one normal from being made beside the next.
template <class V>
VAE_FAST_INLINE V sqrt_of_normal(V a) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(a));
  const float root = a * inverse;
  return ::fmaf(::fmaf(-root, root, a), 0.5f * inverse, root);
#else
  return Math<V>::sqrt(a);
#endif
}

// -2 log(1 + f) of g = -2 f: log1p_near_zero with every coefficient times a power of two, so to the same bits
template <class V>
VAE_FAST_INLINE V minus_twice_log1p_near_zero(V g) {
  V y = g * g;
  V even = Math<V>::fma(y, constant<V>(7.621122132e-2 / 512), constant<V>(1.324346099e-1 / 128));
  V odd = Math<V>::fma(y, constant<V>(1.290466500e-1 / 256), constant<V>(1.418183426e-1 / 64));
  even = Math<V>::fma(even, y, constant<V>(1.660901277e-1 / 32));
  odd = Math<V>::fma(odd, y, constant<V>(2.000196855e-1 / 16));
  even = Math<V>::fma(even, y, constant<V>(2.500158656e-1 / 8));
  odd = Math<V>::fma(odd, y, constant<V>(3.333332599e-1 / 4));
  even = Math<V>::fma(even, y, constant<V>(4.999998829e-1 / 2));
  return Math<V>::fma(Math<V>::fma(odd, g, even), y, g);
}

// The Box-Muller transform of one pair of words, in float: V is float or a vector of floats.
template <class V>
VAE_FAST_INLINE void box_muller(typename Math<V>::Uint w_radius, typename Math<V>::Uint w_angle, V& first, V& second) {
  using M = Math<V>;
  using U = typename M::Uint;
  using I = typename M::Int;
  // ln u, u = (w + 1/2) / 2^32 = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)). Near u = 1 the fraction f comes from
  // the complement of w, which float holds to full relative accuracy, where u itself would have lost it.
  V scaled = M::from_uint(w_radius) + 0.5f;
  // 0x3F3504F3 is sqrt(1/2): the exponent field now rounds to nearest; 32 less for the 2^-32
  U bits = M::bits(scaled) - (0x3F3504F3u + (32u << 23));
  I whole = (I)bits >> 23;
  V exponent = M::from_int(whole);
  V mantissa = M::from_bits((bits & 0x007FFFFFu) + 0x3F3504F3u);
  // (~w + 1/2) / 2^31; read only where u >= sqrt(1/2), so where the complement is less than 2^31
  V complement = M::fma(M::from_int((I)~w_radius), constant<V>(0x1p-31), constant<V>(0x1p-32));
  V minus_twice_f = whole == I{} ? complement : M::fma(mantissa, constant<V>(-2.0), constant<V>(2.0));
  // -2 ln 2 in two parts: the product with the first is exact
  V square = M::fma(exponent, constant<V>(-2 * 0.693359375),
                    M::fma(exponent, constant<V>(2 * 2.12194440e-4), minus_twice_log1p_near_zero(minus_twice_f)));
  V radius = sqrt_of_normal(square);
  // cos and sin of (quarter + rest) quarter turns, quarter in the two upper bits of `turned`; rest in [-1/2, 1/2] is
  // exact in integers, the lower bits of the word with their sign, so both stay accurate to the last bits near their
  // zeros.
  U turned = w_angle + 0x20000000u;
  V rest = M::from_int((I)(w_angle << 2)) * 2.3283064365386962890625e-10f;  // 2^-32
  V y = rest * rest;
  V s = M::fma(y, constant<V>(1.58651513e-4), constant<V>(-4.68147497e-3));
  s = M::fma(s, y, constant<V>(7.96926123e-2));
  s = M::fma(s, y, constant<V>(-6.45964097e-1));
  s = M::fma(s, y, constant<V>(-4.37113883e-8));  // pi/2 - float(pi/2)
  s = M::fma(rest, constant<V>(1.57079637), rest * s);
  V c = M::fma(y, constant<V>(9.06739840e-4), constant<V>(-2.08615283e-2));
  c = M::fma(c, y, constant<V>(2.53669410e-1));
  c = M::fma(c, y, constant<V>(-1.23370055));
  c = M::fma(c, y, constant<V>(1.0));
  V cosine = (turned & 0x40000000u) == U{} ? c : s;
  V sine = (turned & 0x40000000u) == U{} ? s : c;
  U cosine_sign = (turned + 0x40000000u) & 0x80000000u;
  U sine_sign = turned & 0x80000000u;
  first = radius * M::from_bits(M::bits(cosine) ^ cosine_sign);
  second = radius * M::from_bits(M::bits(sine) ^ sine_sign);
}

VAE_FAST_INLINE void box_muller(uint32_t w_radius, uint32_t w_angle, double& first, double& second) {
  // -ln u through log1p of the exact complement where u is near 1
  double u = (w_radius + 0.5) * 0x1p-32;
  double log_u = u > 0.5 ? ::log1p((static_cast<uint32_t>(~w_radius) + 0.5) * -0x1p-32) : ::log(u);
  double radius = ::sqrt(-2.0 * log_u);
  int32_t word = static_cast<int32_t>(w_angle);
  int32_t quarter = static_cast<int32_t>(w_angle + 0x20000000u) >> 30;
  double rest = (static_cast<int64_t>(word) - static_cast<int64_t>(quarter) * (int64_t{1} << 30)) * 0x1p-30;
  constexpr double kHalfPi = 1.57079632679489661923;
  double s = ::sin(rest * kHalfPi), c = ::cos(rest * kHalfPi);
  double cosine = quarter & 1 ? s : c, sine = quarter & 1 ? c : s;
  first = radius * ((quarter + 1) & 2 ? -cosine : cosine);
  second = radius * (quarter & 2 ? -sine : sine);
}

// The four normals of one counter.
template <class Real>
VAE_FAST_INLINE void philox_normal4(int64_t seed, int64_t counter, Real eps[4]) {
  uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(static_cast<uint64_t>(counter) >> 32), 0u, 0u};
  philox4x32_10<float>(&c, static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32));
  box_muller(c[0], c[1], eps[0], eps[1]);
  box_muller(c[2], c[3], eps[2], eps[3]);
}

// eps(seed, i): one lane of its counter
VAE_FAST_INLINE float philox_normal(int64_t seed, int64_t i) {
  float eps[4];
  philox_normal4(seed, i >> 2, eps);
  const float low = i & 1 ? eps[1] : eps[0], high = i & 1 ? eps[3] : eps[2];
  return i & 2 ? high : low;
}

}  // namespace vae_fast
