// The layers of a step, forward and backward: the tile product of product.cuh, and what becomes of its sums. Bytes and
// floors stand beside each struct in kernels.h.
//
// Nothing but the sums of a tile meets in a block, and every element of every buffer has one thread that writes it.
#include <algorithm>

#include "../../math/bernoulli.h"
#include "../../math/gaussian.h"
#include "../../math/philox.h"
#include "../../math/splitmix.h"
#include "elements.cuh"
#include "kernels.h"
#include "product.cuh"

namespace vae_fast {
namespace engine {
namespace {

// One product for all rows of a minibatch. `samples` of the product's rows: with Epilogue::kAddsSamples the block
// goes through the samples and hands the product of each to the epilogue, else samples are just more rows.
template <class Epilogue>
struct Product {
  Now now;
  Matrix a, b;
  int64_t samples, cols, ks;
  Epilogue epilogue;
  int per_latent = 0;      // see Way
  bool b_settled = false;  // likewise
};

// An epilogue has, for each four of C that a thread gets, a State:
//   fetch(here, state, row, col)           reads what it takes beside the product
//   add(here, state, sample, row, col, v)  with kAddsSamples: takes the sums v, once for every sample
//   finish(here, state, row, col)          writes; returns what is to be added up over columns
//   move(here)                             to the block's model: all pointers
// and `parts`, where those sums go, [parts of columns, parts_stride], unless kSums is false. Without kAddsSamples
// state.value has the sums. All are called for fours inside the matrix only. What fetch reads is a parameter, or was
// written two launches before at the latest.
template <Precision kPrecision, class Shape, bool kBByRow, class Epilogue>
__global__ void __launch_bounds__(Shape::kThreads, Epilogue::kAddsSamples ? 1 : Shape::kBlocks)
    product_kernel(const __grid_constant__ Product<Epilogue> p) {
  float* memory = dynamic_shared();
  const Here here(p.now);
  Epilogue epilogue = p.epilogue;
  epilogue.move(here);
  const Matrix a = here.of_model(p.a), b = here.of_model(p.b);
  const int64_t rows = Epilogue::kAddsSamples ? here.size : here.size * p.samples;
  const int64_t ks = p.per_latent ? p.per_latent * here.own().latents : p.ks;
  const TileOf tile{static_cast<int64_t>(blockIdx.y) * Shape::kRows, static_cast<int64_t>(blockIdx.x) * Shape::kCols,
                    rows, p.cols, ks};
  if (tile.row >= rows) {  // the minibatch is smaller than the largest
    wait_for_earlier_launches();
    return;
  }

  // What the epilogue takes beside the product is there before it, where registers allow it.
  constexpr bool kEarly = Shape::kQuads == 1;
  constexpr bool kHeld = kEarly || Epilogue::kAddsSamples;
  typename Epilogue::State state[kHeld ? Shape::kQuads : 1] = {};
  const auto place = [&](int i) {
    const int four = static_cast<int>(threadIdx.x) + i * Shape::kThreads;
    if (four >= Shape::kRows * Shape::kCols / 4) return Place{rows, p.cols};  // outside
    return Place{tile.row + four / (Shape::kCols / 4), tile.col + four % (Shape::kCols / 4) * 4};
  };
  const auto inside = [&](const Place& at) { return at.row < rows && at.col < p.cols; };
  const auto fetch = [&](const Place& at, typename Epilogue::State& s) {
    if (inside(at)) epilogue.fetch(here, s, at.row, at.col);
  };
  if (kEarly && p.b_settled) fetch(place(0), state[0]);
  const int64_t samples = Epilogue::kAddsSamples ? p.samples : 1;
  for (int64_t sample = 0; sample < samples; ++sample) {
    if (sample > 0) __syncthreads();  // the sums of the sample before have been read
    const auto after_wait = [&] {
      if (kEarly && !p.b_settled) fetch(place(0), state[0]);
    };
    multiply_tile<kPrecision, Shape, true, kBByRow>(memory, a, b, sample * rows, tile, p.b_settled, after_wait,
                                                    [](const float*) {});
    if constexpr (Epilogue::kAddsSamples) {
#pragma unroll
      for (int i = 0; i < Shape::kQuads; ++i) {
        const Place at = place(i);
        const Four<Shape> four(memory, i);
        if (!kEarly && sample == 0) fetch(at, state[i]);
        if (inside(at)) epilogue.add(here, state[i], sample, at.row, at.col, four.value);
      }
    }
  }
  constexpr int kUnrolled = Shape::kQuads < 2 || Epilogue::kAddsSamples ? Shape::kQuads : 2;
#pragma unroll kUnrolled
  for (int i = 0; i < Shape::kQuads; ++i) {
    const Place at = place(i);
    typename Epilogue::State& s = state[kHeld ? i : 0];
    if constexpr (!Epilogue::kAddsSamples) {
      if (!kEarly) fetch(at, s);
      const Four<Shape> four(memory, i);
#pragma unroll
      for (int j = 0; j < 4; ++j) s.value[j] = four.value[j];
    }
    float sum = 0.0f;
    if (inside(at)) sum = epilogue.finish(here, s, at.row, at.col);
    if constexpr (Epilogue::kSums) {
      sum = sum_over_part(sum);
      if (inside(at) && at.col % kPartCols == 0) {
        epilogue.parts[at.col / kPartCols * epilogue.parts_stride + at.row] = sum;
      }
    }
  }
}

// Fours, or as many as there are before `end`
__device__ __forceinline__ void read_some(const float* from, int64_t at, int64_t end, float (&v)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = at + i < end ? from[at + i] : 0.0f;
}

// Mean and log-variance of two neighbours: columns are mean_0, logvar_0, mean_1, ...
struct TwoBiases {
  float mean[2], logvar[2];

  __device__ __forceinline__ void read(const float* bias_mean, const float* bias_logvar, int64_t first, int64_t end) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      mean[i] = first + i < end ? bias_mean[first + i] : 0.0f;
      logvar[i] = first + i < end ? bias_logvar[first + i] : 0.0f;
    }
  }
};

// --- the epilogues ---------------------------------------------------------------------------------------------------

struct ActivateHidden {
  static constexpr bool kAddsSamples = false, kSums = false;
  struct State {
    float value[4], bias[4];
  };
  const float* bias;
  int64_t cols;
  Activation activation;
  float* out;
  int64_t stride;

  __device__ __forceinline__ void move(const Here& here) { here.move(bias, out); }

  __device__ __forceinline__ void fetch(const Here&, State& s, int64_t, int64_t col) const {
    read_some(bias, col, cols, s.bias);
  }

  __device__ __forceinline__ float finish(const Here&, State& s, int64_t row, int64_t col) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s.value[i] = activate(activation, s.value[i] + s.bias[i]);
    }
    write_four(out + row * stride + col, s.value);
    return 0.0f;
  }
};

struct DrawLatents {
  static constexpr bool kAddsSamples = false, kSums = true;
  struct State {
    float value[4], eps[2];  // of the first sample
    TwoBiases bias;
  };
  const float *bias_mu, *bias_logvar;
  int64_t samples, latents;
  const int64_t* seeds;
  Estimator estimator;
  float logvar_scale;
  float* heads;
  int64_t heads_stride;
  float *z, *eps;
  int64_t z_stride;
  float* parts;
  int64_t parts_stride;

  __device__ __forceinline__ void move(const Here& here) {
    here.move(bias_mu, bias_logvar, seeds, heads, z, eps, parts);
  }

  __device__ __forceinline__ float noise(const Here& here, int64_t r, int64_t j) const {
    const int64_t own = here.own().latents;
    return j < own ? philox_normal(seeds[2 * here.step], r * own + j) : 0.0f;
  }

  __device__ __forceinline__ void fetch(const Here& here, State& s, int64_t row, int64_t col) const {
    s.bias.read(bias_mu, bias_logvar, col / 2, latents);
#pragma unroll
    for (int i = 0; i < 2; ++i) s.eps[i] = noise(here, row, col / 2 + i);
  }

  __device__ __forceinline__ float finish(const Here& here, State& s, int64_t row, int64_t col) const {
    float kl = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t j = col / 2 + i;
      if (j >= latents) break;
      const float mu = s.value[2 * i] += s.bias.mean[i];
      const float logvar = s.value[2 * i + 1] = logvar_scale * s.value[2 * i + 1] + s.bias.logvar[i];
      if (estimator == Estimator::sgvb_b) kl += gaussian_kl(mu, logvar);
      float sampled = 0.0f;
      for (int64_t l = 0; l < samples; ++l) {
        const int64_t r = l * here.size + row;
        const float e = l == 0 ? s.eps[i] : noise(here, r, j);
        const float drawn = reparameterize(mu, logvar, e);
        z[r * z_stride + j] = drawn;
        eps[r * z_stride + j] = e;
        sampled += sampled_kl(logvar, e, drawn);
      }
      if (estimator != Estimator::sgvb_b) kl += sampled / static_cast<float>(samples);
    }
    write_four(heads + row * heads_stride + col, s.value);
    return kl;
  }
};

// The gradients of log q(z'|x'), z' given
struct RecogniseDream {
  static constexpr bool kAddsSamples = false, kSums = false;
  struct State {
    float value[4], z[2];
    TwoBiases bias;
  };
  const float *bias_mu, *bias_logvar;
  int64_t latents;
  float logvar_scale;
  const float* z;
  int64_t z_stride;
  float* grad_heads;
  int64_t heads_stride;

  __device__ __forceinline__ void move(const Here& here) { here.move(bias_mu, bias_logvar, z, grad_heads); }

  __device__ __forceinline__ void fetch(const Here&, State& s, int64_t row, int64_t col) const {
    s.bias.read(bias_mu, bias_logvar, col / 2, latents);
#pragma unroll
    for (int i = 0; i < 2; ++i) s.z[i] = col / 2 + i < latents ? z[row * z_stride + col / 2 + i] : 0.0f;
  }

  __device__ __forceinline__ float finish(const Here& here, State& s, int64_t row, int64_t col) const {
    const int64_t own_latents = here.own().latents;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t j = col / 2 + i;
      if (j >= latents) break;
      const float mu = s.value[2 * i] + s.bias.mean[i], logvar = logvar_scale * s.value[2 * i + 1] + s.bias.logvar[i];
      const GaussianResidual<float> residual(mu, logvar, s.z[i]);
      s.value[2 * i] = residual.grad_mean();
      s.value[2 * i + 1] = j < own_latents ? logvar_scale * residual.grad_logvar() : 0.0f;
    }
    write_four(grad_heads + row * heads_stride + col, s.value);
    return 0.0f;
  }
};

// x' ~ p(x|z')
struct DreamBernoulli {
  static constexpr bool kAddsSamples = false, kSums = false;
  struct State {
    float value[4], bias[4];
  };
  const float* bias;
  int64_t cols;
  const int64_t* seeds;
  float* x;
  int64_t x_stride;

  __device__ __forceinline__ void move(const Here& here) { here.move(bias, seeds, x); }

  __device__ __forceinline__ void fetch(const Here&, State& s, int64_t, int64_t col) const {
    read_some(bias, col, cols, s.bias);
  }

  __device__ __forceinline__ float finish(const Here& here, State& s, int64_t row, int64_t col) const {
    const int64_t seed = substream(seeds[2 * here.step], kDreamOfX);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (col + i >= cols) break;
      s.value[i] = bernoulli_draw(seed, row * cols + col + i, sigmoid(s.value[i] + s.bias[i]));
    }
    write_four(x + row * x_stride + col, s.value);
    return 0.0f;
  }
};

struct DreamGaussian {  // columns are mean_0, logvar_0, mean_1, ...
  static constexpr bool kAddsSamples = false, kSums = false;
  struct State {
    float value[4];
    TwoBiases bias;
  };
  const float *bias_mean, *bias_logvar;
  int64_t features;
  bool sigmoid_mean;
  const int64_t* seeds;
  float* x;
  int64_t x_stride;

  __device__ __forceinline__ void move(const Here& here) { here.move(bias_mean, bias_logvar, seeds, x); }

  __device__ __forceinline__ void fetch(const Here&, State& s, int64_t, int64_t col) const {
    s.bias.read(bias_mean, bias_logvar, col / 2, features);
  }

  __device__ __forceinline__ float finish(const Here& here, State& s, int64_t row, int64_t col) const {
    const int64_t seed = substream(seeds[2 * here.step], kDreamOfX);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t d = col / 2 + i;
      if (d >= features) break;
      const float linear = s.value[2 * i] + s.bias.mean[i], logvar = s.value[2 * i + 1] + s.bias.logvar[i];
      const float mean = sigmoid_mean ? sigmoid(linear) : linear;
      x[row * x_stride + d] = reparameterize(mean, logvar, philox_normal(seed, row * features + d));
    }
    return 0.0f;
  }
};

struct BernoulliOutput {
  static constexpr bool kAddsSamples = false, kSums = true;
  struct State {
    float value[4], bias[4], target[4];
  };
  const float* bias;
  int64_t cols;
  const float* x;
  int64_t x_stride;
  float* grad;
  int64_t grad_stride;
  float* parts;
  int64_t parts_stride;

  __device__ __forceinline__ void move(const Here& here) { here.move(bias, x, grad, parts); }

  __device__ __forceinline__ void fetch(const Here& here, State& s, int64_t row, int64_t col) const {
    read_some(bias, col, cols, s.bias);
    read_four(x + row % here.size * x_stride + col, s.target);
  }

  __device__ __forceinline__ float finish(const Here&, State& s, int64_t row, int64_t col) const {
    BernoulliSum<float> sum;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (col + i >= cols) break;
      const float logit = s.value[i] + s.bias[i], odds = bernoulli_odds(logit);
      sum.add(logit, s.target[i], odds);
      s.value[i] = bernoulli_grad_logit(logit, s.target[i], odds);
    }
    write_four(grad + row * grad_stride + col, s.value);
    return sum.log_likelihood();
  }
};

struct GaussianOutput {  // columns are mean_0, logvar_0, mean_1, ...
  static constexpr bool kAddsSamples = false, kSums = true;
  struct State {
    float value[4], target[2];
    TwoBiases bias;
  };
  const float *bias_mean, *bias_logvar;
  int64_t features;
  bool sigmoid_mean;
  const float* x;
  int64_t x_stride;
  float* grad;
  int64_t grad_stride;
  float* parts;
  int64_t parts_stride;

  __device__ __forceinline__ void move(const Here& here) { here.move(bias_mean, bias_logvar, x, grad, parts); }

  __device__ __forceinline__ void fetch(const Here& here, State& s, int64_t row, int64_t col) const {
    s.bias.read(bias_mean, bias_logvar, col / 2, features);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t d = col / 2 + i;
      s.target[i] = d < features ? x[row % here.size * x_stride + d] : 0.0f;
    }
  }

  __device__ __forceinline__ float finish(const Here&, State& s, int64_t row, int64_t col) const {
    float log_likelihood = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t d = col / 2 + i;
      if (d >= features) break;
      const float linear = s.value[2 * i] + s.bias.mean[i], logvar = s.value[2 * i + 1] + s.bias.logvar[i];
      const float mean = sigmoid_mean ? sigmoid(linear) : linear;
      const GaussianResidual<float> residual(mean, logvar, s.target[i]);
      log_likelihood += residual.log_likelihood(logvar);
      const float slope = sigmoid_mean ? -bernoulli_curvature(linear) : 1.0f;
      s.value[2 * i] = residual.grad_mean() * slope;
      s.value[2 * i + 1] = residual.grad_logvar();
    }
    write_four(grad + row * grad_stride + col, s.value);
    return log_likelihood;
  }
};

struct DeriveHidden {
  static constexpr bool kAddsSamples = false, kSums = false;
  struct State {
    float value[4], in[4];
  };
  Activation activation;
  const float* in;
  float* grad_in;
  int64_t stride;

  __device__ __forceinline__ void move(const Here& here) { here.move(in, grad_in); }

  __device__ __forceinline__ void fetch(const Here&, State& s, int64_t row, int64_t col) const {
    read_four(in + row * stride + col, s.in);
  }

  __device__ __forceinline__ float finish(const Here&, State& s, int64_t row, int64_t col) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) s.value[i] = through_activation(activation, s.value[i], s.in[i]);
    write_four(grad_in + row * stride + col, s.value);
    return 0.0f;
  }
};

struct DeriveLatents {
  static constexpr bool kAddsSamples = true, kSums = false;
  struct State {
    float grad[4], grad_eps[4];  // sums over the samples of g and of g eps
    float eps[4];                // of the first sample
    float mu_logvar[2][4];
  };
  Estimator estimator;
  float logvar_scale;
  int64_t samples, latents;
  const float* heads;
  int64_t heads_stride;
  const float *z, *eps;
  int64_t z_stride;
  float* grad_heads;

  __device__ __forceinline__ void move(const Here& here) { here.move(heads, z, eps, grad_heads); }

  __device__ __forceinline__ void fetch(const Here&, State& s, int64_t row, int64_t col) const {
    read_four(eps + row * z_stride + col, s.eps);
    read_four(heads + row * heads_stride + 2 * col, s.mu_logvar[0]);
    if (col + 2 < latents) read_four(heads + row * heads_stride + 2 * col + 4, s.mu_logvar[1]);
  }

  __device__ __forceinline__ void add(const Here& here, State& s, int64_t sample, int64_t row, int64_t col,
                                      const float (&v)[4]) const {
    const int64_t at = (sample * here.size + row) * z_stride + col;
    if (sample > 0) read_four(eps + at, s.eps);
    float drawn[4] = {};
    if (estimator == Estimator::sgvb_a) read_four(z + at, drawn);
    const float beta = here.own().beta;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float g = estimator == Estimator::sgvb_a ? v[i] - beta * drawn[i] : v[i];
      s.grad[i] += g;
      s.grad_eps[i] += g * s.eps[i];
    }
  }

  __device__ __forceinline__ float finish(const Here& here, State& s, int64_t row, int64_t col) const {
    const float mean = 1.0f / static_cast<float>(samples), beta = here.own().beta;
    const int64_t own_latents = here.own().latents;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (col + i >= latents) break;
      const float mu = s.mu_logvar[i / 2][i % 2 * 2], logvar = s.mu_logvar[i / 2][i % 2 * 2 + 1];
      const LatentGradient gradient(estimator, beta, logvar_scale, mu, logvar, mean * s.grad[i], mean * s.grad_eps[i],
                                    col + i < own_latents);
      const int64_t at = row * heads_stride + 2 * (col + i);
      grad_heads[at] = gradient.mu;
      grad_heads[at + 1] = gradient.logvar;
    }
    return 0.0f;
  }
};

// --- the launches ----------------------------------------------------------------------------------------------------

// Whether there are enough tiles of `models` models for most multiprocessors
template <class Shape>
bool fills(int64_t models, int64_t cols, const Way& way) {
  return 4 * models * ceil_div(way.most_rows, Shape::kRows) * ceil_div(cols, Shape::kCols) >= 3 * way.multiprocessors;
}

template <Precision kPrecision, class Shape, bool kBByRow, class Epilogue>
int launch_shape(Product<Epilogue> product, const Way& way) {
  constexpr size_t kBytes = TileMemory<Shape, true, kBByRow>::kBytes;
  const auto kernel = product_kernel<kPrecision, Shape, kBByRow, Epilogue>;
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes))
    return error;
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>(ceil_div(product.cols, Shape::kCols)),
           static_cast<unsigned>(ceil_div(way.most_rows, Shape::kRows)), static_cast<unsigned>(product.now.models));
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = way.stream;
  product.b_settled = way.weights_settled;
  product.per_latent = way.per_latent;
  return launch_kernel(config, kernel, product, way.overlap);
}

template <class Shape, bool kBByRow, class Epilogue>
int launch_product(const Product<Epilogue>& p, const Way& way) {
  return way.precision == Precision::exact ? launch_shape<Precision::exact, Shape, kBByRow>(p, way)
                                           : launch_shape<Precision::fast, Shape, kBByRow>(p, way);
}

// Products as wide as the latents are narrow always, lest padding change them; on a GPU without room for that, Medium.
template <bool kBByRow>
bool narrow_fits(const Way& way) {
  return static_cast<int64_t>(TileMemory<Narrow, true, kBByRow>::kBytes) <= way.shared_bytes;
}

template <bool kBByRow, class Epilogue>
int launch_narrow(const Product<Epilogue>& p, const Way& way) {
  return narrow_fits<kBByRow>(way) ? launch_product<Narrow, kBByRow>(p, way) : launch_product<Medium, kBByRow>(p, way);
}

// The order of a sum goes by one model's size, so that a model's bits are the same alone and among others.
template <bool kBByRow, class Epilogue>
int launch_product(const Product<Epilogue>& p, const Way& way) {
  if (fills<Wide>(1, p.cols, way)) return launch_product<Wide, kBByRow>(p, way);
  if (fills<Medium>(1, p.cols, way)) return launch_product<Medium, kBByRow>(p, way);
  if (narrow_fits<kBByRow>(way) && fills<Broad>(p.now.models, p.cols, way))
    return launch_product<Broad, kBByRow>(p, way);
  return launch_narrow<kBByRow>(p, way);
}

}  // namespace

int64_t column_parts(int64_t cols) { return ceil_div(cols, kPartCols); }

int launch(const HiddenForward& args, const Way& way) {
  const ActivateHidden epilogue{args.bias, args.outs, args.activation, args.out, args.out_stride};
  return launch_product<true>(
      Product<ActivateHidden>{args.now, matrix_of(args.in, args.in_stride), matrix_of(args.weight, args.ins),
                              args.samples, args.outs, args.ins, epilogue},
      way);
}

int launch(const LatentForward& args, const Way& way) {
  const DrawLatents epilogue{args.bias_mu,   args.bias_logvar,  args.samples,  args.latents,      args.now.seeds,
                             args.estimator, args.logvar_scale, args.heads,    args.heads_stride, args.z,
                             args.eps,       args.z_stride,     args.kl_parts, args.parts_stride};
  return launch_narrow<true>(Product<DrawLatents>{args.now, matrix_of(args.in, args.in_stride),
                                                  matrix_of(args.weight_mu, args.ins, args.weight_logvar), 1,
                                                  2 * args.latents, args.ins, epilogue},
                             way);
}

int launch(const Recognise& args, const Way& way) {
  const RecogniseDream epilogue{args.bias_mu, args.bias_logvar, args.latents,    args.logvar_scale,
                                args.z,       args.z_stride,    args.grad_heads, args.heads_stride};
  return launch_narrow<true>(Product<RecogniseDream>{args.now, matrix_of(args.in, args.in_stride),
                                                     matrix_of(args.weight_mu, args.ins, args.weight_logvar), 1,
                                                     2 * args.latents, args.ins, epilogue},
                             way);
}

int launch(const DreamForward& args, const Way& way) {
  const Matrix in = matrix_of(args.in, args.in_stride);
  if (args.likelihood == Likelihood::bernoulli) {
    const DreamBernoulli epilogue{args.bias, args.features, args.now.seeds, args.x, args.x_stride};
    return launch_product<true>(
        Product<DreamBernoulli>{args.now, in, matrix_of(args.weight, args.ins), 1, args.features, args.ins, epilogue},
        way);
  }
  const bool sigmoid_mean = args.likelihood == Likelihood::gaussian_sigmoid_mean;
  const DreamGaussian epilogue{args.bias,      args.bias_logvar, args.features, sigmoid_mean,
                               args.now.seeds, args.x,           args.x_stride};
  return launch_product<true>(Product<DreamGaussian>{args.now, in, matrix_of(args.weight, args.ins, args.weight_logvar),
                                                     1, 2 * args.features, args.ins, epilogue},
                              way);
}

int launch(const OutputForward& args, const Way& way) {
  const Matrix in = matrix_of(args.in, args.in_stride);
  if (args.likelihood == Likelihood::bernoulli) {
    const BernoulliOutput epilogue{args.bias, args.features,    args.x,        args.x_stride,
                                   args.grad, args.grad_stride, args.ll_parts, args.parts_stride};
    return launch_product<true>(Product<BernoulliOutput>{args.now, in, matrix_of(args.weight, args.ins), args.samples,
                                                         args.features, args.ins, epilogue},
                                way);
  }
  const bool sigmoid_mean = args.likelihood == Likelihood::gaussian_sigmoid_mean;
  const GaussianOutput epilogue{args.bias,     args.bias_logvar, args.features,    sigmoid_mean,  args.x,
                                args.x_stride, args.grad,        args.grad_stride, args.ll_parts, args.parts_stride};
  return launch_product<true>(
      Product<GaussianOutput>{args.now, in, matrix_of(args.weight, args.ins, args.weight_logvar), args.samples,
                              2 * args.features, args.ins, epilogue},
      way);
}

int launch(const HiddenBackward& args, const Way& way) {
  const DeriveHidden epilogue{args.activation, args.in, args.grad_in, args.in_stride};
  return launch_product<false>(
      Product<DeriveHidden>{args.now, matrix_of(args.grad, args.grad_stride),
                            matrix_of(args.weight.first, args.weight.stride, args.weight.second), args.samples,
                            args.ins, args.outs, epilogue},
      way);
}

int launch(const LatentBackward& args, const Way& way) {
  const DeriveLatents epilogue{args.estimator, args.logvar_scale, args.samples, args.latents,
                               args.heads,     args.heads_stride, args.z,       args.eps,
                               args.z_stride,  args.grad_heads};
  return launch_narrow<false>(
      Product<DeriveLatents>{args.now, matrix_of(args.grad, args.grad_stride),
                             matrix_of(args.weight.first, args.weight.stride, args.weight.second), args.samples,
                             args.latents, args.outs, epilogue},
      way);
}

}  // namespace engine
}  // namespace vae_fast
