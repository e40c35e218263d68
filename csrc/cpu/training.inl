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

template <class X>
void gather(const Gather& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const auto values = target_row(static_cast<const X*>(a.values), a.rows[b], a.cols);
    float* x = at(a.x, b, 0);
    for_each_vector<VF>(0, a.cols, [&](int64_t c, int64_t n) {
      Memory<VF>::store(x + c, Memory<VF>::load(values + c, n) * a.scale, n);
    });
    if (a.dynamic) draw(x, a.seed, b, a.cols);
    if (a.operand.data != a.x.data)
      for_each_vector<VF>(0, a.cols, [&](int64_t c, int64_t n) {
        Memory<VF>::store(at(a.operand, b, c), to_bfloat16(Memory<VF>::load(x + c, n)), n);
      });
  }
}

// Whether any of n elements, n <= kTileRows, is not zero
VAE_FAST_INLINE bool any(const float* x, int64_t n) {
  bool found = false;
  for (int64_t i = 0; i < n; ++i) found |= x[i] != 0;
  return found;
}

void run_part(const FindZeros& a, int64_t begin, int64_t end) {
  const int64_t row_tiles = (a.rows + kTileRows - 1) / kTileRows;
  for (int64_t t = begin; t < end; ++t) {
    const bool of_rows = t < row_tiles;
    const int64_t first = (of_rows ? t : t - row_tiles) * kTileRows;
    int32_t* const terms = of_rows ? a.columns + t * a.cols : a.row_numbers + (t - row_tiles) * a.rows;
    int64_t count = 0;
    if (of_rows) {
      const int64_t n = min(kTileRows, a.rows - first);
      for_each_vector<VF>(0, a.cols, [&](int64_t c, int64_t m) {
        VI found{};
        for (int64_t i = 0; i < n; ++i) found |= to_floats(at(a.x, first + i, c)) != VF{};
        for (int64_t lane = 0; lane < m; ++lane) {
          terms[count] = static_cast<int32_t>(c + lane);
          count -= found[lane];
        }
      });
      a.of_rows[t] = {terms, count, a.cols};
    } else {
      const int64_t n = min(kTileRows, a.cols - first);
      for (int64_t r = 0; r < a.rows; ++r) {
        terms[count] = static_cast<int32_t>(r);
        count += any(at(a.x, r, first), n);
      }
      a.of_columns[t - row_tiles] = {terms, count, a.rows};
    }
  }
}

// --- forward ---------------------------------------------------------------------------------------------------------

// Of a tile from `row` on, those rows of a block that ends at `last` which the matrix has room for
template <class Tile>
VAE_FAST_INLINE int64_t rows_of(int64_t row, int64_t last) {
  return Tile::kRows == kTileRows ? kTileRows : min(Tile::kRows, round_up(last, kTileRows) - row);
}

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

template <class Tile>
VAE_FAST_INLINE void activation_epilogue(const Forward& a, const Tile& tile, int64_t row, int64_t last,
                                         int64_t column) {
  const VF scale = in_every_lane(column < a.logvar_panel * kPanel ? 1 : a.logvar_scale);
  for (int64_t i = 0; i < rows_of<Tile>(row, last); ++i) {
    for (int j = 0; j < 2; ++j) {
      const int64_t c = column + j * kLanes;
      VF v = scale * tile.sum[i][j] + to_floats(a.bias + c);
      if (a.epilogue == Epilogue::tanh) v = rounded(tanh_by_exponent(v), a.fast);
      if (a.epilogue == Epilogue::relu) v = rounded(relu(v), a.fast);
      if (a.epilogue == Epilogue::softplus) v = rounded(softplus(v), a.fast);
      from_floats(at(a.out, row + i, c), v);
    }
  }
}

template <class Product>
void forward(const Forward& a, int64_t begin, int64_t end) {
  Product product(a);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item / a.panels * kRowBlock, last = min(a.rows, first + kRowBlock);
    const int64_t p = item % a.panels;
    product.begin(first, last, p);
    double log_likelihood = 0;
    in_parts(a.inputs, Product::kDepth, 1, [&](int64_t k, int64_t depth) {
      for (int64_t row = first; row < last; row += Product::Tile::kRows) {
        typename Product::Tile tile;
        k == 0 ? tile.zero() : tile.load(at(a.out, row, p * kPanel), a.out.ld);
        product.multiply(tile, row, k, depth);
        if (k + depth < a.inputs) {
          tile.store(at(a.out, row, p * kPanel), a.out.ld);
        } else if (a.epilogue == Epilogue::bernoulli) {
          log_likelihood += bernoulli_epilogue(a, tile, row, last, p * kPanel);
        } else {
          activation_epilogue(a, tile, row, last, p * kPanel);
        }
      }
    });
    if (a.log_likelihood) a.log_likelihood[item] = log_likelihood;
  }
}

void run_part(const Forward& a, int64_t begin, int64_t end) {
#if VAE_FAST_VECTOR_BYTES == 64
  if (a.fast && matrix_unit()) return forward<AmxForward>(a, begin, end);
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
  const int64_t in_panels = (a.inputs + kPanel - 1) / kPanel, outputs = a.panels * kPanel;
  Product product(a);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item / in_panels * kRowBlock, last = min(a.rows, first + kRowBlock);
    const int64_t column = item % in_panels * kPanel;
    product.begin(first, last, column);
    in_parts(outputs, Product::kDepth, kPanel, [&](int64_t n, int64_t depth) {
      product.take_outputs(n, depth);
      for (int64_t row = first; row < last; row += Product::Tile::kRows) {
        const int64_t rows = rows_of<typename Product::Tile>(row, last);
        float* to = at(a.grad_in, row, column);
        typename Product::Tile tile;
        n == 0 ? tile.zero() : tile.load(to, a.grad_in.ld, rows);
        product.multiply(tile, row, n, depth);
        if (n + depth == outputs && a.activation != Epilogue::none) {
          for (int64_t i = 0; i < rows; ++i) {
            for (int j = 0; j < 2; ++j) {
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
  }
}

void run_part(const InputGradient& a, int64_t begin, int64_t end) {
#if VAE_FAST_VECTOR_BYTES == 64
  if (a.fast && matrix_unit()) return input_gradient<AmxInputGradient>(a, begin, end);
#endif
  input_gradient<VectorInputGradient>(a, begin, end);
}

// The optimizer on one vector of parameters
VAE_FAST_INLINE void update(const WeightGradient& a, float prior, VF g, float* weight, float* first, float* second,
                            float* operand) {
  VF w = to_floats(weight), s0 = first ? to_floats(first) : VF{}, s1 = second ? to_floats(second) : VF{};
  g = Math<VF>::fma(in_every_lane(prior), w, g);
  vae_fast::update(a.rule, a.factors, g, w, s0, s1);
  from_floats(weight, w);
  if (first) from_floats(first, s0);
  if (second) from_floats(second, s1);
  if (operand) from_floats(operand, to_bfloat16(w));
}

VAE_FAST_INLINE float* plus(float* p, int64_t offset) { return p ? p + offset : nullptr; }

template <class Product>
void weight_gradient(const WeightGradient& a, int64_t begin, int64_t end) {
  constexpr int64_t kRows = Product::Tile::kRows;
  const int64_t panel_rows = round_up(a.inputs, kPanel);
  alignas(64) float grad_out[kRowDepth * kPanel];  // a panel's columns of it, side by side
  Product product(a);
  in_parts(a.rows, kRowDepth, 1, [&](int64_t row, int64_t depth) {
    product.begin(row, depth);
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t i = 0; i < depth; ++i)
        __builtin_memcpy(grad_out + i * kPanel, at(a.grad_out, row + i, p * kPanel), sizeof(float) * kPanel);
      product.take_panel(grad_out, depth);
      float* sum = plus(a.sums, p * (panel_rows + kTileRows) * kPanel);
      float* bias_sum = plus(sum, (panel_rows + kTileRows - 1) * kPanel);
      const bool last = row + depth == a.rows;
      for (int64_t k = 0; k < a.inputs; k += kRows) {
        typename Product::Tile tile;
        row == 0 ? tile.zero() : tile.load(sum + k * kPanel, kPanel);
        if (last) {
          const int64_t at = (p * panel_rows + k) * kPanel;
          for (const float* what : {a.weight, a.state[0], a.state[1]})
            if (what) prefetch(what + at, kRows * kPanel * 4);
        }
        product.multiply(tile, k, row, depth);
        if (!last) {
          tile.store(sum + k * kPanel, kPanel);
          continue;
        }
        for (int64_t i = 0; i < min(kRows, a.inputs - k); ++i) {
          for (int j = 0; j < 2; ++j) {
            const int64_t at = (p * panel_rows + k + i) * kPanel + j * kLanes;
            update(a, a.prior, tile.sum[i][j], a.weight + at, plus(a.state[0], at), plus(a.state[1], at),
                   plus(a.operand, at));
          }
        }
      }
      for (int j = 0; j < 2; ++j) {
        VF g = row == 0 ? VF{} : to_floats(bias_sum + j * kLanes);
        for (int64_t i = 0; i < depth; ++i) g = g + to_floats(grad_out + i * kPanel + j * kLanes);
        const int64_t at = p * kPanel + j * kLanes;
        if (last && p >= a.logvar_panel) g = g / in_every_lane(a.logvar_scale);
        if (last)
          update(a, 0, g, a.bias + at, plus(a.bias_state[0], at), plus(a.bias_state[1], at), nullptr);
        else
          from_floats(bias_sum + j * kLanes, g);
      }
    }
  });
}

void run_part(const WeightGradient& a, int64_t begin, int64_t end) {
#if VAE_FAST_VECTOR_BYTES == 64
  if (a.operand && matrix_unit()) return weight_gradient<AmxWeightGradient>(a, begin, end);
#endif
  weight_gradient<VectorWeightGradient>(a, begin, end);
}

void run_part(const Gather& a, int64_t begin, int64_t end) {
  if (a.dtype == DType::bits) return gather<Bits>(a, begin, end);
  if (a.dtype == DType::u8) return gather<uint8_t>(a, begin, end);
  gather<float>(a, begin, end);
}

}  // namespace

TileShape tile_shape() { return {kTileRows, kPanel, kRowBlock, kRowDepth}; }

#define VAE_FAST_DEFINE(Part) \
  void run(const Part& part, int64_t begin, int64_t end) { run_part(part, begin, end); }
VAE_FAST_FOR_EACH_PART(VAE_FAST_DEFINE)
#undef VAE_FAST_DEFINE

}  // namespace VAE_FAST_CAPABILITY
}  // namespace cpu
}  // namespace vae_fast
