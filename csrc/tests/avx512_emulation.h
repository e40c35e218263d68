// What csrc/cpu uses of AVX-512, lane by lane, for processors that have AVX2 alone: with VAE_FAST_EMULATE_AVX512
// defined the AVX-512 build of the kernels (avx512.cpp) runs there, slowly, and its tests with it. Vectors of 64 bytes
// are the compiler's own, so this is all that is missing. Source: Intel 64 and IA-32 Architectures Software Developer's
// Manual, volume 2.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace vae_fast {
namespace avx512_emulation {

#define VAE_FAST_EMULATED __attribute__((always_inline)) static inline

VAE_FAST_EMULATED __m512 set1_ps(float a) {
  __m512 out;
  for (int i = 0; i < 16; ++i) out[i] = a;
  return out;
}
VAE_FAST_EMULATED __m512i set1_epi32(int a) {
  int32_t lanes[16];
  for (int32_t& lane : lanes) lane = a;
  __m512i out;
  std::memcpy(&out, lanes, sizeof out);
  return out;
}
VAE_FAST_EMULATED __m512 sqrt_ps(__m512 a) {
  for (int i = 0; i < 16; ++i) a[i] = std::sqrt(a[i]);
  return a;
}
// Its relative error is below 2^-14: here nearly that, always on one side.
VAE_FAST_EMULATED __m512 rsqrt14_ps(__m512 a) {
  for (int i = 0; i < 16; ++i) {
    const float exact = 1 / std::sqrt(a[i]);
    uint32_t bits;
    std::memcpy(&bits, &exact, sizeof bits);
    bits &= 0xFFFFFE00u;
    float lane;
    std::memcpy(&lane, &bits, sizeof lane);
    a[i] = lane;
  }
  return a;
}
// The second operand where either is not a number
VAE_FAST_EMULATED __m512 max_ps(__m512 a, __m512 b) {
  for (int i = 0; i < 16; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
  return a;
}
VAE_FAST_EMULATED __m512i mul_epu32(__m512i a, __m512i b) {
  for (int i = 0; i < 8; ++i)
    a[i] = static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(a[i])) * static_cast<uint32_t>(b[i]));
  return a;
}
VAE_FAST_EMULATED __m512i mask_blend_epi32(uint32_t mask, __m512i a, __m512i b) {
  int32_t of_a[16], of_b[16];
  std::memcpy(of_a, &a, sizeof of_a), std::memcpy(of_b, &b, sizeof of_b);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) of_a[i] = of_b[i];
  std::memcpy(&a, of_a, sizeof a);
  return a;
}
VAE_FAST_EMULATED __m512 cvtph_ps(__m256i a) {
  __m128i halves[2];
  std::memcpy(halves, &a, sizeof a);
  const __m256 out[2] = {_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1])};
  __m512 joined;
  std::memcpy(&joined, out, sizeof joined);
  return joined;
}
VAE_FAST_EMULATED __m256i cvtps_ph_to_nearest(__m512 a) {
  __m256 halves[2];
  std::memcpy(halves, &a, sizeof a);
  const __m128i out[2] = {_mm256_cvtps_ph(halves[0], _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(halves[1], _MM_FROUND_TO_NEAREST_INT)};
  __m256i joined;
  std::memcpy(&joined, out, sizeof joined);
  return joined;
}
// Within every 16 bytes: elements first, first + 1, ... of a and b in turn
VAE_FAST_EMULATED __m512 unpack_ps(__m512 a, __m512 b, int first) {
  __m512 out;
  for (int quarter = 0; quarter < 16; quarter += 4) {
    for (int i = 0; i < 2; ++i) {
      out[quarter + 2 * i] = a[quarter + first + i];
      out[quarter + 2 * i + 1] = b[quarter + first + i];
    }
  }
  return out;
}
VAE_FAST_EMULATED __m512d unpack_pd(__m512d a, __m512d b, int first) {
  __m512d out;
  for (int quarter = 0; quarter < 8; quarter += 2) {
    out[quarter] = a[quarter + first];
    out[quarter + 1] = b[quarter + first];
  }
  return out;
}

#undef VAE_FAST_EMULATED

}  // namespace avx512_emulation
}  // namespace vae_fast

#define _mm512_set1_ps vae_fast::avx512_emulation::set1_ps
#define _mm512_set1_epi32 vae_fast::avx512_emulation::set1_epi32
#define _mm512_sqrt_ps vae_fast::avx512_emulation::sqrt_ps
#define _mm512_rsqrt14_ps vae_fast::avx512_emulation::rsqrt14_ps
#define _mm512_max_ps vae_fast::avx512_emulation::max_ps
#define _mm512_mul_epu32 vae_fast::avx512_emulation::mul_epu32
#define _mm512_mask_blend_epi32 vae_fast::avx512_emulation::mask_blend_epi32
#define _mm512_cvtph_ps vae_fast::avx512_emulation::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, rounding) vae_fast::avx512_emulation::cvtps_ph_to_nearest(a)
#define _mm512_unpacklo_ps(a, b) vae_fast::avx512_emulation::unpack_ps(a, b, 0)
#define _mm512_unpackhi_ps(a, b) vae_fast::avx512_emulation::unpack_ps(a, b, 2)
#define _mm512_unpacklo_pd(a, b) vae_fast::avx512_emulation::unpack_pd(a, b, 0)
#define _mm512_unpackhi_pd(a, b) vae_fast::avx512_emulation::unpack_pd(a, b, 1)
