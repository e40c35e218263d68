// Matrix products of the training step, on tiles of kTileRows x kPanel elements that stay in registers. Included by
// the file of each instruction set, after kernels.inl.
//
// Weights live in panels: kPanel outputs side by side, one row of them for every input, so that a tile reads them in
// order. All other operands are row-major with a leading dimension, and are read where they lie.
#pragma once

#include "training.h"

namespace vae_fast {
namespace cpu {
namespace VAE_FAST_CAPABILITY {
namespace {

// Registers: kTileRows x 2 sums, two vectors of the panel and one element of the other operand.
#if VAE_FAST_VECTOR_BYTES == 64
constexpr int kTileRows = 10;
#elif VAE_FAST_VECTOR_BYTES == 32
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kPanel = 2 * kLanes;
constexpr int64_t kTermsAtOnce = 256;  // of a sum, before they are added to the rest: its error grows with so many

VAE_FAST_INLINE int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

// A sum of `depth` terms in equal parts of at most `most`: body(first, count), each but the last a multiple of `unit`.
template <class Body>
VAE_FAST_INLINE void in_parts(int64_t depth, int64_t most, int64_t unit, Body body) {
  const int64_t parts = depth <= most ? 1 : (depth + most - 1) / most;
  const int64_t size = round_up((depth + parts - 1) / parts, unit);
  for (int64_t k = 0; k < depth; k += size) body(k, min(size, depth - k));
}

// Every lane the same. (VF{} + a is an addition, which -0 must be let through.)
VAE_FAST_INLINE VF in_every_lane(float a) {
#if VAE_FAST_VECTOR_BYTES == 64
  return (VF)_mm512_set1_ps(a);
#elif VAE_FAST_VECTOR_BYTES == 32
  return (VF)_mm256_set1_ps(a);
#else
  return VF{a, a, a, a};
#endif
}

struct Tile {
  VF sum[kTileRows][2];
  VAE_FAST_INLINE void zero() {
    for (auto& row : sum) row[0] = row[1] = VF{};
  }
  VAE_FAST_INLINE void load(const float* from, int64_t ld) {
    for (int i = 0; i < kTileRows; ++i)
      for (int j = 0; j < 2; ++j) sum[i][j] = to_floats(from + i * ld + j * kLanes);
  }
  VAE_FAST_INLINE void store(float* to, int64_t ld) const {
    for (int i = 0; i < kTileRows; ++i)
      for (int j = 0; j < 2; ++j) from_floats(to + i * ld + j * kLanes, sum[i][j]);
  }
};

// The terms of a sum one after another, or those that a list names, less `base`
struct EveryTerm {
  VAE_FAST_INLINE int64_t operator()(int64_t k) const { return k; }
};
struct ListedTerms {
  const int32_t* terms;
  int64_t base;
  VAE_FAST_INLINE int64_t operator()(int64_t k) const { return terms[k] - base; }
};

// tile[i, :] += sum_k a[i, k] b[k, :] over `count` terms k. Of a, either the rows i lie side by side (kAcross) and k
// strides by ld_a, or the other way round.
template <bool kAcross, class Terms>
VAE_FAST_INLINE void multiply(Tile& tile, const float* a, int64_t ld_a, const float* b, int64_t count, Terms terms) {
  for (int64_t begin = 0; begin < count; begin += kTermsAtOnce) {
    VF sum[kTileRows][2];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) sum[i][0] = sum[i][1] = VF{};
    const int64_t end = min(begin + kTermsAtOnce, count);
#pragma GCC unroll 2
    for (int64_t term = begin; term < end; ++term) {
      const int64_t k = terms(term);
      const VF b0 = to_floats(b + k * kPanel), b1 = to_floats(b + k * kPanel + kLanes);
      const float* column = a + (kAcross ? k * ld_a : k);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
        const VF left = in_every_lane(kAcross ? column[i] : column[i * ld_a]);
        sum[i][0] = Math<VF>::fma(left, b0, sum[i][0]);
        sum[i][1] = Math<VF>::fma(left, b1, sum[i][1]);
      }
    }
    // The tile stays in memory until here: kept in registers it would drive operands of the loop out of them, which
    // made an update 1.4 times as long.
    asm volatile("" : "+m"(tile));
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      tile.sum[i][0] = tile.sum[i][0] + sum[i][0];
      tile.sum[i][1] = tile.sum[i][1] + sum[i][1];
    }
  }
}

VAE_FAST_INLINE const int32_t* first_at_least(const int32_t* begin, const int32_t* end, int64_t value) {
  if (begin < end && end[-1] < value) return end;
  while (begin < end) {
    const int32_t* middle = begin + (end - begin) / 2;
    if (*middle < value)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// The same for k in [first, first + count), where a list, if there is one and it pays, names the terms that are not
// zero.
template <bool kAcross>
VAE_FAST_INLINE void multiply(Tile& tile, const float* a, int64_t ld_a, const float* b, int64_t first, int64_t count,
                              const TermList* list) {
  if (!list || !list->pays()) return multiply<kAcross>(tile, a, ld_a, b, count, EveryTerm{});
  const int32_t* const begin = first_at_least(list->terms, list->terms + list->count, first);
  const int32_t* const end = first_at_least(begin, list->terms + list->count, first + count);
  multiply<kAcross>(tile, a, ld_a, b, end - begin, ListedTerms{begin, first});
}

// The kLanes elements' cache lines at p and after, as many as `bytes` fill
VAE_FAST_INLINE void prefetch(const float* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + i);
}

}  // namespace
}  // namespace VAE_FAST_CAPABILITY
}  // namespace cpu
}  // namespace vae_fast
