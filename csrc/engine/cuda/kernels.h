// The kernels of a training step on a GPU, each a launch function that can be called alone; schedule.cpp calls them in
// order. No torch headers. Every launch goes to `stream` and returns a cudaError_t, 0 for success.
//
// Of a step: B datapoints and L samples of each; rows of the decoder are l B + b, as in [L, B, ...]. Sizes of buffers
// are for the largest minibatch; a step's own B is read on the device. Rows of buffers begin at multiples of 16 bytes:
// `stride` is the width rounded up to fours. A gradient buffer holds the gradient of sum_l log p(x|z_l), or in the
// encoder of the objective, per datapoint: what divides by B and L, and the sign, come in with the update, so the
// numbers are of order 1 whatever the batch.
//
// A launch does one step of one model, or of several side by side, whose buffers are laid out alike: pointers below are
// the first model's.
#pragma once

#include <cuda_runtime.h>

#include "../../math/optimizer.h"
#include "../network.h"

namespace vae_fast {
namespace engine {

// What models side by side need not have in common. Those with fewer latents than the largest are padded with latents
// whose weights, biases, z, eps and gradients are zero, and stay so.
struct Own {
  double lr;
  int64_t latents;
  float beta;
};

// Which step a kernel does, and of how many models: those blocks whose z is m do model m, which has everything but the
// data m model_bytes behind the first's. The cursor is moved on by `advance`, once for all steps of a graph; `offset`
// is the step's place among them.
struct Now {
  const int64_t* cursor;  // [1]
  int64_t offset;
  const int64_t* sizes;  // [steps]
  const int64_t* seeds;  // [steps, 2]: noise, binarise
  int64_t models, model_bytes;
  const Own* own;  // [1]
};

struct MatrixOf {  // see Matrix in product.cuh; second is null where nothing is paired
  const float *first, *second;
  int64_t stride;
};

// A weight [out, in] or a bias [out], and its optimizer's state
struct Trained {
  float *value, *state0, *state1;
};

// Of one launch: how it multiplies, on which GPU.
struct Way {
  Precision precision;
  int64_t most_rows;  // of any step, for the grid
  int multiprocessors;
  int64_t shared_bytes;  // that a block can have
  cudaStream_t stream;
  // Whether it may begin before the launch ahead of it has ended: it then waits by itself, and what it can do without
  // is done by then.
  bool overlap = false;
  // Whether no launch that is still running changes weights: these are then read before the wait. So it is but for the
  // launch next to an update, for every kernel waits for those ahead of it before it lets the next one begin.
  bool weights_settled = false;
  // Where the sum is over latents, of which models side by side may have fewer: indices for each of them; else 0.
  int per_latent = 0;
};

// x[i, b, d] = scale values[rows[step, b], d] as float for `count` steps from the cursor on, or the draw from
// Bernoulli(that); and the optimizer's factors of each step.
//   bytes: B D (1 read, 4 written) per step; at 4.3 TB/s 0.1 us for 100 x 784. One launch for all steps of a graph.
struct Prepare {
  Now now;  // offset 0
  int64_t count, most_size;
  Data data;
  const int64_t* rows;  // [steps, width]
  int64_t width;
  float* x;  // [count, most_size, x_stride]
  int64_t x_stride;
  Optimizer optimizer;     // but for its lr
  const int64_t* updates;  // [1]: how many updates the parameters had before the cursor was 0
  StepFactors* factors;    // [count]
  float* dream_z;          // [count, most_size, z_stride], z' ~ p(z) of each step of wake_sleep; or null
  int64_t z_stride;
};
int launch(const Prepare& args, cudaStream_t stream);

// out = act(in weight^T + bias), rows [B] or, with `samples`, [L B]
//   100 x 784 -> 500: 78 MFLOP in three terms 0.5 us of the tensor cores' peak; 2 MB read, of which the weight is 1.6;
//   from the L2, by 112 blocks of 16 x 32, 17 MB. Measured on an H200, with what waiting costs: 8.7 us.
struct HiddenForward {
  Now now;
  int64_t samples;  // rows are samples x B: 1 in the encoder
  int64_t ins, outs;
  const float* in;  // [rows, in_stride]
  int64_t in_stride;
  const float *weight, *bias;  // [outs, ins], [outs]
  Activation activation;
  float* out;  // [rows, out_stride]
  int64_t out_stride;
};
int launch(const HiddenForward& args, const Way& way);

// mu = in weight^T + bias, logvar = logvar_scale in weight^T + bias;  z_l = mu + exp(logvar / 2) eps_l, eps element (l
// B + b) Z + j of the noise seed; the summands of KL(q || p), or but for SGVB-B of 1/L sum_l [log q(z_l|x) - log
// p(z_l)], added up over parts of columns.
struct LatentForward {
  Now now;
  Estimator estimator;
  float logvar_scale;
  int64_t samples, ins, latents;
  const float* in;  // [B, in_stride]
  int64_t in_stride;
  const float *weight_mu, *bias_mu, *weight_logvar, *bias_logvar;
  float* heads;  // [B, heads_stride]: mu_0, logvar_0, mu_1, ...
  int64_t heads_stride;
  float *z, *eps;  // [L B, z_stride] each
  int64_t z_stride;
  float* kl_parts;  // [parts of columns, parts_stride >= B]
  int64_t parts_stride;
};
int launch(const LatentForward& args, const Way& way);

// x' ~ p(x|z') of wake_sleep, from the last layer: logits, or mean and logvar
struct DreamForward {
  Now now;
  Likelihood likelihood;
  int64_t ins, features;
  const float* in;  // [B, in_stride]
  int64_t in_stride;
  const float *weight, *bias, *weight_logvar, *bias_logvar;  // the latter two of a Gaussian
  float* x;                                                  // [B, x_stride]
  int64_t x_stride;
};
int launch(const DreamForward& args, const Way& way);

// The gradient of log q(z'|x') of wake_sleep in mu and in what logvar_scale multiplies, from the heads of x'
struct Recognise {
  Now now;
  float logvar_scale;
  int64_t ins, latents;
  const float* in;  // [B, in_stride]
  int64_t in_stride;
  const float *weight_mu, *bias_mu, *weight_logvar, *bias_logvar;
  const float* z;  // [B, z_stride]
  int64_t z_stride;
  float* grad_heads;  // [B, heads_stride]
  int64_t heads_stride;
};
int launch(const Recognise& args, const Way& way);

// logits, or mean and logvar, of the last layer, which stay in registers; log p(x|z) added up over parts of
// columns, and its gradient in them: [L B, D], or [L B, 2 D] as mean_0, logvar_0, mean_1, ...
//   100 x 500 -> 784: as the hidden layer above; writes B D floats of gradient.
struct OutputForward {
  Now now;
  Likelihood likelihood;
  int64_t samples, ins, features;
  const float* in;  // [L B, in_stride]
  int64_t in_stride;
  const float *weight, *bias, *weight_logvar, *bias_logvar;  // the latter two of a Gaussian
  const float* x;                                            // [B, x_stride]
  int64_t x_stride;
  float* grad;  // [L B, grad_stride]
  int64_t grad_stride;
  float* ll_parts;  // [parts of columns, parts_stride >= L B]
  int64_t parts_stride;
};
int launch(const OutputForward& args, const Way& way);

// grad_in = (grad weight) act'(in), the derivative from the stored output `in` of the layer before
struct HiddenBackward {
  Now now;
  int64_t samples, outs, ins;
  const float* grad;  // [rows, grad_stride]
  int64_t grad_stride;
  MatrixOf weight;  // [outs, ins]; paired where grad is
  Activation activation;
  const float* in;  // [rows, in_stride]
  int64_t in_stride;
  float* grad_in;  // [rows, in_stride]
};
int launch(const HiddenBackward& args, const Way& way);

// With g_l = grad weight, the gradient in z_l of log p(x|z_l), less beta z_l with SGVB-A; 1/L sum_l and
//   SGVB-B   grad_mu = g - beta mu,   grad_logvar = g eps sigma / 2 - beta (exp(logvar) - 1) / 2
//   SGVB-A   grad_mu = g,             grad_logvar = g eps sigma / 2 + beta / 2
// and grad_logvar times logvar_scale.
struct LatentBackward {
  Now now;
  Estimator estimator;
  float logvar_scale;
  int64_t samples, outs, latents;
  const float* grad;  // [L B, grad_stride]
  int64_t grad_stride;
  MatrixOf weight;     // [outs, latents]
  const float* heads;  // [B, heads_stride]
  int64_t heads_stride;
  const float *z, *eps;  // [L B, z_stride]
  int64_t z_stride;
  float* grad_heads;  // [B, heads_stride]
};
int launch(const LatentBackward& args, const Way& way);

// A layer's part in the update: weight and bias, or with `paired` those of two layers, whose outputs alternate.
struct UpdateLayer {
  int64_t samples;    // of the rows of grad and in
  int64_t outs, ins;  // outs as in grad: twice a layer's with paired
  const float* grad;  // [rows, grad_stride]
  int64_t grad_stride;
  const float* in;  // [rows, in_stride]
  int64_t in_stride;
  bool paired;
  float logvar_scale;  // every second output's grad is so many times the gradient in its bias
  Trained weight[2], bias[2];
};

// Every weight and bias of up to kMostLayers layers, in place: the gradient -1/(B L) grad^T in (in the encoder -1/B),
// plus weight_prior times the weight, goes from registers into the optimizer. In the same launch, with `terms`, the
// step's (elbo, log_likelihood, kl), from the parts that the forward kernels left.
//   the paper's model with Adagrad: 224 tiles of 64 x 64; 13 MB of parameters and state read and written, 3.0 us at
//   4.3 TB/s, less where they stay in the L2. Measured: 11.8 us, of which a single tile's own latency is most.
constexpr int kMostLayers = 12;
struct Update {
  Now now;
  int layers;
  UpdateLayer layer[kMostLayers];
  UpdateRule rule;
  float weight_prior;
  const StepFactors* factors;  // of this step
  float* terms;                // [steps, 3], or null: no terms in this launch
  int64_t samples;             // L
  int64_t ll_rows, kl_rows;    // of the parts
  const float *ll_parts, *kl_parts;
  int64_t ll_stride, kl_stride;
};
int launch(const Update& args, const Way& way);

// Whether the kernels that the device has loaded were compiled for sm_90 or later: those for less do not wait by
// themselves, and must not overlap.
bool can_overlap();

// Moves the cursors of now's models on by `count` steps.
int advance(int64_t* cursor, const Now& now, int64_t count, cudaStream_t stream);

// Parts of `cols` columns (a Gaussian's and the latents' count double), each of which the forward kernels add up.
int64_t column_parts(int64_t cols);

}  // namespace engine
}  // namespace vae_fast
