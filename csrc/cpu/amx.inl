// The tiles of matmul.inl from a matrix unit (AMX: TILE, BF16), for operands that are bfloat16 numbers already: `fast`.
// Included by the file of AVX-512, after matmul.inl.
//
// A product of 32 x 32 elements takes four accumulators of 16 x 16; each instruction adds 32 terms. Operands are packed
// into blocks of 32 terms, which have the shape that the instruction reads:
//   left    [32 rows][16 pairs of terms]       a pair is two bfloat16 in 32 bits, the first below
//   right   [2 halves][16 pairs][16 columns]
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and volume 2: TDPBF16PS.
#pragma once

#include "matmul.inl"

#ifdef VAE_FAST_EMULATE_AVX512
#include "../tests/amx_emulation.h"
#endif

namespace vae_fast {
namespace cpu {
namespace VAE_FAST_CAPABILITY {
namespace {

constexpr int64_t kAmxRows = 32, kAmxTerms = 32, kAmxBlock = kAmxRows * kAmxTerms / 2;  // of 32 bits
static_assert(kPanel == 32);

constexpr int64_t kAmxTiles = (kRowBlock + kAmxRows - 1) / kAmxRows;  // of rows, in a block of them

VAE_FAST_INLINE int64_t amx_blocks(int64_t terms) { return (terms + kAmxTerms - 1) / kAmxTerms; }

// Eight tiles of 16 rows of 64 bytes, for this thread, as long as this lives
struct AmxTiles {
  AmxTiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof config == 64);
    asm volatile("" ::: "memory");  // the compiler takes 8 bytes of it for all that is read
    _tile_loadconfig(&config);
    asm volatile("" ::: "memory");
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

// c[32][kPanel] = (or, unless `first`, +=) left right over so many blocks of terms
VAE_FAST_INLINE void amx_multiply(const uint32_t* left, const uint32_t* right, int64_t blocks, float* c, bool first) {
  constexpr int64_t kStride = kPanel * sizeof(float);
  float *beside = c + 16, *below = c + 16 * kPanel, *across = below + 16;
  asm volatile("" ::: "memory");  // the compiler does not know that a tile is read from memory, or written to it
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, kStride);
    _tile_loadd(1, beside, kStride);
    _tile_loadd(2, below, kStride);
    _tile_loadd(3, across, kStride);
  }
  for (int64_t i = 0; i < blocks; ++i, left += kAmxBlock, right += kAmxBlock) {
    _tile_loadd(4, left, 64);
    _tile_loadd(5, left + kAmxBlock / 2, 64);
    _tile_loadd(6, right, 64);
    _tile_loadd(7, right + kAmxBlock / 2, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, kStride);
  _tile_stored(1, beside, kStride);
  _tile_stored(2, below, kStride);
  _tile_stored(3, across, kStride);
  asm volatile("" ::: "memory");
}

// --- packing: of floats that are bfloat16 numbers the upper halves ---------------------------------------------------

VAE_FAST_INLINE VU pair_of(VF first, VF second) { return ((VU)first >> 16) | ((VU)second & 0xFFFF0000u); }

// Terms side by side: block i has terms 32 i to 32 i + 31 of 32 rows, of which `rows` are there. Of the terms those
// that fill up a block are read and must be finite.
VAE_FAST_INLINE void pack_left(const float* from, int64_t ld, int64_t rows, int64_t blocks, uint32_t* to) {
  typedef uint32_t Half __attribute__((vector_size(32)));
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < kAmxRows; ++i, to += kAmxTerms / 2) {
      if (i >= rows) {
        __builtin_memset(to, 0, 64);
        continue;
      }
      for (int half = 0; half < 2; ++half) {
        VU64 two;
        __builtin_memcpy(&two, from + i * ld + block * kAmxTerms + half * kLanes, sizeof two);
        const Half pairs = __builtin_convertvector((two >> 32 & 0xFFFF0000u) | (two & 0xFFFFFFFFu) >> 16, Half);
        __builtin_memcpy(to + half * 8, &pairs, sizeof pairs);
      }
    }
  }
}

// Terms below each other: block i has rows 32 i to 32 i + 31 of kPanel columns, of which `terms` rows are there.
VAE_FAST_INLINE void pack_right(const float* from, int64_t ld, int64_t terms, uint32_t* to) {
  for (int64_t block = 0; block < amx_blocks(terms); ++block, to += kAmxBlock) {
    for (int64_t pair = 0; pair < kAmxTerms / 2; ++pair) {
      const int64_t term = block * kAmxTerms + 2 * pair;
      for (int half = 0; half < 2; ++half) {
        const float* first = from + term * ld + half * kLanes;
        const VU both =
            pair_of(term < terms ? to_floats(first) : VF{}, term + 1 < terms ? to_floats(first + ld) : VF{});
        __builtin_memcpy(to + half * kAmxBlock / 2 + pair * 16, &both, sizeof both);
      }
    }
  }
}

// Between left and right, in place: each 16 x 16 pairs of a block transposed
VAE_FAST_INLINE void turn(uint32_t* blocks, int64_t count) {
  for (uint32_t* square = blocks; square < blocks + count * kAmxBlock; square += kAmxBlock / 2) {
    alignas(64) float turned[16 * 16];
    for (int down = 0; down < 16; down += 4)
      for (int across = 0; across < 16; across += 4)
        transpose4<16, 16>(reinterpret_cast<const float*>(square) + across * 16 + down, turned + down * 16 + across);
    __builtin_memcpy(square, turned, sizeof turned);
  }
}

// Memory of a thread, kept from step to step
struct AmxMemory {
  std::vector<uint32_t> memory;
  uint32_t* at_least(int64_t blocks) {
    const size_t count = static_cast<size_t>(blocks * kAmxBlock + 16);
    if (memory.size() < count) memory.resize(count);
    const auto place = reinterpret_cast<uintptr_t>(memory.data());
    return reinterpret_cast<uint32_t*>((place + 63) / 64 * 64);
  }
};
thread_local AmxMemory amx_left, amx_right;

// --- tiles of the three products of a layer --------------------------------------------------------------------------

struct AmxForward {
  using Tile = TileOf<kAmxRows>;
  static constexpr int64_t kDepth = INT64_MAX;
  const Forward& a;
  const int64_t blocks;
  int64_t first = -1;
  uint32_t *left, *right;
  AmxTiles tiles;

  explicit AmxForward(const Forward& part) : a(part), blocks(amx_blocks(part.inputs)) {
    left = amx_left.at_least(kAmxTiles * blocks);
    right = amx_right.at_least(blocks);
  }
  void begin(int64_t first_row, int64_t last_row, int64_t p) {
    if (first_row != first) {
      first = first_row;
      for (int64_t row = first; row < last_row; row += kAmxRows)
        pack_left(at(a.in, row, 0), a.in.ld, min(kAmxRows, last_row - row), blocks, left_of(row));
    }
    pack_right(a.weight + p * round_up(a.inputs, kPanel) * kPanel, kPanel, a.inputs, right);
  }
  uint32_t* left_of(int64_t row) const { return left + (row - first) / kAmxRows * blocks * kAmxBlock; }
  void multiply(Tile& tile, int64_t row, int64_t, int64_t) {
    amx_multiply(left_of(row), right, blocks, reinterpret_cast<float*>(tile.sum), true);
  }
};

// What it multiplies is W grad_out^T, so that the large operand is packed as it lies.
struct AmxInputGradient {
  using Tile = TileOf<kAmxRows>;
  static constexpr int64_t kDepth = INT64_MAX;
  const InputGradient& a;
  int64_t first = -1;
  uint32_t *left, *right;
  AmxTiles tiles;

  explicit AmxInputGradient(const InputGradient& part) : a(part) {
    left = amx_left.at_least(a.panels);
    right = amx_right.at_least(kAmxTiles * a.panels);
  }
  void begin(int64_t first_row, int64_t last_row, int64_t first_input) {
    if (first_row != first) {
      first = first_row;
      for (int64_t row = first; row < last_row; row += kAmxRows) {
        pack_left(at(a.grad_out, row, 0), a.grad_out.ld, min(kAmxRows, last_row - row), a.panels, right_of(row));
        turn(right_of(row), a.panels);
      }
    }
    const int64_t panel_rows = round_up(a.inputs, kPanel);
    for (int64_t p = 0; p < a.panels; ++p)
      pack_left(a.weight + (p * panel_rows + first_input) * kPanel, kPanel, kAmxRows, 1, left + p * kAmxBlock);
  }
  void take_outputs(int64_t, int64_t) {}
  uint32_t* right_of(int64_t row) const { return right + (row - first) / kAmxRows * a.panels * kAmxBlock; }
  void multiply(Tile& tile, int64_t row, int64_t, int64_t) {
    alignas(64) float turned[kAmxRows * kPanel];
    amx_multiply(left, right_of(row), a.panels, turned, true);
    for (int down = 0; down < kPanel; down += 4)
      for (int across = 0; across < kPanel; across += 4)
        transpose4<kPanel, kPanel>(turned + across * kPanel + down,
                                   reinterpret_cast<float*>(tile.sum) + down * kPanel + across);
  }
};

struct AmxWeightGradient {
  using Tile = TileOf<kAmxRows>;
  const WeightGradient& a;
  int64_t blocks = 0;
  uint32_t *left = nullptr, *right = nullptr;
  AmxTiles tiles;

  explicit AmxWeightGradient(const WeightGradient& part) : a(part) {}
  void begin(int64_t row, int64_t depth) {
    blocks = amx_blocks(depth);
    left = amx_left.at_least(round_up(a.inputs, kAmxRows) / kAmxRows * blocks);
    right = amx_right.at_least(blocks);
    for (int64_t k = 0; k < a.inputs; k += kAmxRows) {
      pack_right(at(a.in, row, k), a.in.ld, depth, left_of(k));
      turn(left_of(k), blocks);
    }
  }
  void take_panel(const float* grad_out, int64_t depth) { pack_right(grad_out, kPanel, depth, right); }
  uint32_t* left_of(int64_t k) const { return left + k / kAmxRows * blocks * kAmxBlock; }
  void multiply(Tile& tile, int64_t k, int64_t, int64_t) {
    amx_multiply(left_of(k), right, blocks, reinterpret_cast<float*>(tile.sum), false);
  }
};

}  // namespace
}  // namespace VAE_FAST_CAPABILITY
}  // namespace cpu
}  // namespace vae_fast
