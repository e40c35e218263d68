// The parts of a training step (training.h): the products of matmul.inl with everything between them in their
// epilogues. Included by the file of each instruction set.
//
// One owner per sum, in an order that depends on the shapes alone: not on the number of threads.
#include "../math/activation.h"
#include "../math/optimizer.h"
#include "../math/splitmix.h"
#include "matmul.inl"
#if VAE_FAST_VECTOR_BYTES == 64
#include "amx.inl"
#endif
#include "training.h"

namespace vae_fast {
namespace cpu {
namespace VAE_FAST_CAPABILITY {
namespace {

constexpr int64_t kRowDepth = 256;  // rows that are summed up before a gradient is stored

// The nearest bfloat16, as a float: what a matrix unit would read
VAE_FAST_INLINE VF to_bfloat16(VF v) {
  const VU u = (VU)v;
  return v != v ? v : (VF)((u + 0x7FFFu + ((u >> 16) & 1u)) & 0xFFFF0000u);
}
VAE_FAST_INLINE VF rounded(VF v, bool fast) { return fast ? to_bfloat16(v) : v; }

// --- the minibatch ---------------------------------------------------------------------------------------------------

// In place of the probabilities in row b of a minibatch draws from Bernoulli of them
VAE_FAST_INLINE void draw(float* x, int64_t seed, int64_t b, int64_t cols) {
  for (int64_t c = 0; c < cols; ++c) x[c] = bernoulli_draw(seed, b * cols + c, x[c]);
}

// The lanes set in a byte, one after another, the rest anything
struct LanesOfByte {
  uint8_t lanes[256][8] = {};
  constexpr LanesOfByte() {
    for (int byte = 0; byte < 256; ++byte)
      for (int lane = 0, count = 0; lane < 8; ++lane)
        if (byte >> lane & 1) lanes[byte][count++] = static_cast<uint8_t>(lane);
  }
};
constexpr LanesOfByte kLanesOfByte;

// A bit for each of eight floats that is not zero
VAE_FAST_INLINE uint32_t nonzero_of_eight(const float* x) {
#if VAE_FAST_VECTOR_BYTES >= 32
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), __m256{}, _CMP_NEQ_UQ)));
#else
  uint32_t found = 0;
  for (uint32_t lane = 0; lane < 8; ++lane) found |= static_cast<uint32_t>(x[lane] != 0) << lane;
  return found;
#endif
}

VAE_FAST_INLINE void list_nonzeros(const Nonzeros& nonzeros, const float* x, int64_t r) {
  int32_t *const columns = nonzeros.of_row(r), *next = columns;
#ifdef VAE_FAST_MASKS
  __m512i listed = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t c = 0; c < nonzeros.cols; c += kLanes, listed = _mm512_add_epi32(listed, _mm512_set1_epi32(kLanes))) {
    const __mmask16 found = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + c), __m512{}, _CMP_NEQ_UQ);
    _mm512_storeu_si512(next, _mm512_maskz_compress_epi32(found, listed));
    next += __builtin_popcount(found);
  }
#else
  typedef uint8_t Bytes __attribute__((vector_size(8)));
  typedef int32_t Eight __attribute__((vector_size(32)));
  for (int64_t c = 0; c < nonzeros.cols; c += 8) {  // what fills a row of x up is zero
    const uint32_t found = nonzero_of_eight(x + c);
    Bytes lanes;
    __builtin_memcpy(&lanes, kLanesOfByte.lanes[found], sizeof lanes);
    const Eight listed = __builtin_convertvector(lanes, Eight) + static_cast<int32_t>(c);
    __builtin_memcpy(next, &listed, sizeof listed);
    next += __builtin_popcount(found);
  }
#endif
  *next = Nonzeros::kNoColumn;
  nonzeros.per_row[r] = static_cast<int32_t>(next - columns);
}

constexpr int64_t kRowsAhead = 3;  // rows of the data set lie far apart, and none is in a cache
VAE_FAST_INLINE void prefetch_row(const Gather& a, int64_t b) {
  if (b >= a.batch) return;
  const int64_t bytes = a.dtype == DType::bits ? (a.cols + 7) / 8 : a.dtype == DType::u8 ? a.cols : 4 * a.cols;
  const char* row = static_cast<const char*>(a.values) + a.rows[b] * bytes;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
}

template <class X>
void gather(const Gather& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < begin + kRowsAhead; ++b) prefetch_row(a, b);
  for (int64_t b = begin; b < end; ++b) {
    prefetch_row(a, b + kRowsAhead);
    const auto values = target_row(static_cast<const X*>(a.values), a.rows[b], a.cols);
    float* x = at(a.x, b, 0);
    for_each_vector<VF>(0, a.cols, [&](int64_t c, int64_t n) {
      Memory<VF>::store(x + c, Memory<VF>::load(values + c, n) * a.scale, n);
    });
    if (a.dynamic) draw(x, a.seed, b, a.cols);
    if (a.nonzeros) list_nonzeros(*a.nonzeros, x, b);
    if (a.operand.data != a.x.data)
      for_each_vector<VF>(0, a.cols, [&](int64_t c, int64_t n) {
        Memory<VF>::store(at(a.operand, b, c), to_bfloat16(Memory<VF>::load(x + c, n)), n);
      });
  }
}

void run_part(const NonzerosOfRows& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) list_nonzeros(a.nonzeros, at(a.x, r, 0), r);
}

// Writes which of kPairsAtOnce pairs of floats, of numbers `first` on, are not both zero; returns how many.
#ifdef VAE_FAST_MASKS
constexpr int64_t kPairsAtOnce = 8;
VAE_FAST_INLINE int list_pairs(const float* x, int64_t first, int32_t* listed) {
  const __m512i magnitudes = _mm512_set1_epi32(0x7FFFFFFF);
  const __mmask8 found = _mm512_test_epi64_mask(_mm512_loadu_si512(x), magnitudes);
  const __m256i all =
      _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(first)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(listed), _mm256_maskz_compress_epi32(found, all));
  return __builtin_popcount(found);
}
#else
constexpr int64_t kPairsAtOnce = 4;
VAE_FAST_INLINE int list_pairs(const float* x, int64_t first, int32_t* listed) {
  typedef uint8_t Bytes __attribute__((vector_size(4)));
  typedef int32_t Four __attribute__((vector_size(16)));
  const uint32_t columns = nonzero_of_eight(x), any = (columns | columns >> 1) & 0x55u;  // in every other bit
  const uint32_t two = (any | any >> 1) & 0x33u, found = (two | two >> 2) & 0x0Fu;
  Bytes lanes;
  __builtin_memcpy(&lanes, kLanesOfByte.lanes[found], sizeof lanes);
  const Four all = __builtin_convertvector(lanes, Four) + static_cast<int32_t>(first);
  __builtin_memcpy(listed, &all, sizeof all);
  return __builtin_popcount(found);
}
#endif

void run_part(const NonzerosOfColumns& a, int64_t begin, int64_t end) {
  constexpr int64_t kGroup = NonzerosOfColumns::kPairs, kGroupsAtOnce = 32;
  const Nonzeros& nonzeros = a.nonzeros;
  const int64_t pairs = nonzeros.column_pairs();
  for (int64_t group = begin; group < end; group += kGroupsAtOnce) {
    const int64_t first = group * kGroup, last = min(pairs, min(end, group + kGroupsAtOnce) * kGroup);
    for (int64_t p = first; p < last; ++p) nonzeros.per_pair[p] = 0;
    for (int64_t r = 0; r < nonzeros.rows; ++r) {
      const float* x = at(a.x, r, 0);
      int32_t listed[kGroupsAtOnce * kGroup + kPairsAtOnce], *next = listed;
      for (int64_t p = first; p < last; p += kPairsAtOnce) next += list_pairs(x + 2 * p, p, next);
      for (const int32_t* i = listed; i < next; ++i) {
        const int64_t p = *i;
        nonzeros.of_pair(p)[nonzeros.per_pair[p]++] = {static_cast<int32_t>(r), {x[2 * p], x[2 * p + 1]}};
      }
    }
  }
}

// Of ascending entries the first whose row is not before `row`
VAE_FAST_INLINE const Nonzeros::Pair* first_from(const Nonzeros::Pair* begin, const Nonzeros::Pair* end, int64_t row) {
  while (begin < end) {
    const Nonzeros::Pair* middle = begin + (end - begin) / 2;
    middle->row < row ? begin = middle + 1 : end = middle;
  }
  return begin;
}

// --- forward ---------------------------------------------------------------------------------------------------------

// The gradient in the logits of a tile and, returned, its log-likelihood
template <class Tile>
VAE_FAST_INLINE double bernoulli_epilogue(const Forward& a, const Tile& tile, int64_t row, int64_t last,
                                          int64_t column) {
  double total = 0;
  const int64_t rows = min(Tile::kRows, last - row);
  for (int j = 0; j < 2; ++j, column += kLanes) {
    const int64_t n = a.outputs - column;
    if (n <= 0) {
      for (int64_t i = 0; i < rows; ++i) from_floats(at(a.out, row + i, column), VF{});
      continue;
    }
    const VF bias = to_floats(a.bias + column);
    for (int64_t i = 0; i < rows;) {
      BernoulliSum<VF> sum;
      for (const int64_t last = min(rows, i + sum.kMost); i < last; ++i) {
        const VF l = tile.sum[i][j] + bias, x = to_floats(at(a.x, (row + i) % a.x_rows, column));
        const VF t = bernoulli_odds(l);
        sum.add(l, x, t);
        const VF grad = rounded(in_every_lane(-a.scale) * bernoulli_grad_logit(l, x, t), a.fast);
        from_floats(at(a.out, row + i, column), Memory<VF>::keep(grad, n));
      }
      total += Memory<VF>::sum(Memory<VF>::keep(sum.log_likelihood(), n));
    }
  }
  return total;
}

// What the columns from `logvar_column` on are multiplied by, of kLanes columns
VAE_FAST_INLINE VF scale_of_columns(int64_t column, int64_t logvar_column, float logvar_scale) {
  VF scale = constant<VF>(1.0);
  if (column + kLanes <= logvar_column) return scale;
  for (int i = 0; i < kLanes; ++i) scale[i] = column + i < logvar_column ? 1 : logvar_scale;
  return scale;
}

VAE_FAST_INLINE VF activated(Epilogue epilogue, VF v, bool fast) {
  if (epilogue == Epilogue::tanh) return rounded(tanh_by_exponent(v), fast);
  if (epilogue == Epilogue::relu) return rounded(relu(v), fast);
  if (epilogue == Epilogue::softplus) return rounded(softplus(v), fast);
  return v;
}

// The outputs of a product's kLanes columns from `column` on, which lie in rows `ld` apart
VAE_FAST_INLINE void activate(const Forward& a, const float* product, int64_t ld, int64_t row, int64_t rows,
                              int64_t column) {
  const VF scale = scale_of_columns(column, a.logvar_column, a.logvar_scale), bias = to_floats(a.bias + column);
  for (int64_t i = 0; i < rows; ++i)
    from_floats(at(a.out, row + i, column), activated(a.epilogue, scale * to_floats(product + i * ld) + bias, a.fast));
}

template <class Product>
void forward(const Forward& a, int64_t begin, int64_t end) {
  using Tile = typename Product::Tile;
  Product product(a);
  tiles_of(a).pieces(begin, end, [&](const TileLine::Piece& piece) {
    const int64_t column = piece.panel * kPanel;
    product.begin(piece);
    in_parts(a.inputs, Product::kDepth, 1, [&](int64_t k, int64_t depth) {
      for (int64_t row = piece.begin, i = piece.tile; row < piece.end; row += Tile::kRows, ++i) {
        const int64_t rows = rows_of<Tile>(row, piece.last);
        Tile tile;
        k == 0 ? tile.zero() : tile.load(at(a.out, row, column), a.out.ld, rows);
        product.multiply(tile, row, k, depth);
        if (k + depth < a.inputs) {
          tile.store(at(a.out, row, column), a.out.ld, rows);
        } else if (a.epilogue == Epilogue::bernoulli) {
          const double log_likelihood = bernoulli_epilogue(a, tile, row, piece.last, column);
          if (a.log_likelihood) a.log_likelihood[i] = log_likelihood;
        } else {
          for (int64_t j = 0; j < 2; ++j)  // also of a half that was left out: a matrix unit reads it
            activate(a, reinterpret_cast<const float*>(&tile.sum[0][j]), kPanel, row, rows, column + j * kLanes);
        }
      }
    });
  });
}

// body(min(n, kMost)), a constant
template <int64_t kMost, class Body>
VAE_FAST_INLINE void with_constant(int64_t n, Body body) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_constant<kMost - 1>(n, body);
  }
  body(std::integral_constant<int, static_cast<int>(kMost)>{});
}

// Panels side by side in a product with few elements that are not zero: their sums for one row fill the registers that
// an addition's latency asks for.
constexpr int64_t kSparsePanels = 4;
constexpr int64_t kSparseRows = kRowBlock / 2;  // rows that share a piece of the weights in the first-level cache ...
constexpr int64_t kSparseDepth =
    (VAE_FAST_VECTOR_BYTES == 64 ? 36864 : 24576) / (kSparsePanels * kPanel * 4);  // ... of so many inputs

// out[r, :] (+)= sum_c x[r, c] right[c, :] over the listed columns c < end from next[r] on, which moves to the first
// behind them. Not inlined, for the registers of its inner loop.
template <int kPanels>
__attribute__((noinline)) void multiply_listed(Matrix x, int64_t rows, const int32_t** next, int32_t end,
                                               const float* right, int64_t panel, Matrix out, bool first) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* const row = at(x, r, 0);
    VF sum[kPanels][2] = {};
    const int32_t* column = next[r];
    for (int64_t c = *column; c < end; c = *++column) {
      const VF left = in_every_lane(row[c]);
      const float* const at_c = right + c * kPanel;
#pragma GCC unroll 4
      for (int i = 0; i < kPanels; ++i) {
        sum[i][0] = Math<VF>::fma(left, to_floats(at_c + i * panel), sum[i][0]);
        sum[i][1] = Math<VF>::fma(left, to_floats(at_c + i * panel + kLanes), sum[i][1]);
      }
    }
    next[r] = column;
    float* const to = at(out, r, 0);
#pragma GCC unroll 4
    for (int i = 0; i < kPanels; ++i) {
      for (int j = 0; j < 2; ++j) {
        float* const element = to + i * kPanel + j * kLanes;
        from_floats(element, first ? sum[i][j] : sum[i][j] + to_floats(element));
      }
    }
  }
}

// Of rows [first, last) panels p to p + kPanels - 1
template <int kPanels>
void forward_of_nonzeros(const Forward& a, int64_t first, int64_t last, int64_t p) {
  const int64_t panel = round_up(a.inputs, kPanel) * kPanel, rows = last - first;
  const Matrix in{at(a.in, first, 0), a.in.ld}, out{at(a.out, first, p * kPanel), a.out.ld};
  const int32_t* next[kSparseRows];
  for (int64_t r = 0; r < rows; ++r) next[r] = a.nonzeros->of_row(first + r);
  for (int64_t k = 0; k < a.inputs; k += kSparseDepth)
    multiply_listed<kPanels>(in, rows, next, static_cast<int32_t>(min(k + kSparseDepth, a.inputs)),
                             a.weight + p * panel, panel, out, k == 0);
  for (int64_t c = 0; c < kPanels * kPanel; c += kLanes)
    activate(a, at(out, 0, c), out.ld, first, rows, p * kPanel + c);
}

void forward_of_nonzeros(const Forward& a, int64_t begin, int64_t end) {
  const int64_t blocks = (a.rows + kSparseRows - 1) / kSparseRows;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item % blocks * kSparseRows, last = min(a.rows, first + kSparseRows);
    const int64_t p = item / blocks * kSparsePanels;
    with_constant<kSparsePanels>(round_up(a.outputs, kPanel) / kPanel - p,
                                 [&](auto panels) { forward_of_nonzeros<panels>(a, first, last, p); });
  }
}

void run_part(const Forward& a, int64_t begin, int64_t end) {
  if (a.nonzeros) return forward_of_nonzeros(a, begin, end);
#if VAE_FAST_VECTOR_BYTES == 64
  if (on_matrix_unit(a.fast, a.rows))
    return a.fast ? forward<AmxForward<kFastParts>>(a, begin, end) : forward<AmxForward<kExactParts>>(a, begin, end);
#endif
  forward<VectorForward>(a, begin, end);
}

void run_part(const GaussianLoss& a, int64_t begin, int64_t end) {
  using M = Memory<VF>;
  for (int64_t r = begin; r < end; ++r) {
    float *mean = at(a.outputs, r, 0), *logvar = at(a.outputs, r, a.half);
    const float* x = at(a.x, r % a.x_rows, 0);
    a.log_likelihood[r] = row_sum<VF>(a.cols, [&](int64_t c, int64_t n) {
      VF m = M::load(mean + c, n), lv = M::load(logvar + c, n), derivative = constant<VF>(1.0);
      if (a.sigmoid_mean) {
        derivative = -bernoulli_curvature(m);
        m = sigmoid(m);
      }
      const GaussianResidual<VF> residual(m, lv, M::load(x + c, n));
      const VF scale = in_every_lane(-a.scale);
      M::store(mean + c, rounded(scale * residual.grad_mean() * derivative, a.fast), n);
      M::store(logvar + c, rounded(in_every_lane(a.logvar_scale) * (scale * residual.grad_logvar()), a.fast), n);
      return residual.log_likelihood(lv);
    });
  }
}

void run_part(const Dream& a, int64_t begin, int64_t end) {
  using M = Memory<VF>;
  const bool bernoulli = a.likelihood == engine::Likelihood::bernoulli;
  for (int64_t r = begin; r < end; ++r) {
    const float* outputs = at(a.outputs, r, 0);
    float* x = at(a.x, r, 0);
    for_each_vector<VF>(0, a.cols, [&](int64_t c, int64_t n) {
      VF mean = M::load(outputs + c, n);
      if (a.likelihood != engine::Likelihood::gaussian) mean = sigmoid(mean);
      if (!bernoulli) mean = reparameterize(mean, M::load(outputs + a.half + c, n), M::load(a.eps + r * a.cols + c, n));
      M::store(x + c, mean, n);
    });
    if (bernoulli) draw(x, a.seed, r, a.cols);
  }
}

// --- the latent variables --------------------------------------------------------------------------------------------

void run_part(const LatentForward& a, int64_t begin, int64_t end) {
  using M = Memory<VF>;
  for (int64_t b = begin; b < end; ++b) {
    const float *mu = at(a.heads, b, 0), *logvar = at(a.heads, b, a.half);
    a.kl[b] = row_sum<VF>(a.latent, [&](int64_t c, int64_t n) {
      const VF m = M::load(mu + c, n), lv = M::load(logvar + c, n);
      VF squares{};
      for (int64_t s = 0; s < a.samples; ++s) {
        const int64_t row = s * a.batch + b;
        const VF eps = M::load(a.eps + row * a.latent + c, n), z = reparameterize(m, lv, eps);
        M::store(at(a.z, row, c), rounded(z, a.fast), n);
        squares = squares + (z * z - eps * eps);
      }
      if (!a.estimated_kl) return gaussian_kl(m, lv);
      return constant<VF>(0.5) * (squares / constant<VF>(static_cast<double>(a.samples)) - lv);
    });
  }
}

void run_part(const LatentBackward& a, int64_t begin, int64_t end) {
  using M = Memory<VF>;
  const VF scale = in_every_lane(a.kl_scale);
  const VF share = scale / constant<VF>(static_cast<double>(a.samples));
  for (int64_t b = begin; b < end; ++b) {
    float *mu = at(a.heads, b, 0), *logvar = at(a.heads, b, a.half);
    for_each_vector<VF>(0, a.latent, [&](int64_t c, int64_t n) {
      const VF m = M::load(mu + c, n), lv = M::load(logvar + c, n),
               half_deviation = constant<VF>(0.5) * standard_deviation(lv);
      VF sum{}, weighted{};
      for (int64_t s = 0; s < a.samples; ++s) {
        const int64_t row = s * a.batch + b;
        const VF eps = M::load(a.eps + row * a.latent + c, n);
        VF grad = M::load(at(a.grad_z, row, c), n);
        if (a.estimated_kl) grad = grad + share * M::load(at(a.z, row, c), n);
        sum = sum + grad;
        weighted = Math<VF>::fma(grad, eps, weighted);
      }
      VF to_mu = sum, to_logvar = half_deviation * weighted;
      if (a.estimated_kl) {
        to_logvar = to_logvar - constant<VF>(0.5) * scale;
      } else {
        to_mu = Math<VF>::fma(scale, m, to_mu);
        to_logvar = Math<VF>::fma(scale, gaussian_kl_grad_logvar(lv), to_logvar);
      }
      M::store(mu + c, rounded(to_mu, a.fast), n);
      M::store(logvar + c, rounded(in_every_lane(a.logvar_scale) * to_logvar, a.fast), n);
    });
  }
}

// --- backward --------------------------------------------------------------------------------------------------------

template <class Product>
void input_gradient(const InputGradient& a, int64_t begin, int64_t end) {
  using Tile = typename Product::Tile;
  Product product(a);
  tiles_of(a).pieces(begin, end, [&](const TileLine::Piece& piece) {
    const int64_t column = piece.panel * kPanel;
    product.begin(piece);
    in_parts(a.outputs, Product::kDepth, kPanel, [&](int64_t n, int64_t depth) {
      product.take_outputs(n, depth);
      for (int64_t row = piece.begin; row < piece.end; row += Tile::kRows) {
        const int64_t rows = rows_of<Tile>(row, piece.last);
        float* to = at(a.grad_in, row, column);
        Tile tile;
        n == 0 ? tile.zero() : tile.load(to, a.grad_in.ld, rows);
        product.multiply(tile, row, n, depth);
        if (n + depth == a.outputs && a.activation != Epilogue::none) {
          for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < piece.vectors; ++j) {
              const VF h = to_floats(at(a.in, row + i, column + j * kLanes));
              const VF slope = a.activation == Epilogue::tanh   ? tanh_derivative(h)
                               : a.activation == Epilogue::relu ? relu_derivative(h)
                                                                : softplus_derivative(h);
              tile.sum[i][j] = rounded(tile.sum[i][j] * slope, a.fast);
            }
          }
        }
        tile.store(to, a.grad_in.ld, rows);
      }
    });
  });
}

void run_part(const InputGradient& a, int64_t begin, int64_t end) {
#if VAE_FAST_VECTOR_BYTES == 64
  if (on_matrix_unit(a.fast, a.rows))
    return a.fast ? input_gradient<AmxInputGradient<kFastParts>>(a, begin, end)
                  : input_gradient<AmxInputGradient<kExactParts>>(a, begin, end);
#endif
  input_gradient<VectorInputGradient>(a, begin, end);
}

VAE_FAST_INLINE float* plus(float* p, int64_t offset) { return p ? p + offset : nullptr; }

// Parameters side by side, and what belongs to them
struct Place {
  float *weight, *first, *second, *operand;  // as WeightGradient's weight, state and operand
};
VAE_FAST_INLINE Place weights_at(const WeightGradient& a, int64_t at) {
  return {a.weight + at, plus(a.state[0], at), plus(a.state[1], at), plus(a.operand, at)};
}

VAE_FAST_INLINE bool decays(const UpdateRule& rule) { return rule.added_decay != 0 || rule.kept != 1; }

// The optimizer on so many vectors of parameters. What it needs stays in registers: the rule is a copy, whose kind and
// use are known. kDecays: with a prior, or one of the rule's decays
template <UpdateKind kKind, bool kDecays, bool kOperand>
VAE_FAST_INLINE void update(UpdateRule rule, const StepFactors factors, float prior, const VF* gradients, int64_t count,
                            const Place to) {
  constexpr int kStates = kKind == UpdateKind::adam ? 2 : kKind == UpdateKind::sgd ? 0 : 1;
  rule.kind = kKind;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = i * kLanes;
    VF w = to_floats(to.weight + at), s0{}, s1{};
    if constexpr (kStates > 0) s0 = to_floats(to.first + at);
    if constexpr (kStates > 1) s1 = to_floats(to.second + at);
    const VF gradient = kDecays ? Math<VF>::fma(in_every_lane(prior), w, gradients[i]) : gradients[i];
    vae_fast::update<kDecays>(rule, factors, gradient, w, s0, s1);
    from_floats(to.weight + at, w);
    if constexpr (kStates > 0) from_floats(to.first + at, s0);
    if constexpr (kStates > 1) from_floats(to.second + at, s1);
    if constexpr (kOperand) from_floats(to.operand + at, to_bfloat16(w));
  }
}

VAE_FAST_INLINE void update(const WeightGradient& a, float prior, const VF* gradients, int64_t count, const Place& to) {
  const auto with = [&](auto kind, auto decays) {
    to.operand ? update<kind, decays, true>(a.rule, a.factors, prior, gradients, count, to)
               : update<kind, decays, false>(a.rule, a.factors, prior, gradients, count, to);
  };
  const auto with_kind = [&](auto kind) {
    decays(a.rule) || prior != 0 ? with(kind, std::true_type{}) : with(kind, std::false_type{});
  };
  switch (a.rule.kind) {
    case UpdateKind::sgd:
      return with_kind(std::integral_constant<UpdateKind, UpdateKind::sgd>{});
    case UpdateKind::momentum:
      return with_kind(std::integral_constant<UpdateKind, UpdateKind::momentum>{});
    case UpdateKind::adagrad:
      return with_kind(std::integral_constant<UpdateKind, UpdateKind::adagrad>{});
    case UpdateKind::adam:
      return with_kind(std::integral_constant<UpdateKind, UpdateKind::adam>{});
  }
}

// Whether a weight stays as it is where its gradient is zero
VAE_FAST_INLINE bool stays_without_gradient(const WeightGradient& a) {
  return (a.rule.kind == UpdateKind::adagrad || a.rule.kind == UpdateKind::sgd) && !decays(a.rule) && a.prior == 0;
}

// The sums over the rows so far of panel p: inputs down, the bias's last
VAE_FAST_INLINE float* sums_of(const WeightGradient& a, int64_t p) {
  return plus(a.sums, p * (round_up(a.inputs, kPanel) + kTileRows) * kPanel);
}

// Panel p's bias, from the sum of rows [row, row + depth) of grad_out, and of those before
VAE_FAST_INLINE void update_bias(const WeightGradient& a, int64_t p, const float* grad_out, int64_t ld, int64_t row,
                                 int64_t depth) {
  float* const so_far = plus(sums_of(a, p), (round_up(a.inputs, kPanel) + kTileRows - 1) * kPanel);
  VF sum[2];
  for (int j = 0; j < 2; ++j) {
    sum[j] = VF{};
    for (int64_t i = 0; i < depth; ++i) sum[j] = sum[j] + to_floats(grad_out + i * ld + j * kLanes);
    if (row > 0) sum[j] = sum[j] + to_floats(so_far + j * kLanes);
    if (row + depth < a.rows)
      from_floats(so_far + j * kLanes, sum[j]);
    else
      sum[j] = sum[j] / scale_of_columns(p * kPanel + j * kLanes, a.logvar_column, a.logvar_scale);
  }
  const int64_t at = p * kPanel;
  if (row + depth == a.rows)
    update(a, 0, sum, 2, {a.bias + at, plus(a.bias_state[0], at), plus(a.bias_state[1], at), nullptr});
}

template <class Product>
void weight_gradient(const WeightGradient& a, int64_t begin, int64_t end) {
  using Tile = typename Product::Tile;
  const int64_t panel_rows = round_up(a.inputs, kPanel);
  alignas(64) float grad_out[kRowDepth * kPanel];  // a panel's columns of it, side by side
  Product product(a);
  in_parts(a.rows, kRowDepth, 1, [&](int64_t row, int64_t depth) {
    product.begin(row, depth);
    tiles_of(a).pieces(begin, end, [&](const TileLine::Piece& piece) {
      const int64_t p = piece.panel;
      for (int64_t i = 0; i < depth; ++i)
        __builtin_memcpy(grad_out + i * kPanel, at(a.grad_out, row + i, p * kPanel), sizeof(float) * kPanel);
      product.take_panel(grad_out, depth, piece.vectors);
      float* const sum = sums_of(a, p);
      const bool last = row + depth == a.rows;
      for (int64_t k = piece.begin; k < piece.end; k += Tile::kRows) {
        Tile tile;
        row == 0 ? tile.zero() : tile.load(sum + k * kPanel, kPanel);
        if (last) {
          const int64_t at = (p * panel_rows + k) * kPanel;
          for (const float* what : {a.weight, a.state[0], a.state[1]})
            if (what) prefetch(what + at, Tile::kRows * kPanel * 4);
        }
        product.multiply(tile, k, row, depth);
        if (!last) {
          tile.store(sum + k * kPanel, kPanel);
          continue;
        }
        update(a, a.prior, tile.sum[0], 2 * min(Tile::kRows, a.inputs - k),
               weights_at(a, (p * panel_rows + k) * kPanel));
      }
      if (piece.begin == 0) update_bias(a, p, grad_out, kPanel, row, depth);
    });
  });
}

// Panels side by side in a gradient from lists: with the two columns of a pair they fill the registers.
constexpr int64_t kSparseGradientPanels = 3;

// The same from lists, of panels p to p + kPanels - 1, and of the sums' part that has rows [row, row + depth)
template <int kPanels>
void weight_gradient_of_nonzeros(const WeightGradient& part, int64_t p, int64_t row, int64_t depth) {
  const WeightGradient a = part;  // so that nothing stored can change it, and the update's numbers stay in registers
  constexpr int64_t kWidth = kPanels * kPanel;
  alignas(64) float grad_out[kRowDepth * kWidth];
  for (int64_t i = 0; i < depth; ++i)
    __builtin_memcpy(grad_out + i * kWidth, at(a.grad_out, row + i, p * kPanel), sizeof(float) * kWidth);
  const int64_t panel = round_up(a.inputs, kPanel) * kPanel;
  const bool all = depth == a.rows, last = row + depth == a.rows, stays = stays_without_gradient(a);
  for (int64_t k = 0; k < a.inputs; k += 2) {
    const Nonzeros::Pair* element = a.nonzeros->of_pair(k / 2);
    const Nonzeros::Pair* end = element + a.nonzeros->per_pair[k / 2];
    if (element == end && stays) continue;
    if (last) {
      for (int i = 0; i < kPanels; ++i)
        for (const float* what : {a.weight, a.state[0], a.state[1]})
          if (what) prefetch(what + (p + i) * panel + k * kPanel, 2 * kPanel * 4);
    }
    if (!all) {
      element = first_from(element, end, row);
      end = first_from(element, end, row + depth);
    }
    VF sum[kPanels][2][2] = {};  // panels, the two columns, vectors: as the weights lie in each panel
    for (; element < end; ++element) {
      const VF left[2] = {in_every_lane(element->values[0]), in_every_lane(element->values[1])};
      const float* const right = grad_out + (element->row - row) * kWidth;
#pragma GCC unroll 4
      for (int i = 0; i < kPanels; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          const VF g = loaded(right + i * kPanel + j * kLanes);
          sum[i][0][j] = Math<VF>::fma(left[0], g, sum[i][0][j]);
          sum[i][1][j] = Math<VF>::fma(left[1], g, sum[i][1][j]);
        }
      }
    }
    const int64_t vectors = 2 * min(2, a.inputs - k);
    VF gradient[kPanels][4];
    __builtin_memcpy(gradient, sum, sizeof sum);
    for (int i = 0; i < kPanels; ++i) {
      float* const so_far = plus(sums_of(a, p + i), k * kPanel);
      for (int64_t v = 0; v < vectors; ++v) {
        if (row > 0) gradient[i][v] = gradient[i][v] + to_floats(so_far + v * kLanes);
        if (!last) from_floats(so_far + v * kLanes, gradient[i][v]);
      }
      if (last) update(a, a.prior, gradient[i], vectors, weights_at(a, (p + i) * panel + k * kPanel));
    }
  }
  for (int i = 0; i < kPanels; ++i) update_bias(a, p + i, grad_out + i * kPanel, kWidth, row, depth);
}

void weight_gradient_of_nonzeros(const WeightGradient& a, int64_t begin, int64_t end) {
  in_parts(a.rows, kRowDepth, 1, [&](int64_t row, int64_t depth) {
    for (int64_t p = begin; p < end; p += kSparseGradientPanels) {
      with_constant<kSparseGradientPanels>(end - p,
                                           [&](auto panels) { weight_gradient_of_nonzeros<panels>(a, p, row, depth); });
    }
  });
}

void run_part(const WeightGradient& a, int64_t begin, int64_t end) {
  if (a.nonzeros) return weight_gradient_of_nonzeros(a, begin, end);
#if VAE_FAST_VECTOR_BYTES == 64
  if (on_matrix_unit(a.operand, a.rows))
    return a.operand ? weight_gradient<AmxWeightGradient<kFastParts>>(a, begin, end)
                     : weight_gradient<AmxWeightGradient<kExactParts>>(a, begin, end);
#endif
  weight_gradient<VectorWeightGradient>(a, begin, end);
}

void run_part(const AdagradUpdate& a, int64_t begin, int64_t end) {
  using M = Memory<VF>;
  UpdateRule rule = a.rule;  // and what else could be changed by a store
  rule.kind = UpdateKind::adagrad;
  const StepFactors factors = a.factors;
  const float* const grad = a.grad;
  float *const parameter = a.parameter, *const sum = a.sum;
  for_each_vector<VF>(begin, end, [=](int64_t i, int64_t n) {
    VF w = M::load(parameter + i, n), s = M::load(sum + i, n), none{};
    vae_fast::update(rule, factors, M::load(grad + i, n), w, s, none);
    M::store(parameter + i, w, n);
    M::store(sum + i, s, n);
  });
}

// Of vectors of columns, counted from the one that has the first column
void run_part(const Exchange& a, int64_t begin, int64_t end) {
  const int64_t panel = round_up(a.inputs, kPanel) * kPanel, before = a.column / kLanes;
  for (int64_t v = before + begin; v < before + end; ++v) {
    const int64_t from = v == before ? a.column : v * kLanes, to = min(a.column + a.outputs, (v + 1) * kLanes);
    float* const ours = a.panels + v / 2 * panel + v % 2 * kLanes + from % kLanes;  // an input's stand kPanel apart
    float* const theirs = a.torch + (from - a.column) * a.inputs;
    int64_t k = 0;
    for (; to - from == kLanes && k + kLanes <= a.inputs; k += kLanes) {
      a.import ? transpose(theirs + k, a.inputs, ours + k * kPanel, kPanel)
               : transpose(ours + k * kPanel, kPanel, theirs + k, a.inputs);
    }
    for (; k < a.inputs; ++k) {
      for (int64_t n = 0; n < to - from; ++n) {
        float &one = ours[k * kPanel + n], &other = theirs[n * a.inputs + k];
        a.import ? one = other : other = one;
      }
    }
  }
}

void run_part(const Gather& a, int64_t begin, int64_t end) {
  if (a.dtype == DType::bits) return gather<Bits>(a, begin, end);
  if (a.dtype == DType::u8) return gather<uint8_t>(a, begin, end);
  gather<float>(a, begin, end);
}

}  // namespace

TileShape tile_shape() { return {kTileRows, kLanes, kPanel, kRowBlock, kRowDepth, kSparseRows, kSparsePanels}; }

#define VAE_FAST_DEFINE(Part) \
  void run(const Part& part, int64_t begin, int64_t end) { run_part(part, begin, end); }
VAE_FAST_FOR_EACH_PART(VAE_FAST_DEFINE)
#undef VAE_FAST_DEFINE

}  // namespace VAE_FAST_CAPABILITY
}  // namespace cpu
}  // namespace vae_fast
