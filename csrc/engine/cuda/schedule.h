// The training steps of a network on a GPU: the buffers and the order of the launches, many steps to a CUDA graph.
// Plain C++ and the CUDA runtime; step.cpp makes a Python class of it.
//
// A step is these launches, one after another on one stream (the paper's model has eight):
//   for every hidden layer of the encoder   HiddenForward    x -> ... -> h
//   the heads                               LatentForward    h -> mu, logvar, eps, z, KL
//   for every hidden layer of the decoder   HiddenForward    z -> ... -> h'
//   the last layer                          OutputForward    h', x -> log p(x|z) and its gradient
//   back to h'_1                            HiddenBackward   for the last layer and all hidden ones but the first
//   the decoder's first layer               LatentBackward   -> gradient in mu and logvar
//   back to h_1                             HiddenBackward   for the heads and all hidden layers but the first
//   all parameters                          Update           in place, and the step's terms
// With wake_sleep, whose gradients are all taken at the same parameters, these:
//   the encoder, as above, on x; the decoder's hidden layers on z' ~ p(z), DreamForward -> x'; the decoder on z and
//   back to h'_1 as above; the encoder's hidden layers on x'; the heads, Recognise -> gradient in mu and logvar of z'
//   given x'; back to h_1; Update.
// Before them, once for all steps of a graph, Prepare gathers the minibatches; after them `advance` moves the cursor.
//
// Of several models side by side each launch does all. One model is trained where its parameters lie; of several a run
// copies the parameters to the models' own memory and back, where weights that the latents have are padded (Own).
// tests/cuda_schedule.py has the first of these schedules in Python and checks who reads and writes what.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <string>
#include <vector>

#include "kernels.h"
#include "persistent.h"

namespace vae_fast {
namespace engine {

// A buffer of float by name, for tests
struct Buffer {
  std::string name;
  float* values;  // [rows, stride], of which cols are used
  int64_t rows, cols, stride;
};

// A model, its parameters as network.h numbers them
struct Model {
  Own own;
  std::vector<Trained> parameters;
};

struct Gpu {
  int multiprocessors;
  int shared_bytes;         // that a block can have
  bool overlap;             // see Way
  bool persistent = false;  // whether persistent.h takes the steps that it can
  bool timed = false;       // and counts the cycles of its phases
  bool cooperative = true;  // whether it has what that kernel is made of
};

// Of the last launch of persistent.h: what a block spent in a phase of a step on average, in cycles of its
// multiprocessor.
struct Phase {
  std::string name;
  bool encoder;
  std::vector<double> cycles;  // of each block
};

class Schedule {
 public:
  // `network` has the latents of the model with most; the lr of `optimizer` and the beta of `objective` are not read.
  // `workspace` is asked once, for memory that lasts as long as this object. Steps come in calls of up to most_steps,
  // each of up to most_size datapoints.
  Schedule(const Network& network, const Objective& objective, const Optimizer& optimizer, const Data& data,
           Precision precision, std::vector<Model> models, int64_t most_size, int64_t most_steps, const Gpu& gpu,
           const cuda::Workspace& workspace);
  ~Schedule();
  Schedule(const Schedule&) = delete;
  Schedule& operator=(const Schedule&) = delete;

  // The next steps of every model; returns a cudaError_t when they are done. `steps` has for each model as many steps
  // of the same width. Terms on the host: [models, n_steps, 3].
  int run(const std::vector<Steps>& steps, float* terms, cudaStream_t stream);

  // Of the first model; those of model m lie m model_bytes() further on.
  const std::vector<Buffer>& buffers() const { return buffers_; }
  int64_t model_bytes() const { return model_bytes_; }
  int64_t steps_per_graph() const { return group_; }
  int64_t launches_per_step() const { return launches_; }
  // Why the next steps are taken by the launches above; empty: persistent.h takes them.
  const std::string& why_not_persistent() const { return why_not_persistent_; }
  bool persistent() const { return why_not_persistent_.empty(); }
  const std::vector<Phase>& phases() const { return phases_; }  // where Gpu::timed

 private:
  struct Layer {
    int64_t ins, outs;
    int first_parameter;  // its weight; the bias follows
    bool paired;          // mu and logvar: outs outputs each
    float* out;           // [rows, stride]: what the next layer takes; null for the last
    float* grad;          // [rows, grad_stride]: in what comes out before the activation
    int64_t stride, grad_stride;
  };

  int64_t models() const { return static_cast<int64_t>(models_.size()); }
  void lay_out(const cuda::Workspace& workspace);
  template <class T>
  T* of_model(T* p, size_t model) const {
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(p) + model * static_cast<size_t>(model_bytes_));
  }
  int exchange(bool import, cudaStream_t stream);
  int load(const std::vector<Steps>& steps, int64_t begin, int64_t count, cudaStream_t stream);
  Now now(int64_t offset) const;
  int launch_steps(int64_t count, cudaStream_t stream);
  int launch_step(int64_t offset, cudaStream_t stream);
  int launch_update(int64_t offset, const float* x, const Way& way);
  int graph_of(int64_t count, cudaGraphExec_t& graph);
  int read_phases(const persistent::Sizes& sizes, const persistent::Exchanged& exchanged, int64_t steps,
                  cudaStream_t stream);
  int run_persistent(int64_t count, int64_t& done, cudaStream_t stream);
  MatrixOf weight_of(const Layer& layer) const;

  Network network_;
  Objective objective_;
  Optimizer optimizer_;
  Data data_;
  Precision precision_;
  std::vector<Model> models_;
  std::vector<Trained> parameters_;  // of the first model, where the kernels find them
  int64_t most_size_, most_steps_, group_, launches_ = 0, model_bytes_ = 0;
  Gpu gpu_;
  std::string why_not_persistent_;
  char* exchanged_ = nullptr;  // of persistent.h
  std::vector<Phase> phases_;

  std::vector<Layer> encoder_, decoder_;           // the last of the encoder are the heads, of the decoder the output
  float *dream_x_ = nullptr, *dream_z_ = nullptr;  // of wake_sleep
  float *x_ = nullptr, *z_ = nullptr, *eps_ = nullptr, *ll_parts_ = nullptr, *kl_parts_ = nullptr;
  int64_t x_stride_ = 0, z_stride_ = 0, ll_stride_ = 0, kl_stride_ = 0;
  Own* own_ = nullptr;
  StepFactors* factors_ = nullptr;
  int64_t *cursor_ = nullptr, *updates_ = nullptr, *rows_ = nullptr, *sizes_ = nullptr, *seeds_ = nullptr;
  float* terms_ = nullptr;
  struct Start {
    int64_t cursor, updates;
  };
  std::vector<Start> starts_;  // of each model's next steps
  std::vector<Buffer> buffers_;

  bool warm_ = false;  // whether any step has been launched
  cudaStream_t capture_stream_ = nullptr;
  std::map<int64_t, cudaGraphExec_t> graphs_;  // by number of steps
};

}  // namespace engine
}  // namespace vae_fast
