// The tiles of matmul.inl from a matrix unit: AMX's (TILE, BF16), or, for `fast`, AVX512_BF16's products of pairs.
// Included by the file of AVX-512, after matmul.inl.
//
// The unit multiplies bfloat16 numbers and adds in float. Operands of `fast` are such numbers already. A float of
// `exact` from 2^-103 to 3.39e38 is the sum of three, high + middle + low, of 8 significant bits each (below, less is
// left of it, above NaN); three of the nine products, none of which is more than 2^-24 of a b, are left out:
//   a b = high high + (high middle + middle high) + (high low + middle middle + low high)
//
// A product of 32 x 32 elements takes four accumulators of 16 x 16; each instruction adds 32 terms. Operands are packed
// into blocks of 32 terms, one for each part of the numbers, which have the shape that the instruction reads:
//   left    [32 rows][16 pairs of terms]       a pair is two bfloat16 in 32 bits, of terms 16 apart, the first below
//   right   [2 halves][16 pairs][16 columns]
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and volume 2: TDPBF16PS,
// VDPBF16PS.
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
constexpr int64_t kAmxHalf = kAmxBlock / 2;

constexpr int kFastParts = 1, kExactParts = 3;  // of a number
constexpr int64_t kAmxBlocksAtOnce = 16;        // of a sum, before they are added to the rest: as kTermsAtOnce

VAE_FAST_INLINE int64_t amx_blocks(int64_t terms) { return (terms + kAmxTerms - 1) / kAmxTerms; }

// Eight tiles of 16 rows of 64 bytes, for this thread, as long as this lives, where there is AMX
struct AmxTiles {
  const bool there = matrix_unit() == MatrixUnit::tiles;
  AmxTiles() {
    if (!there) return;
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
  ~AmxTiles() {
    if (there) _tile_release();
  }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

template <int kDown>
VAE_FAST_INLINE void load_left(const uint32_t* block) {
  _tile_loadd(4, block, 64);
  if constexpr (kDown == 2) _tile_loadd(5, block + kAmxHalf, 64);
}
template <int kAcross>
VAE_FAST_INLINE void load_right(const uint32_t* block) {
  _tile_loadd(6, block, 64);
  if constexpr (kAcross == 2) _tile_loadd(7, block + kAmxHalf, 64);
}
template <int kDown, int kAcross>
VAE_FAST_INLINE void multiply_loaded() {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kAcross == 2) _tile_dpbf16ps(1, 4, 7);
  if constexpr (kDown == 2) _tile_dpbf16ps(2, 5, 6);
  if constexpr (kDown == 2 && kAcross == 2) _tile_dpbf16ps(3, 5, 7);
}

// What amx_multiply_at_once does, in vectors. Rows at a time: their sums and the right operand fill the registers.
template <int kDown, int kAcross>
__attribute__((noinline)) void multiply_pairs(const uint32_t* left, const uint32_t* right, int64_t terms, float* c) {
  constexpr int kRows = 8;
  for (int64_t first = 0; first < 16 * kDown; first += kRows) {
    VF sum[kRows][kAcross] = {};
    for (int64_t block = 0; block < amx_blocks(terms); ++block) {
      const uint32_t* const from = left + block * kAmxBlock + first * 16;
      const uint32_t* const across = right + block * kAmxBlock;
      for (int64_t pair = 0; pair < min(16, terms - block * kAmxTerms); ++pair) {
        VU b[kAcross];
        for (int j = 0; j < kAcross; ++j) __builtin_memcpy(&b[j], across + j * kAmxHalf + pair * 16, sizeof b[j]);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const VU a = VU{} + from[i * 16 + pair];
#pragma GCC unroll 2
          for (int j = 0; j < kAcross; ++j)
            sum[i][j] = (VF)_mm512_dpbf16_ps((__m512)sum[i][j], (__m512bh)a, (__m512bh)b[j]);
        }
      }
    }
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kAcross; ++j) from_floats(c + (first + i) * kPanel + j * kLanes, sum[i][j]);
  }
}

// c[16 kDown][16 kAcross], in rows of kPanel, = left right over so many terms
template <int kParts, int kDown, int kAcross>
VAE_FAST_INLINE void amx_multiply_at_once(const uint32_t* left, const uint32_t* right, int64_t terms, float* c) {
  if constexpr (kParts == kFastParts) {
    if (matrix_unit() == MatrixUnit::pairs) return multiply_pairs<kDown, kAcross>(left, right, terms, c);
  }
  constexpr int64_t kStride = kPanel * sizeof(float);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  asm volatile("" ::: "memory");  // the compiler does not know that a tile is read from memory, or written to it
  constexpr int64_t kMiddle = kAmxBlock, kLow = 2 * kAmxBlock;
  const int64_t blocks = amx_blocks(terms);
  for (int64_t i = 0; i < blocks; ++i, left += kParts * kAmxBlock, right += kParts * kAmxBlock) {
    load_left<kDown>(left);
    if constexpr (kParts == kExactParts) {  // in an order where each product needs one new operand
      load_right<kAcross>(right + kLow);
      multiply_loaded<kDown, kAcross>();
      load_right<kAcross>(right + kMiddle);
      multiply_loaded<kDown, kAcross>();
      load_left<kDown>(left + kMiddle);
      multiply_loaded<kDown, kAcross>();
      load_right<kAcross>(right);
      multiply_loaded<kDown, kAcross>();
      load_left<kDown>(left + kLow);
      multiply_loaded<kDown, kAcross>();
      load_left<kDown>(left);
    } else {
      load_right<kAcross>(right);
    }
    multiply_loaded<kDown, kAcross>();
  }
  _tile_stored(0, c, kStride);
  if constexpr (kAcross == 2) _tile_stored(1, c + 16, kStride);
  if constexpr (kDown == 2) _tile_stored(2, c + 16 * kPanel, kStride);
  if constexpr (kDown == 2 && kAcross == 2) _tile_stored(3, c + 16 * kPanel + 16, kStride);
  asm volatile("" ::: "memory");
}

// The same, or, unless `first`, +=, of any number of terms. The rest of c[32][kPanel] stays as it is.
template <int kParts, int kDown = 2, int kAcross = 2>
void amx_multiply(const uint32_t* left, const uint32_t* right, int64_t terms, float* c, bool first) {
  constexpr int64_t kTerms = kAmxBlocksAtOnce * kAmxTerms;
  for (int64_t k = 0; k < terms; k += kTerms, first = false) {
    alignas(64) float some[kAmxRows * kPanel];
    const int64_t at = k / kAmxTerms * kParts * kAmxBlock;
    amx_multiply_at_once<kParts, kDown, kAcross>(left + at, right + at, min(kTerms, terms - k), first ? c : some);
    if (first) continue;
    for (int64_t row = 0; row < 16 * kDown; ++row)
      for (int64_t j = row * kPanel; j < row * kPanel + 16 * kAcross; j += kLanes)
        from_floats(c + j, to_floats(c + j) + to_floats(some + j));
  }
}

// --- packing ---------------------------------------------------------------------------------------------------------

// The bfloat16 numbers, in upper halves, that v is the sum of
template <int kParts>
struct Split {
  VF part[kParts];
  VAE_FAST_INLINE explicit Split(VF v) {
    if constexpr (kParts == kExactParts) {
      const auto nearest = [](VF a) { return (VF)(((VU)a + 0x8000u) & 0xFFFF0000u); };
      const VF high = nearest(v), rest = v - high, middle = nearest(rest);
      part[0] = high, part[1] = middle, part[2] = rest - middle;  // exact; NaN for NaN and infinity
    } else {
      part[0] = v;
    }
  }
};

// Pairs of `terms` and those 16 on, part by part, kAmxBlock from each other
template <int kParts>
VAE_FAST_INLINE void store_pairs(VF terms, VF terms_16_on, uint32_t* to) {
  const Split<kParts> first(terms), second(terms_16_on);
  for (int part = 0; part < kParts; ++part) {
    const VU pairs = ((VU)first.part[part] >> 16) | ((VU)second.part[part] & 0xFFFF0000u);
    __builtin_memcpy(to + part * kAmxBlock, &pairs, sizeof pairs);
  }
}

// Terms side by side: block i has terms 32 i to 32 i + 31 of 32 rows, of which `rows` are there. Of the terms those
// that fill up a block are read and must be finite.
template <int kParts>
VAE_FAST_INLINE void pack_left(const float* from, int64_t ld, int64_t rows, int64_t blocks, uint32_t* to) {
  for (int64_t block = 0; block < blocks; ++block, to += kParts * kAmxBlock) {
    for (int64_t i = 0; i < kAmxRows; ++i) {
      const float* terms = from + i * ld + block * kAmxTerms;
      store_pairs<kParts>(i < rows ? to_floats(terms) : VF{}, i < rows ? to_floats(terms + 16) : VF{}, to + i * 16);
    }
  }
}

// Terms below each other: block i has rows 32 i to 32 i + 31 of kPanel columns, of which `terms` rows are there.
template <int kParts>
VAE_FAST_INLINE void pack_right(const float* from, int64_t ld, int64_t terms, uint32_t* to) {
  const auto row = [&](int64_t term, int half) {
    return term < terms ? to_floats(from + term * ld + half * kLanes) : VF{};
  };
  for (int64_t block = 0; block < amx_blocks(terms); ++block, to += kParts * kAmxBlock)
    for (int64_t pair = 0, term = block * kAmxTerms; pair < 16; ++pair, ++term)
      for (int half = 0; half < 2; ++half)
        store_pairs<kParts>(row(term, half), row(term + 16, half), to + half * kAmxHalf + pair * 16);
}

// Between left and right, in place: each 16 x 16 pairs of a block transposed
VAE_FAST_INLINE void turn(uint32_t* blocks, int64_t count) {
  for (int64_t i = 0; i < 2 * count; ++i) {
    float* const square = reinterpret_cast<float*>(blocks + i * kAmxHalf);
    transpose(square, 16, square, 16);
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

template <int kParts>
struct AmxForward {
  using Tile = TileOf<kAmxRows>;
  static constexpr int64_t kDepth = INT64_MAX;
  const Forward& a;
  const int64_t blocks;
  int64_t first = -1, last = 0;
  uint32_t *left, *right;
  AmxTiles tiles;

  explicit AmxForward(const Forward& part) : a(part), blocks(amx_blocks(part.inputs)) {
    left = amx_left.at_least(kAmxTiles * blocks * kParts);
    right = amx_right.at_least(blocks * kParts);
  }
  void begin(const TileLine::Piece& piece) {
    if (piece.first != first) {
      first = piece.first, last = piece.last;
      for (int64_t row = first; row < last; row += kAmxRows)
        pack_left<kParts>(at(a.in, row, 0), a.in.ld, min(kAmxRows, last - row), blocks, left_of(row));
    }
    pack_right<kParts>(a.weight + piece.panel * round_up(a.inputs, kPanel) * kPanel, kPanel, a.inputs, right);
  }
  uint32_t* left_of(int64_t row) const { return left + (row - first) / kAmxRows * blocks * kParts * kAmxBlock; }
  void multiply(Tile& tile, int64_t row, int64_t, int64_t) {
    float* const c = reinterpret_cast<float*>(tile.sum);
    if (rows_of<Tile>(row, last) > kAmxRows / 2)
      amx_multiply<kParts>(left_of(row), right, a.inputs, c, true);
    else
      amx_multiply<kParts, 1>(left_of(row), right, a.inputs, c, true);
  }
};

// What it multiplies is W grad_out^T, so that the large operand is packed as it lies.
template <int kParts>
struct AmxInputGradient {
  using Tile = TileOf<kAmxRows>;
  static constexpr int64_t kDepth = INT64_MAX;
  const InputGradient& a;
  const int64_t panels;
  int64_t first = -1, last = 0;
  uint32_t *left, *right;
  AmxTiles tiles;

  explicit AmxInputGradient(const InputGradient& part) : a(part), panels(round_up(part.outputs, kPanel) / kPanel) {
    left = amx_left.at_least(panels * kParts);
    right = amx_right.at_least(kAmxTiles * panels * kParts);
  }
  void begin(const TileLine::Piece& piece) {
    if (piece.first != first) {
      first = piece.first, last = piece.last;
      for (int64_t row = first; row < last; row += kAmxRows) {
        pack_left<kParts>(at(a.grad_out, row, 0), a.grad_out.ld, min(kAmxRows, last - row), panels, right_of(row));
        turn(right_of(row), panels * kParts);
      }
    }
    const int64_t panel_rows = round_up(a.inputs, kPanel);
    for (int64_t p = 0; p < panels; ++p)
      pack_left<kParts>(a.weight + (p * panel_rows + piece.panel * kPanel) * kPanel, kPanel, kAmxRows, 1,
                        left + p * kParts * kAmxBlock);
  }
  void take_outputs(int64_t, int64_t) {}
  uint32_t* right_of(int64_t row) const { return right + (row - first) / kAmxRows * panels * kParts * kAmxBlock; }
  void multiply(Tile& tile, int64_t row, int64_t, int64_t) {
    alignas(64) float turned[kAmxRows * kPanel];
    const int64_t rows = rows_of<Tile>(row, last) > kAmxRows / 2 ? kAmxRows : kAmxRows / 2;
    if (rows == kAmxRows)
      amx_multiply<kParts>(left, right_of(row), a.outputs, turned, true);
    else
      amx_multiply<kParts, 2, 1>(left, right_of(row), a.outputs, turned, true);
    for (int64_t down = 0; down < rows; down += 16)
      for (int64_t across = 0; across < kPanel; across += 16)
        transpose(turned + across * kPanel + down, kPanel, reinterpret_cast<float*>(tile.sum) + down * kPanel + across,
                  kPanel);
  }
};

template <int kParts>
struct AmxWeightGradient {
  using Tile = TileOf<kAmxRows>;
  const WeightGradient& a;
  int64_t blocks = 0;
  uint32_t *left = nullptr, *right = nullptr;
  AmxTiles tiles;

  explicit AmxWeightGradient(const WeightGradient& part) : a(part) {}
  void begin(int64_t row, int64_t depth) {
    blocks = amx_blocks(depth);
    left = amx_left.at_least(round_up(a.inputs, kAmxRows) / kAmxRows * blocks * kParts);
    right = amx_right.at_least(blocks * kParts);
    for (int64_t k = 0; k < a.inputs; k += kAmxRows) {
      pack_right<kParts>(at(a.in, row, k), a.in.ld, depth, left_of(k));
      turn(left_of(k), blocks * kParts);
    }
  }
  void take_panel(const float* grad_out, int64_t depth, int64_t) { pack_right<kParts>(grad_out, kPanel, depth, right); }
  uint32_t* left_of(int64_t k) const { return left + k / kAmxRows * blocks * kParts * kAmxBlock; }
  void multiply(Tile& tile, int64_t k, int64_t row, int64_t depth) {
    amx_multiply<kParts>(left_of(k), right, depth, reinterpret_cast<float*>(tile.sum), row == 0);
  }
};

}  // namespace
}  // namespace VAE_FAST_CAPABILITY
}  // namespace cpu
}  // namespace vae_fast
