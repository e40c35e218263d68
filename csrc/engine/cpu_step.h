// The native training step on a CPU: algorithm 1 of the paper (Kingma & Welling, arXiv:1312.6114), or the wake-sleep
// algorithm, for multi-layer perceptrons, in the parts of cpu/training.h. No torch tensors here; what is allocated is
// kept from step to step.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../cpu/training.h"
#include "network.h"

namespace vae_fast::engine {

// Zeros, on a cache line; grows only, and forgets what it held when it does.
class Buffer {
 public:
  float* at_least(size_t count) {
    if (count > count_) {
      const size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
      if (!memory_) throw std::bad_alloc();
      count_ = count;
      clear();
    }
    return memory_.get();
  }
  void clear() {
    if (count_) std::memset(memory_.get(), 0, count_ * sizeof(float));
  }
  float* data() { return memory_.get(); }
  const float* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  size_t count_ = 0;
};

class CpuStep {
 public:
  CpuStep(const Network& network, const Objective& objective, Precision precision);

  // Takes the parameters, trains, and puts them back; writes one Terms per step. What it computes does not depend on
  // the number of threads, nor on whether it is called in a parallel region, where it has one.
  void run(const std::vector<Parameter>& parameters, const Optimizer& optimizer, const Data& data, const Steps& steps,
           Terms* terms);

  const Network& network() const { return network_; }

 private:
  // One matrix product: the layers that share an input (mu and logvar, mean and logvar) stand side by side.
  struct Layer {
    int64_t inputs;
    std::vector<int64_t> groups;  // outputs of each
    int64_t outputs = 0;          // of all, side by side
    cpu::Epilogue epilogue;
    Buffer weight, bias, state[2], bias_state[2], operand, sums, output, gradient;
    cpu::Matrix in{}, out{}, grad_out{};
  };

  // What a decoder's outputs are compared with: output row r with x's row r mod `rows`; none, and `rows` is 0.
  struct Targets {
    cpu::Matrix x{};
    int64_t rows = 0;
    float scale = 0;  // of the gradients
  };

  void exchange(const std::vector<Parameter>& parameters, const Optimizer& optimizer, bool import);
  void reserve(int64_t batch);
  cpu::Matrix matrix(Buffer& buffer, int64_t rows, int64_t columns) const;
  const float* operand(const Layer& layer) const { return fast_ ? layer.operand.data() : layer.weight.data(); }
  // The first column of the encoder's logvar, in its layer; behind all columns in every other
  int64_t logvar_column(const Layer& layer) const {
    return &layer == &layers_[heads_] ? network_.latent_dim : layer.outputs + tile_.panel;
  }

  Terms step(const Data& data, const int64_t* rows, int64_t batch, const int64_t* seeds, const Optimizer& optimizer,
             int64_t update_number);
  void find_nonzeros(cpu::Matrix x, int64_t batch, bool by_rows);
  int64_t forward(Layer& layer, cpu::Matrix in, int64_t rows, cpu::Epilogue epilogue, const Targets& targets);
  void encode(cpu::Matrix x, int64_t batch);
  int64_t decode(cpu::Matrix z, int64_t rows, const Targets& targets);
  double decode_and_compare(cpu::Matrix z, int64_t rows, int64_t batch);
  void dream(int64_t batch, int64_t seed);
  void input_gradient(size_t i, int64_t rows, cpu::Matrix grad_in);
  void update(int64_t batch, int64_t decoded, const Optimizer& optimizer, int64_t number);

  Network network_;
  Objective objective_;
  bool fast_;
  bool leaves_zeros_out_;  // where it can; `fast` through AMX has no use for it
  cpu::TileShape tile_;
  std::vector<Layer> layers_;  // the encoder's hidden ones, the heads, the decoder's hidden ones, the outputs
  size_t heads_;               // which one that is
  int64_t batch_ = 0;          // what there is room for
  Buffer x_, x_operand_, eps_, z_, grad_z_, dream_of_x_, dream_of_z_;
  cpu::Matrix exact_x_{}, dreamed_x_{}, dreamed_z_{};  // the last two of wake-sleep alone
  std::vector<cpu::WeightGradient> updates_;
  std::vector<int32_t> columns_, per_row_, per_pair_;
  std::vector<cpu::Nonzeros::Pair> pairs_;
  cpu::Nonzeros found_{};
  const cpu::Nonzeros* nonzeros_ = nullptr;  // of the encoder's first layer's input, where they are few
  std::vector<double> log_likelihood_, kl_;
};

}  // namespace vae_fast::engine
