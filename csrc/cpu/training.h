// The parts of a training step on a CPU, in the order in which a step runs them (engine/cpu_step.cpp). Plain pointers
// and sizes. A Matrix is row-major, its rows `ld` floats apart.
//
// Weights, and what an optimizer keeps of them, lie in panels of tile().panel outputs: for each input a row of them, so
// that element (input k, output n) is [n / panel][k][n % panel], with round_up(inputs, panel) rows to a panel. Columns
// that only fill a panel or a matrix up are zero and stay so; rows of a matrix that fill up a tile hold anything. Of a
// last panel that is no more than half full products leave the other half out.
#pragma once

#include "../engine/network.h"
#include "../kernels.h"
#include "../math/optimizer.h"

namespace vae_fast::cpu {

using engine::Activation;

struct Matrix {
  float* data;
  int64_t ld;
};

enum class Epilogue : int8_t { none, tanh, relu, softplus, bernoulli };

struct TileShape {
  int64_t rows, lanes, panel;  // lanes: of a vector; two of them are a panel
  int64_t block;               // a product's rows are cut into so many at a time
  int64_t depth;
  int64_t sparse_rows, sparse_panels;  // of a product that reads lists of nonzeros
};
TileShape tile();                              // of the instruction set in use
enum class MatrixUnit { none, pairs, tiles };  // of bfloat16 products: AVX512_BF16's, of pairs, or AMX's, of tiles
MatrixUnit matrix_unit();
bool on_matrix_unit(bool fast, int64_t rows);  // whether a product of so many rows goes there

// The tiles of a product in one line, for threads to share: block of rows after block, in each panel after panel, in
// each tile after tile, which is as long as it has vectors. A tile belongs to the thread in whose piece it begins.
struct TileLine {
  int64_t rows, block, tile_rows, vectors;

  VAE_FAST_INLINE static int64_t parts(int64_t of, int64_t size) { return (of + size - 1) / size; }
  VAE_FAST_INLINE int64_t panels() const { return parts(vectors, 2); }
  VAE_FAST_INLINE int64_t tiles_down() const {
    return rows / block * parts(block, tile_rows) + parts(rows % block, tile_rows);
  }
  VAE_FAST_INLINE int64_t tiles() const { return tiles_down() * panels(); }
  VAE_FAST_INLINE int64_t length() const { return tiles_down() * vectors; }

  struct Piece {
    int64_t first, last;  // the block's rows
    int64_t panel, vectors;
    int64_t begin, end;  // of the block's rows those in tiles of this piece
    int64_t tile;        // the number of its first tile
  };
  // body(Piece) for what lies in [begin, end)
  template <class Body>
  VAE_FAST_INLINE void pieces(int64_t begin, int64_t end, Body body) const {
    int64_t at = 0, tile = 0;
    for (int64_t first = 0; first < rows; first += block) {
      const int64_t last = first + block < rows ? first + block : rows, down = parts(last - first, tile_rows);
      if (at + down * vectors <= begin) {  // nothing of this block
        at += down * vectors, tile += down * panels();
        continue;
      }
      for (int64_t p = 0; p < panels() && at < end; ++p) {
        const int64_t width = vectors - 2 * p < 2 ? 1 : 2;
        const int64_t from = begin <= at ? 0 : parts(begin - at, width), until = parts(end - at, width);
        const int64_t to = until < down ? until : down;
        if (from < to) {
          const int64_t row_end = first + to * tile_rows;
          body(Piece{first, last, p, width, first + from * tile_rows, row_end < last ? row_end : last, tile + from});
        }
        at += down * width, tile += down;
      }
      if (at >= end) return;
    }
  }
};

// The elements of a minibatch x that are not zero: images have large blank margins, and counts of genes or words are
// zero nearly everywhere. A product with x then reads these alone: by rows, or, for x^T, by pairs of columns, which in
// images are mostly zero together.
struct Nonzeros {
  struct Pair {
    int32_t row;
    float values[2];
  };
  static constexpr int32_t kNoColumn = INT32_MAX;  // behind a row's last
  static constexpr int64_t kSpare = 16;            // columns a row has room for, beyond its own

  int64_t rows, cols;
  int32_t* columns;  // [rows, cols + kSpare] of row r those with an element, from left to right
  int32_t* per_row;  // [rows] how many
  Pair* pairs;       // [half of cols, rows] of columns 2 p and 2 p + 1 the rows with an element, from above to below
  int32_t* per_pair;

  VAE_FAST_INLINE int64_t column_pairs() const { return (cols + 1) / 2; }
  VAE_FAST_INLINE int32_t* of_row(int64_t r) const { return columns + r * (cols + kSpare); }
  VAE_FAST_INLINE Pair* of_pair(int64_t p) const { return pairs + p * rows; }
};

// The lists by rows of x [rows, cols]; and from these the lists by pairs of columns
struct NonzerosOfRows {
  Nonzeros nonzeros;
  Matrix x;
};
struct NonzerosOfColumns {
  static constexpr int64_t kPairs = 8;  // that a thread takes at once
  Nonzeros nonzeros;
  Matrix x;
};

// x[b, :] = values[rows[b], :] * scale, or draws from Bernoulli of that; `operand`, if it is another matrix, the same
// rounded to bfloat16. With them, its nonzeros by rows.
struct Gather {
  DType dtype;  // u8, f32 or bits
  bool dynamic;
  float scale;
  int64_t batch, cols;
  int64_t seed;
  const void* values;
  const int64_t* rows;       // [batch]
  Matrix x, operand;         // [batch, cols]
  const Nonzeros* nonzeros;  // or null
};

// out = epilogue(in W + bias), of the columns from `logvar_column` on epilogue(logvar_scale in W + bias). With
// bernoulli, out[r, :] = scale (sigmoid(l) - x[r mod x_rows, :]) of the logits l, which is the gradient of
// -scale log p(x|z), and log_likelihood has log p(x|z) of each of its tiles.
struct Forward {
  Epilogue epilogue;
  bool fast;
  int64_t rows, inputs, outputs;
  Matrix in;
  const Nonzeros* nonzeros;  // of `in`, or null
  const float* weight;
  const float* bias;  // [whole panels of outputs]
  int64_t logvar_column;
  float logvar_scale;
  Matrix out;
  Matrix x;
  int64_t x_rows;
  float scale;
  double* log_likelihood;  // [tiles_of(this).tiles()]
};
TileLine tiles_of(const Forward& part);

// In place of (mean, logvar): the gradients of -scale log N(x; mean, exp(logvar)), times that of the sigmoid if the
// mean went through one; log_likelihood[r] its sum over a row. logvar starts `half` columns after mean; its gradient is
// times logvar_scale, which is what the product that it came from was multiplied by.
struct GaussianLoss {
  bool sigmoid_mean, fast;
  int64_t rows, cols, half, x_rows;
  Matrix outputs, x;
  float scale, logvar_scale;
  double* log_likelihood;  // [rows]
};

// x[r, :] ~ p(x|z): draws from Bernoulli(sigmoid(logit)), as Gather's of Bernoulli(x), or mean + exp(logvar / 2) eps
struct Dream {
  engine::Likelihood likelihood;
  int64_t rows, cols, half;
  int64_t seed;
  Matrix outputs;
  const float* eps;  // [rows, cols]
  Matrix x;
};

// z[l batch + b, :] = mu + exp(logvar / 2) eps, kl[b] = KL(q || p), or SGVB-A's estimate of it; `half` as above
struct LatentForward {
  bool estimated_kl, fast;
  int64_t batch, latent, half, samples;
  Matrix heads;      // [batch, mu and logvar]
  const float* eps;  // [samples, batch, latent]
  Matrix z;
  double* kl;  // [batch]
};

// In place of (mu, logvar) their gradients, from those of z and kl_scale times that of kl; logvar_scale as above
struct LatentBackward {
  bool estimated_kl, fast;
  int64_t batch, latent, half, samples;
  Matrix heads;
  const float* eps;
  Matrix z, grad_z;
  float kl_scale;  // beta / batch
  float logvar_scale;
};

// grad_in = (grad_out W^T) * the activation's derivative at its value `in`, if there is one
struct InputGradient {
  Epilogue activation;  // none, tanh, relu or softplus
  bool fast;
  int64_t rows, inputs, outputs;
  Matrix grad_out;
  const float* weight;
  Matrix in, grad_in;
};
TileLine tiles_of(const InputGradient& part);

// grad W = in^T grad_out, grad bias = sum_r grad_out, and the update of both. The gradients are never stored, but for
// their sums over the rows so far where there are more than tile().depth rows. From column `logvar_column` on grad_out
// is logvar_scale times the gradient in the bias.
struct WeightGradient {
  int64_t rows, inputs, outputs;
  Matrix in, grad_out;
  int64_t logvar_column;
  float logvar_scale;
  const Nonzeros* nonzeros;  // of `in`, or null
  UpdateRule rule;
  StepFactors factors;
  float prior;  // 1/N of the weight prior, for weights alone
  float *weight, *bias;
  float *state[2], *bias_state[2];
  float* operand;  // fast: the weights rounded to bfloat16, which the products read; or null
  // [outputs in whole panels, round_up(inputs, panel) + tile().rows], or null for no more than tile().depth rows
  float* sums;
};
TileLine tiles_of(const WeightGradient& part);  // of its weights: inputs down, outputs across

// Adagrad on its own, for modules: one pass over parameters, their gradients and sums of squares
struct AdagradUpdate {
  int64_t count;
  UpdateRule rule;
  StepFactors factors;
  const float* grad;
  float *parameter, *sum;
};

// Between panels and torch's order, [outputs, inputs]: of what lies in panels the columns from `column` on.
struct Exchange {
  bool import;  // into panels
  int64_t inputs, outputs, column;
  float *panels, *torch;
};

#define VAE_FAST_FOR_EACH_PART(DO) \
  DO(Gather)                       \
  DO(NonzerosOfRows)               \
  DO(NonzerosOfColumns)            \
  DO(Forward)                      \
  DO(GaussianLoss)                 \
  DO(Dream)                        \
  DO(LatentForward)                \
  DO(LatentBackward)               \
  DO(InputGradient)                \
  DO(WeightGradient)               \
  DO(AdagradUpdate)                \
  DO(Exchange)

// Shared among torch's threads.
#define VAE_FAST_DECLARE(Part) void launch(const Part& part);
VAE_FAST_FOR_EACH_PART(VAE_FAST_DECLARE)
#undef VAE_FAST_DECLARE
void launch(const WeightGradient* parts, int count);  // of several layers at once

}  // namespace vae_fast::cpu
