// Training steps by one kernel that stays on the GPU: every block keeps its part of the parameters and of their
// optimizer's state in registers and shared memory for all the steps of a launch, and blocks exchange what the next
// layer needs. No launch is waited for inside a step, nor do parameters move.
//
// For one model of one hidden layer each side, a Bernoulli decoder and one sample of z, of data in bytes or bits, whose
// parts find a block each: a block of the encoder has 8 hidden units, one of the decoder 8 hidden units and 16 pixels.
// The paper's MNIST model has 63 + 63 blocks. Everything else is schedule.h's launches.
//
// Of a step, with what is waited for (events of persistent.cu), blocks of the encoder left, of the decoder right:
//   h = act(W x + b), own units; summands of mu, logvar
//     heads:  mu, logvar, z, KL of own datapoints
//                                                     z:       h' = act(W' z + b'), own units
//                                                     hidden:  logits of own pixels, log p(x|z), their gradient g
//                                                     logits:  gradient in own units of h', summands of that in z
//     latents: gradient in mu, logvar of own datapoints        then, while the encoder goes on, the decoder's update
//     done:    gradient in own units of h, the encoder's update
// mu, logvar and the gradient in z are sums over units; each block adds up its own, the datapoint's owner adds the
// blocks', in their order. So every sum has one order, whatever the timing.
//
// Products are those of half precision on tensor cores: `exact` splits each operand, a scaled by a power of two, into
// hi + lo of 11 bits each and takes lo hi + hi lo + hi hi, 16 k at a time, which ordinary additions add up; bytes are
// exact as they are. `fast` takes hi alone. A scaled operand beyond the range of a half makes a launch change
// nothing: out_of_range() says so, and from there on the steps are schedule.h's.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "kernels.h"

namespace vae_fast {
namespace engine {
namespace persistent {

// A layer's weight [out, in] and bias with their states; mu and logvar are two
struct Parameters {
  Trained encoder_weight, encoder_bias;
  Trained head_weight[2], head_bias[2];  // mu, logvar
  Trained decoder_weight, decoder_bias;
  Trained output_weight, output_bias;
};

struct Sizes {
  int data_dim, latents, encoder_units, decoder_units;
  int most_size, rows;  // of a minibatch; rounded up to 16
  int row_bytes;        // of a minibatch's row of pixels: 16 times an odd number
  int encoder_blocks, decoder_blocks, hidden_blocks, output_blocks;  // of the decoder's, those that have such a part
};

// What blocks exchange and the launch leaves. Halves lie as bulk copies take them: chunks of 64 columns, of each the
// hi of 128 rows and then their lo, a row of 128 bytes in pieces of 16 that swap places (see `piece_of`). Z' is Z
// rounded up to fours. Parts are 2, or 1 with `fast`.
struct Exchanged {
  uint8_t* x;         // [steps, most_size, row_bytes]
  float* head_parts;  // [most_size, encoder_blocks, 2 Z]
  float* z;           // [most_size, Z']
  uint16_t* hidden;   // h', two of them, in turns: [2, chunks, parts, 128, 64]
  uint16_t* grad;     // [chunks, parts, 128, 64]
  float* z_parts;     // [most_size, hidden_blocks, Z']: of the gradient in z
  float* head_grads;  // [2 Z, 132]: mu's and then logvar's, of each the datapoints'
  uint16_t* columns;  // [hidden_blocks, parts, 8, own_columns]: the output's weights of own units
  double* ll_parts;   // [steps, output_blocks]
  float* kl_parts;    // [steps, most_size]
  uint32_t* events;   // each on a line of its own; the last is not 0 if a half was too small for a number
  int64_t* cycles;    // [blocks, kPhases]: what the last launch spent in each phase, by its first thread's clock
};

// What a block is at, one after another in a step: at computing something, or at waiting for others. See `phase_name`.
constexpr int kPhases = 16;
const char* phase_name(bool encoder, int phase);

struct Launch {
  Sizes sizes;
  Exchanged exchanged;
  Parameters parameters;
  Precision precision;
  Activation activation;
  Estimator estimator;
  float logvar_scale, beta, weight_prior, x_scale;
  UpdateRule rule;
  const int64_t *size, *seeds;  // [steps], [steps, 2]
  const StepFactors* factors;   // [steps]
  int64_t steps;
  bool timed;  // whether cycles are counted
};

// Why steps cannot be taken so, in a few words, or nothing
std::string why_not(const Network& network, const Objective& objective, const Data& data, Precision precision,
                    int64_t models, int64_t most_size, int multiprocessors, int shared_bytes);
Sizes sizes_of(const Network& network, int64_t most_size);
Parameters parameters_of(const std::vector<Trained>& parameters);

// Steps of a launch at most; on the emulated device few, so that tests have runs of several launches.
#if defined(VAE_FAST_CUDA_EMULATION)
constexpr int64_t kMostSteps = 2;
#else
constexpr int64_t kMostSteps = 1000;
#endif
// The bytes that Exchanged takes for so many steps, and where they lie in memory that begins at a multiple of 256 bytes
int64_t bytes_of(const Sizes& sizes, int64_t most_steps);
Exchanged lay_out(const Sizes& sizes, int64_t most_steps, void* memory);

// The minibatches of `steps` steps from the cursor on, as bytes, and the optimizer's factors; kernels.h's Prepare with
// the members that there mean the same.
struct Gather {
  Now now;
  int64_t steps, most_size;
  Data data;
  const int64_t* rows;
  int64_t width;
  uint8_t* x;
  int64_t row_bytes;
  Optimizer optimizer;
  const int64_t* updates;
  StepFactors* factors;
};
int launch(const Gather& gather, cudaStream_t stream);
// All steps; and then their terms, [steps, 3].
int launch(const Launch& launch, float* terms, cudaStream_t stream);
// Once they are done: whether a number was beyond the range of a half. Parameters and states are then as before.
int out_of_range(const Launch& launch, bool& found, cudaStream_t stream);

}  // namespace persistent
}  // namespace engine
}  // namespace vae_fast
