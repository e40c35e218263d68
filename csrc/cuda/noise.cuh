// eps for a chunk: the normals of math/philox.h of some neighbouring elements.
#pragma once

#include "../math/philox.h"
#include "vec.cuh"

namespace vae_fast {
namespace cuda {

// eps[j] = eps(seed, first + j) for j < n <= N; the rest is of no meaning. With kVector `first` is a multiple of N, and
// where N is one of four no normal is made in vain; elsewhere the elements may begin within a counter and reach into
// one more.
template <bool kVector, int N, class R>
__device__ __forceinline__ void normals(int64_t seed, int64_t first, int n, R (&eps)[N]) {
  const int64_t counter = first >> 2;
  if constexpr (kVector && N % 4 == 0) {
#pragma unroll
    for (int k = 0; k < N; k += 4) philox_normal4(seed, counter | (k / 4), eps + k);  // without a carry
  } else {
    const int skip = static_cast<int>(first & 3);
    constexpr int kLanes = (N + 6) / 4 * 4;  // of every counter that N elements can touch
    R lanes[kLanes] = {};
#pragma unroll
    for (int k = 0; k < kLanes; k += 4) {
      if (k < skip + n) philox_normal4(seed, counter + k / 4, lanes + k);
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
