// The words that binarise data: a pure function of (seed, element index), as vae_fast/batches.py states it. Finaliser
// of splitmix64: Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
#pragma once

#include "math.h"

namespace vae_fast {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;  // 2^64 over the golden ratio, odd

// The seed of noise number `stream` > 0 in a step whose noise has `seed` (vae_fast/algorithms/common.py)
VAE_FAST_INLINE int64_t substream(int64_t seed, uint64_t stream) {
  return static_cast<int64_t>(static_cast<uint64_t>(seed) ^ (stream * kGolden));
}

// high32(splitmix64(seed + (i + 1) golden))
VAE_FAST_INLINE uint32_t uniform_word(int64_t seed, int64_t i) {
  uint64_t x = static_cast<uint64_t>(seed) + static_cast<uint64_t>(i + 1) * kGolden;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return static_cast<uint32_t>((x ^ (x >> 31)) >> 32);
}

// Of Bernoulli(probability), by word i of the seed
VAE_FAST_INLINE float bernoulli_draw(int64_t seed, int64_t i, float probability) {
  return static_cast<double>(uniform_word(seed, i)) < static_cast<double>(probability) * 0x1p32 ? 1.0f : 0.0f;
}

}  // namespace vae_fast
