// A vector of floats as wide as the instruction set at hand (VAE_FAST_VECTOR_BYTES), the Math<V> of it, and loads and
// stores of every element type. Compiled once per instruction set: see kernels.inl.
#pragma once

#include <type_traits>

#include "../kernels.h"
#include "../math/math.h"

namespace vae_fast {
namespace cpu {
namespace VAE_FAST_CAPABILITY {

constexpr int kLanes = VAE_FAST_VECTOR_BYTES / 4;
typedef float VF __attribute__((vector_size(VAE_FAST_VECTOR_BYTES)));
typedef int32_t VI __attribute__((vector_size(VAE_FAST_VECTOR_BYTES)));
typedef uint32_t VU __attribute__((vector_size(VAE_FAST_VECTOR_BYTES)));
typedef uint64_t VU64 __attribute__((vector_size(VAE_FAST_VECTOR_BYTES)));
typedef uint16_t VU16 __attribute__((vector_size(VAE_FAST_VECTOR_BYTES / 2)));
typedef uint8_t VU8 __attribute__((vector_size(VAE_FAST_VECTOR_BYTES / 4)));

}  // namespace VAE_FAST_CAPABILITY
}  // namespace cpu

template <>
struct Math<cpu::VAE_FAST_CAPABILITY::VF> {
  using V = cpu::VAE_FAST_CAPABILITY::VF;
  using Scalar = float;
  using Int = cpu::VAE_FAST_CAPABILITY::VI;
  using Uint = cpu::VAE_FAST_CAPABILITY::VU;
  using U64 = cpu::VAE_FAST_CAPABILITY::VU64;

  static VAE_FAST_INLINE V fma(V a, V b, V c) { return a * b + c; }  // one instruction where the set has it
  static VAE_FAST_INLINE V from_bits(Uint u) { return (V)u; }
  static VAE_FAST_INLINE Uint bits(V a) { return (Uint)a; }
  static VAE_FAST_INLINE V minus_abs(V a) { return from_bits(bits(a) | 0x80000000u); }
  // for a magnitude >= 0
  static VAE_FAST_INLINE V copysign(V magnitude, V sign) {
    return from_bits(bits(magnitude) | (bits(sign) & 0x80000000u));
  }
  static VAE_FAST_INLINE Int sign_bit(V a) { return (Int)a < Int{}; }
  static VAE_FAST_INLINE V from_int(Int i) { return __builtin_convertvector(i, V); }
  // Correctly rounded, as the GPU's conversion is: both halves are exact, their sum rounds once.
  static VAE_FAST_INLINE V from_uint(Uint u) {
    return from_int((Int)(u >> 16)) * 65536.0f + from_int((Int)(u & 0xFFFFu));
  }
  static VAE_FAST_INLINE V quotient(V a, V b) { return a / b; }
  static VAE_FAST_INLINE V sqrt(V a) {
#if VAE_FAST_VECTOR_BYTES == 64
    return (V)_mm512_sqrt_ps((__m512)a);
#elif VAE_FAST_VECTOR_BYTES == 32
    return (V)_mm256_sqrt_ps((__m256)a);
#elif defined(__SSE2__)
    return (V)_mm_sqrt_ps((__m128)a);
#else
    V out;
    for (int i = 0; i < cpu::VAE_FAST_CAPABILITY::kLanes; ++i) out[i] = ::sqrtf(a[i]);
    return out;
#endif
  }

  // For a >= 2^-126: an estimate of 12 bits or more and a step of Newton's; error 3e-7. A root and a division would
  // take as long as a tenth of the training step.
  static VAE_FAST_INLINE V inverse_sqrt(V a) {
#if VAE_FAST_VECTOR_BYTES == 64
    const V y = (V)_mm512_rsqrt14_ps((__m512)a);
#elif VAE_FAST_VECTOR_BYTES == 32
    const V y = (V)_mm256_rsqrt_ps((__m256)a);
#elif defined(__SSE2__)
    const V y = (V)_mm_rsqrt_ps((__m128)a);
#else
    const V y = constant<V>(1.0) / sqrt(a);
#endif
    return y + constant<V>(0.5) * y * (constant<V>(1.0) - a * y * y);
  }

  // These keep NaN, as the instructions do for their second operand: it then passes through the polynomial whatever
  // its power is.
  static VAE_FAST_INLINE V at_least(V a, float low) {
#if VAE_FAST_VECTOR_BYTES == 64
    return (V)_mm512_max_ps(_mm512_set1_ps(low), (__m512)a);
#elif VAE_FAST_VECTOR_BYTES == 32
    return (V)_mm256_max_ps(_mm256_set1_ps(low), (__m256)a);
#elif defined(__SSE2__)
    return (V)_mm_max_ps(_mm_set1_ps(low), (__m128)a);
#else
    return a < low ? V{} + low : a;
#endif
  }
  static VAE_FAST_INLINE V at_most(V a, float high) { return -at_least(-a, -high); }

  // q 2^n as (q 2^-bias) 2^(n + bias): 2^n itself may be out of range where the result, a denormal perhaps, is not. The
  // first product is exact.
  static VAE_FAST_INLINE V exp(V a) {
    a = at_most(at_least(a, -104.0f), 89.0f);
    ReducedExponent<V> x(a, a < V{} ? constant<V>(64.0) : constant<V>(-64.0));
    V scale = a < V{} ? constant<V>(0x1p-64) : constant<V>(0x1p64);
    return fma(x.expm1(), scale, scale) * x.power;
  }
  static VAE_FAST_INLINE V exp_nonpositive(V a) {
    ReducedExponent<V> x(at_least(a, -104.0f), constant<V>(64.0));
    V scale = constant<V>(0x1p-64);
    return fma(x.expm1(), scale, scale) * x.power;
  }
  static VAE_FAST_INLINE V expm1(V a) { return expm1_by_exponent(a); }
  static VAE_FAST_INLINE V expm1_minus_identity(V a) { return expm1_minus_identity_by_exponent(a); }
  static VAE_FAST_INLINE V log1p_nonnegative(V t) { return log1p_by_exponent(t); }

  // the 64-bit product of every lane with m, even and odd lanes apart: high and low words
  static VAE_FAST_INLINE void mulhilo(Uint a, uint32_t m, Uint& hi, Uint& lo) {
#if VAE_FAST_VECTOR_BYTES == 64
    U64 even = (U64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi32((int)m));
    U64 odd = (U64)_mm512_mul_epu32((__m512i)((U64)a >> 32), _mm512_set1_epi32((int)m));
#elif VAE_FAST_VECTOR_BYTES == 32
    U64 even = (U64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32((int)m));
    U64 odd = (U64)_mm256_mul_epu32((__m256i)((U64)a >> 32), _mm256_set1_epi32((int)m));
#elif defined(__SSE2__)
    U64 even = (U64)_mm_mul_epu32((__m128i)a, _mm_set1_epi32((int)m));
    U64 odd = (U64)_mm_mul_epu32((__m128i)((U64)a >> 32), _mm_set1_epi32((int)m));
#else
    U64 even = ((U64)a & 0xFFFFFFFFull) * m;
    U64 odd = ((U64)a >> 32) * m;
#endif
    // (even >> 32 and odd, even and odd << 32), lane by lane
#if VAE_FAST_VECTOR_BYTES == 64
    hi = (Uint)_mm512_mask_blend_epi32(0xAAAA, (__m512i)(even >> 32), (__m512i)odd);
    lo = (Uint)_mm512_mask_blend_epi32(0xAAAA, (__m512i)even, (__m512i)(odd << 32));
#elif VAE_FAST_VECTOR_BYTES == 32
    hi = (Uint)_mm256_blend_epi32((__m256i)(even >> 32), (__m256i)odd, 0xAA);
    lo = (Uint)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xAA);
#else
    hi = (Uint)((even >> 32) | (odd & 0xFFFFFFFF00000000ull));
    lo = (Uint)((even & 0xFFFFFFFFull) | (odd << 32));
#endif
  }
};

namespace cpu {
namespace VAE_FAST_CAPABILITY {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

VAE_FAST_INLINE VF to_floats(const float* p) {
  VF v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

VAE_FAST_INLINE VF to_floats(const uint8_t* p) {
  VU8 v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(__builtin_convertvector(v, VI), VF);
}

VAE_FAST_INLINE VF to_floats(const BF16* p) {
  VU16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return (VF)(__builtin_convertvector(v, VU) << 16);
}

VAE_FAST_INLINE VF to_floats(const F16* p) {
  VU16 v;
  __builtin_memcpy(&v, p, sizeof v);
#if VAE_FAST_VECTOR_BYTES == 64
  return (VF)_mm512_cvtph_ps((__m256i)v);
#elif VAE_FAST_VECTOR_BYTES == 32
  return (VF)_mm256_cvtph_ps((__m128i)v);
#else
  VU h = __builtin_convertvector(v, VU);
  VU sign = (h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
  // Exponent and fraction moved into place, then scaled by 2^112: also right for denormals. inf and NaN apart.
  VU finite = (VU)((VF)(magnitude << 13) * 5.192296858534828e33f);
  VU special = (magnitude << 13) | 0x7F800000u;
  return (VF)((magnitude >= 0x7C00u ? special : finite) | sign);
#endif
}

VAE_FAST_INLINE void from_floats(float* p, VF v) { __builtin_memcpy(p, &v, sizeof v); }

VAE_FAST_INLINE void from_floats(BF16* p, VF v) {
  VU u = (VU)v;
  VU rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
  VU nan = (u >> 16) | 0x40u;
  VU16 out = __builtin_convertvector(v != v ? nan : rounded, VU16);
  __builtin_memcpy(p, &out, sizeof out);
}

VAE_FAST_INLINE void from_floats(F16* p, VF v) {
#if VAE_FAST_VECTOR_BYTES == 64
  VU16 out = (VU16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif VAE_FAST_VECTOR_BYTES == 32
  VU16 out = (VU16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  VU u = (VU)v, sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  VU normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 1/2 leaves the denormal, rounded to nearest even, in the low bits.
  VU denormal = (VU)((VF)magnitude + 0.5f) - 0x3F000000u;
  VU finite = magnitude < 0x38800000u ? denormal : normal;
  VU special = magnitude > 0x7F800000u ? VU{} + 0x7E00u : VU{} + 0x7C00u;
  VU16 out = __builtin_convertvector((magnitude >= 0x477FF000u ? special : finite) | sign, VU16);
#endif
  __builtin_memcpy(p, &out, sizeof out);
}

// Within every quarter of four lanes, rows[i][k] <-> rows[k][i].
VAE_FAST_INLINE void transpose_quarters(VF rows[4]) {
#if VAE_FAST_VECTOR_BYTES == 64
#define VAE_FAST_UNPACK(half, type, a, b) (VF) _mm512_unpack##half##_##type(a, b)
  typedef __m512 F;
  typedef __m512d D;
#elif VAE_FAST_VECTOR_BYTES == 32
#define VAE_FAST_UNPACK(half, type, a, b) (VF) _mm256_unpack##half##_##type(a, b)
  typedef __m256 F;
  typedef __m256d D;
#elif defined(__SSE2__)
#define VAE_FAST_UNPACK(half, type, a, b) (VF) _mm_unpack##half##_##type(a, b)
  typedef __m128 F;
  typedef __m128d D;
#endif
#ifdef VAE_FAST_UNPACK
  VF a = VAE_FAST_UNPACK(lo, ps, (F)rows[0], (F)rows[1]), b = VAE_FAST_UNPACK(hi, ps, (F)rows[0], (F)rows[1]);
  VF c = VAE_FAST_UNPACK(lo, ps, (F)rows[2], (F)rows[3]), d = VAE_FAST_UNPACK(hi, ps, (F)rows[2], (F)rows[3]);
  rows[0] = VAE_FAST_UNPACK(lo, pd, (D)a, (D)c), rows[1] = VAE_FAST_UNPACK(hi, pd, (D)a, (D)c);
  rows[2] = VAE_FAST_UNPACK(lo, pd, (D)b, (D)d), rows[3] = VAE_FAST_UNPACK(hi, pd, (D)b, (D)d);
#undef VAE_FAST_UNPACK
#else
  const VF in[4] = {rows[0], rows[1], rows[2], rows[3]};
  for (int q = 0; q < kLanes; q += 4)
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 4; ++k) rows[i][q + k] = in[k][q + i];
#endif
}

// Arithmetic on elements of type T happens in Compute<T>: double for double, a vector of floats otherwise.
template <class T>
struct ComputeOf {
  using Vector = VF;
  using Scalar = float;
  static constexpr int lanes = kLanes;
};
template <>
struct ComputeOf<double> {
  using Vector = double;
  using Scalar = double;
  static constexpr int lanes = 1;
};
template <class T>
using Vector = typename ComputeOf<T>::Vector;
template <class T>
using Scalar = typename ComputeOf<T>::Scalar;

// The first n <= lanes elements at p, the rest zero.
template <class V>
struct Memory;

// A pointer to elements of 0 and 1 that are packed eight to a byte, the first in the lowest bit.
struct Bits {
  const uint8_t* bytes;
  int64_t index;
  VAE_FAST_INLINE Bits operator+(int64_t i) const { return {bytes, index + i}; }
};

#if VAE_FAST_VECTOR_BYTES == 64 && !defined(VAE_FAST_EMULATE_AVX512)
#define VAE_FAST_MASKS
VAE_FAST_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
#endif

template <>
struct Memory<VF> {
  static constexpr int lanes = kLanes;
  template <class T>
  static VAE_FAST_INLINE VF load(const T* p, int64_t n) {
    if (n >= kLanes) return to_floats(p);
#ifdef VAE_FAST_MASKS
    if constexpr (std::is_same_v<T, float>) return (VF)_mm512_maskz_loadu_ps(first_lanes(n), p);
#endif
    T part[kLanes] = {};
    __builtin_memcpy(part, p, sizeof(T) * static_cast<size_t>(n));
    return to_floats(part);
  }
  static VAE_FAST_INLINE VF load(Bits p, int64_t n) {
    const uint8_t* byte = p.bytes + (p.index >> 3);
    const int64_t skip = p.index & 7, last = skip + (n < kLanes ? n : kLanes) - 1;  // bits from `byte` on
    uint32_t word = byte[0];
    for (int64_t i = 1; i <= last >> 3; ++i) word |= static_cast<uint32_t>(byte[i]) << (8 * i);
    VU lane_bit;
    for (int i = 0; i < kLanes; ++i) lane_bit[i] = 1u << i;
    // A lane beyond n holds 0 or 1, which is as good as 0 there: nobody reads it.
    return (VF)((VU)(((VU{} + (word >> skip)) & lane_bit) != VU{}) & 0x3F800000u);  // the bits of 1.0f
  }
  template <class T>
  static VAE_FAST_INLINE void store(T* p, VF v, int64_t n) {
    if (n >= kLanes) return from_floats(p, v);
#ifdef VAE_FAST_MASKS
    if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v);
#endif
    T part[kLanes];
    from_floats(part, v);
    __builtin_memcpy(p, part, sizeof(T) * static_cast<size_t>(n));
  }
  template <class T>
  static VAE_FAST_INLINE VF broadcast(const T* p) {
    return VF{} + load(p, 1)[0];
  }
  // v in the first n lanes, zero in the rest
  static VAE_FAST_INLINE VF keep(VF v, int64_t n) {
    if (n >= kLanes) return v;
#ifdef VAE_FAST_MASKS
    return (VF)_mm512_maskz_mov_ps(first_lanes(n), (__m512)v);
#endif
    VF out = {};
    for (int i = 0; i < static_cast<int>(n); ++i) out[i] = v[i];
    return out;
  }
  static VAE_FAST_INLINE double sum(VF v) {
    double part[4] = {};  // an addition does not wait for the one before it
    for (int i = 0; i < kLanes; ++i) part[i % 4] += v[i];
    return (part[0] + part[1]) + (part[2] + part[3]);
  }
};

template <>
struct Memory<double> {
  static constexpr int lanes = 1;
  template <class T>
  static VAE_FAST_INLINE double load(const T* p, int64_t) {
    return static_cast<double>(*p);
  }
  static VAE_FAST_INLINE double load(Bits p, int64_t) { return p.bytes[p.index >> 3] >> (p.index & 7) & 1; }
  static VAE_FAST_INLINE double broadcast(const double* p) { return *p; }
  static VAE_FAST_INLINE void store(double* p, double v, int64_t) { *p = v; }
  static VAE_FAST_INLINE double keep(double v, int64_t) { return v; }
  static VAE_FAST_INLINE double sum(double v) { return v; }
};

}  // namespace VAE_FAST_CAPABILITY
}  // namespace cpu
}  // namespace vae_fast
