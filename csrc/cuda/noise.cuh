// eps for a chunk: the normals of math/philox.h of some neighbouring elements.
#pragma once

#include "../math/philox.h"
#include "vec.cuh"

namespace vae_fast {
namespace cuda {

// The four normals of a counter, to the last bits.
struct ExactNormals {
  template <class R>
  static __device__ __forceinline__ void make(int64_t seed, int64_t counter, R* eps) {
    philox_normal4(seed, counter, eps);
  }
};

// The same normals to a relative error of 1e-6, for what is rounded to half precision afterwards. The steps are those
// of math/philox.h, with shorter fits and the hardware's logarithm and root.
struct HalfPrecisionNormals {
  using M = Math<float>;

  static __device__ __forceinline__ void make(int64_t seed, int64_t counter, float* eps) {
    uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(static_cast<uint64_t>(counter) >> 32), 0, 0};
    philox4x32_10<float>(&c, static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32));
    box_muller(c[0], c[1], eps[0], eps[1]);
    box_muller(c[2], c[3], eps[2], eps[3]);
  }

  static __device__ __forceinline__ void box_muller(uint32_t w_radius, uint32_t w_angle, float& first, float& second) {
    // -2 ln u, where u < 3/4 by the logarithm of u, elsewhere by that of one minus the complement
    const float far = log2(M::fma(M::from_uint(w_radius), 0x1p-32f, 0x1p-33f)) * -1.38629436f;
    const float c = M::fma(M::from_int(static_cast<int32_t>(~w_radius)), 0x1p-32f, 0x1p-33f);
    float near = M::fma(c, 0.7129001956f, 0.4225123445f);
    near = M::fma(near, c, 0.6740375904f);
    near = M::fma(near, c, 0.9997605751f);
    near = M::fma(near, c, 2.0000011946f);
    const float radius = root(w_radius < 0xC0000000u ? far : near * c);
    const uint32_t turned = w_angle + 0x20000000u;
    const float rest = M::from_int(static_cast<int32_t>(w_angle << 2)) * 0x1p-32f;
    const float y = rest * rest;
    float s = M::fma(y, -0.0046212053f, 0.0796872247f);
    s = M::fma(s, y, -0.6459640891f);
    s = M::fma(s, y, 1.5707963268f) * rest;
    float c_rest = M::fma(y, -0.0203970188f, 0.2535943819f);
    c_rest = M::fma(c_rest, y, -1.2336966199f);
    c_rest = M::fma(c_rest, y, 1.0f);
    const bool swapped = turned & 0x40000000u;
    const float cosine = swapped ? s : c_rest, sine = swapped ? c_rest : s;
    first = radius * M::from_bits(M::bits(cosine) ^ ((turned + 0x40000000u) & 0x80000000u));
    second = radius * M::from_bits(M::bits(sine) ^ (turned & 0x80000000u));
  }

 private:
  static __device__ __forceinline__ float log2(float a) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
    return result;
#else
    return ::log2f(a);
#endif
  }
  static __device__ __forceinline__ float root(float a) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
    return result;
#else
    return ::sqrtf(a);
#endif
  }
};

// eps[j] = eps(seed, first + j) for j < n <= N; the rest is of no meaning. With kVector `first` is a multiple of N, and
// where N is one of four no normal is made in vain; elsewhere the elements may begin within a counter and reach into
// one more.
template <bool kVector, class Normals, int N, class R>
__device__ __forceinline__ void normals(int64_t seed, int64_t first, int n, R (&eps)[N]) {
  const int64_t counter = first >> 2;
  if constexpr (kVector && N % 4 == 0) {
#pragma unroll
    for (int k = 0; k < N; k += 4) Normals::make(seed, counter | (k / 4), eps + k);  // without a carry
  } else {
    const int skip = static_cast<int>(first & 3);
    constexpr int kLanes = (N + 6) / 4 * 4;  // of every counter that N elements can touch
    R lanes[kLanes] = {};
#pragma unroll
    for (int k = 0; k < kLanes; k += 4) {
      if (k < skip + n) Normals::make(seed, counter + k / 4, lanes + k);
    }
    // Not lanes[skip + j]: a register array takes constant indices only.
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const R low = skip & 1 ? lanes[j + 1] : lanes[j];
      const R high = skip & 1 ? lanes[j + 3] : lanes[j + 2];
      eps[j] = skip & 2 ? high : low;
    }
  }
}

}  // namespace cuda
}  // namespace vae_fast
