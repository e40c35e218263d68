// Matrix products of the training step, on tiles of kTileRows x kPanel elements that stay in registers. Included by
// the file of each instruction set, after kernels.inl. What a part of the step takes its tiles from is a class: of
// vectors here, of a matrix unit in amx.inl.
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

// A vector that stays in a register while several instructions read it; the compiler would rather load it for each.
// Emulated vectors are longer than registers.
VAE_FAST_INLINE VF loaded(const float* p) {
  VF v = to_floats(p);
#if defined(__x86_64__) && !(defined(VAE_FAST_EMULATE_AVX512) && VAE_FAST_VECTOR_BYTES == 64)
  asm("" : "+x"(v));
#endif
  return v;
}

template <int kRows_>
struct TileOf {
  static constexpr int kRows = kRows_;
  alignas(64) VF sum[kRows][2];
  VAE_FAST_INLINE void zero() {
    for (auto& row : sum) row[0] = row[1] = VF{};
  }
  VAE_FAST_INLINE void load(const float* from, int64_t ld, int64_t rows = kRows) {
    for (int64_t i = 0; i < rows; ++i)
      for (int j = 0; j < 2; ++j) sum[i][j] = to_floats(from + i * ld + j * kLanes);
  }
  VAE_FAST_INLINE void store(float* to, int64_t ld, int64_t rows = kRows) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int j = 0; j < 2; ++j) from_floats(to + i * ld + j * kLanes, sum[i][j]);
  }
};
using Tile = TileOf<kTileRows>;

// tile[i, :] += sum_k a[i, k] b[k, :] over `count` terms k. Of a, either the rows i lie side by side (kAcross) and k
// strides by ld_a, or the other way round. Of b the first kVectors of each row. Not inlined, for the registers of its
// inner loop: beside an optimizer's it had half the speed.
template <bool kAcross, int kVectors>
__attribute__((noinline)) void multiply(Tile& tile, const float* a, int64_t ld_a, const float* b, int64_t count) {
  for (int64_t begin = 0; begin < count; begin += kTermsAtOnce) {
    VF sum[kTileRows][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i)
      for (int j = 0; j < kVectors; ++j) sum[i][j] = VF{};
    const int64_t end = min(begin + kTermsAtOnce, count);
#pragma GCC unroll 2
    for (int64_t k = begin; k < end; ++k) {
      VF right[kVectors];
      for (int j = 0; j < kVectors; ++j) right[j] = to_floats(b + k * kPanel + j * kLanes);
      const float* column = a + (kAcross ? k * ld_a : k);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
        const VF left = in_every_lane(kAcross ? column[i] : column[i * ld_a]);
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) sum[i][j] = Math<VF>::fma(left, right[j], sum[i][j]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i)
      for (int j = 0; j < kVectors; ++j) tile.sum[i][j] = tile.sum[i][j] + sum[i][j];
  }
}

template <bool kAcross>
VAE_FAST_INLINE void multiply(Tile& tile, const float* a, int64_t ld_a, const float* b, int64_t count,
                              int64_t vectors) {
  vectors == 2 ? multiply<kAcross, 2>(tile, a, ld_a, b, count) : multiply<kAcross, 1>(tile, a, ld_a, b, count);
}

// The kLanes elements' cache lines at p and after, as many as `bytes` fill
VAE_FAST_INLINE void prefetch(const float* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + i);
}

VAE_FAST_INLINE float* at(Matrix m, int64_t row, int64_t column) { return m.data + row * m.ld + column; }

// A square of vectors transposed: squares of kSize change places across the diagonal of one twice their size.
template <int kSize>
VAE_FAST_INLINE void transpose(VF (&rows)[kLanes]) {
  typedef int32_t Order __attribute__((vector_size(VAE_FAST_VECTOR_BYTES)));
  Order upper{}, lower{};
  for (int i = 0; i < kLanes; ++i) {
    upper[i] = i & kSize ? kLanes + i - kSize : i;
    lower[i] = i & kSize ? kLanes + i : i + kSize;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kSize) continue;
    const VF a = rows[i], b = rows[i + kSize];
    rows[i] = __builtin_shuffle(a, b, upper);
    rows[i + kSize] = __builtin_shuffle(a, b, lower);
  }
  if constexpr (kSize > 1) transpose<kSize / 2>(rows);
}

// to[n][k] = from[k][n], kLanes x kLanes elements of 32 bits; also in place
VAE_FAST_INLINE void transpose(const float* from, int64_t from_ld, float* to, int64_t to_ld) {
  VF rows[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = to_floats(from + i * from_ld);
  transpose<kLanes / 2>(rows);
  for (int i = 0; i < kLanes; ++i) from_floats(to + i * to_ld, rows[i]);
}

// --- tiles of the three products of a layer --------------------------------------------------------------------------

// Rows of a product at a time: so many of the left operand stay in the second-level cache while all panels pass.
constexpr int64_t kRowBlock = 120;  // a multiple of every tile's rows
static_assert(kRowBlock % kTileRows == 0);

// Of a tile from `row` on, those rows of a block that ends at `last` which the matrix has room for
template <class Tile>
VAE_FAST_INLINE int64_t rows_of(int64_t row, int64_t last) {
  return Tile::kRows == kTileRows ? kTileRows : min(Tile::kRows, round_up(last, kTileRows) - row);
}

// Tiles of `in` W: rows of `in` by a panel's outputs
struct VectorForward {
  using Tile = cpu::VAE_FAST_CAPABILITY::Tile;
  static constexpr int64_t kDepth = 1024;  // terms of a sum before it is stored
  const Forward& a;
  const float* panel = nullptr;
  int64_t begin_row = 0, vectors = 0, panel_rows, next = 0;

  explicit VectorForward(const Forward& part) : a(part), panel_rows(round_up(part.inputs, kPanel)) {}
  VAE_FAST_INLINE void begin(const TileLine::Piece& piece) {
    begin_row = piece.begin, vectors = piece.vectors;
    panel = a.weight + piece.panel * panel_rows * kPanel;
    // rows of the next panel, per tile
    next = (piece.panel + 1) * kPanel < a.outputs ? a.inputs * kTileRows / (piece.end - piece.begin) : 0;
  }
  VAE_FAST_INLINE void multiply(Tile& tile, int64_t row, int64_t k, int64_t depth) {
    prefetch(panel + (panel_rows + (row - begin_row) / kTileRows * next) * kPanel, next * kPanel * 4);
    cpu::VAE_FAST_CAPABILITY::multiply<false>(tile, at(a.in, row, k), a.in.ld, panel + k * kPanel, depth, vectors);
  }
};

// Tiles of grad_out W^T: rows of grad_out by kPanel inputs
struct VectorInputGradient {
  using Tile = cpu::VAE_FAST_CAPABILITY::Tile;
  static constexpr int64_t kDepth = 512;
  const InputGradient& a;
  int64_t panel_rows, column = 0, vectors = 0;
  alignas(64) float part[kDepth * kPanel];  // of W^T: outputs down, kPanel inputs across

  explicit VectorInputGradient(const InputGradient& part) : a(part), panel_rows(round_up(part.inputs, kPanel)) {}
  VAE_FAST_INLINE void begin(const TileLine::Piece& piece) { column = piece.panel * kPanel, vectors = piece.vectors; }
  VAE_FAST_INLINE void take_outputs(int64_t n, int64_t depth) {
    for (int64_t i = 0; i < depth; i += kPanel) {
      const float* square = a.weight + (n + i) * panel_rows + column * kPanel;
      for (int64_t down = 0; down < kPanel; down += kLanes)
        for (int64_t across = 0; across < vectors * kLanes; across += kLanes)
          transpose(square + across * kPanel + down, kPanel, part + (i + down) * kPanel + across, kPanel);
    }
  }
  VAE_FAST_INLINE void multiply(Tile& tile, int64_t row, int64_t n, int64_t depth) {
    cpu::VAE_FAST_CAPABILITY::multiply<false>(tile, at(a.grad_out, row, n), a.grad_out.ld, part, depth, vectors);
  }
};

// Tiles of in^T grad_out: inputs by a panel's outputs
struct VectorWeightGradient {
  using Tile = cpu::VAE_FAST_CAPABILITY::Tile;
  const WeightGradient& a;
  const float* grad_out = nullptr;
  int64_t vectors = 0;

  explicit VectorWeightGradient(const WeightGradient& part) : a(part) {}
  VAE_FAST_INLINE void begin(int64_t, int64_t) {}
  VAE_FAST_INLINE void take_panel(const float* panel_of_grad_out, int64_t, int64_t in_panel) {
    grad_out = panel_of_grad_out, vectors = in_panel;
  }
  VAE_FAST_INLINE void multiply(Tile& tile, int64_t k, int64_t row, int64_t depth) {
    cpu::VAE_FAST_CAPABILITY::multiply<true>(tile, at(a.in, row, k), a.in.ld, grad_out, depth, vectors);
  }
};

}  // namespace
}  // namespace VAE_FAST_CAPABILITY
}  // namespace cpu
}  // namespace vae_fast
