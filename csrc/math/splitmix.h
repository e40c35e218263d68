// The words that binarise data: a pure function of (seed, element index), as vae_fast/batches.py states it. Finaliser
// of splitmix64: Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
#pragma once

#include "math.h"

namespace vae_fast {

// high32(splitmix64(seed + (i + 1) golden))
VAE_FAST_INLINE uint32_t uniform_word(int64_t seed, int64_t i) {
  uint64_t x = static_cast<uint64_t>(seed) + static_cast<uint64_t>(i + 1) * 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return static_cast<uint32_t>((x ^ (x >> 31)) >> 32);
}

}  // namespace vae_fast
