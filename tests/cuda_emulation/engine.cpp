// The engine of csrc/engine/cuda on the emulated device, for tests/test_cuda_engine.py to call through ctypes.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/engine/cuda/schedule.h"

using namespace vae_fast;
using namespace vae_fast::engine;

namespace {

struct Engine {
  std::vector<Model> models;
  void* values = nullptr;
  void* workspace = nullptr;
  Schedule* schedule = nullptr;
};

template <class T>
T* on_device(const T* from, int64_t count) {
  void* p = nullptr;
  cudaMalloc(&p, static_cast<size_t>(count) * sizeof(T));
  if (from) std::memcpy(p, from, static_cast<size_t>(count) * sizeof(T));
  return static_cast<T*>(p);
}

}  // namespace

extern "C" {

struct Description {
  int64_t data_dim, encoder_layers, decoder_layers;
  const int64_t *encoder_hidden, *decoder_hidden;
  int64_t activation, likelihood, estimator, num_samples, precision;
  double weight_prior, logvar_scale;
  int64_t optimizer;
  double eps, beta1, beta2, momentum, weight_decay;
  int64_t accumulate_steps;
  int64_t data_dtype, dynamic, data_rows, data_bytes;
  double scale;
  const void* data;
  int64_t most_size, most_steps, multiprocessors, shared_bytes, persistent;
  int64_t n_models, n_parameters;
  const int64_t* latents;          // of each model
  const double *betas, *lrs;       // of each model
  const int64_t* counts;           // of each model's parameters
  const float* const* parameters;  // likewise
};

void* engine_create(const Description* d) {
  Network network{d->data_dim,
                  *std::max_element(d->latents, d->latents + d->n_models),
                  {},
                  {},
                  static_cast<Activation>(d->activation),
                  static_cast<Likelihood>(d->likelihood),
                  static_cast<float>(d->logvar_scale)};
  network.encoder_hidden.assign(d->encoder_hidden, d->encoder_hidden + d->encoder_layers);
  network.decoder_hidden.assign(d->decoder_hidden, d->decoder_hidden + d->decoder_layers);
  const Objective objective{static_cast<Estimator>(d->estimator), d->num_samples, 1.0f,
                            static_cast<float>(d->weight_prior)};
  const Optimizer optimizer{static_cast<OptimizerKind>(d->optimizer),
                            d->lrs[0],
                            d->eps,
                            d->beta1,
                            d->beta2,
                            d->momentum,
                            d->weight_decay,
                            d->accumulate_steps};
  auto* engine = new Engine;
  engine->values = on_device(static_cast<const char*>(d->data), d->data_bytes);
  const Data data{static_cast<DType>(d->data_dtype),
                  d->dynamic != 0,
                  static_cast<float>(d->scale),
                  d->data_rows,
                  d->data_dim,
                  engine->values};
  for (int64_t m = 0, i = 0; m < d->n_models; ++m) {
    Model model{{d->lrs[m], d->latents[m], static_cast<float>(d->betas[m])}, {}};
    for (const int64_t end = i + d->n_parameters; i < end; ++i) {
      Trained trained{on_device(d->parameters[i], d->counts[i]), nullptr, nullptr};
      if (optimizer.states() > 0) trained.state0 = on_device<float>(nullptr, d->counts[i]);
      if (optimizer.states() > 1) trained.state1 = on_device<float>(nullptr, d->counts[i]);
      model.parameters.push_back(trained);
    }
    engine->models.push_back(model);
  }
  emulation::most_shared_bytes() = static_cast<size_t>(d->shared_bytes);
  engine->schedule = new Schedule(network, objective, optimizer, data, static_cast<Precision>(d->precision),
                                  engine->models, d->most_size, d->most_steps,
                                  Gpu{static_cast<int>(d->multiprocessors), static_cast<int>(d->shared_bytes), false,
                                      d->persistent != 0},
                                  [engine](size_t bytes) {
                                    // What nobody has written is NaN.
                                    engine->workspace = on_device<char>(nullptr, static_cast<int64_t>(bytes));
                                    std::memset(engine->workspace, 0xff, bytes);
                                    return engine->workspace;
                                  });
  return engine;
}

// Of every model one after another: rows, sizes, seeds, terms
int engine_run(void* engine, const int64_t* rows, int64_t width, const int64_t* sizes, const int64_t* seeds,
               int64_t n_steps, int64_t updates, float* terms) {
  std::vector<Steps> steps;
  for (size_t m = 0; m < static_cast<Engine*>(engine)->models.size(); ++m) {
    steps.push_back({n_steps, width, rows, sizes, seeds, updates});
    rows += n_steps * width;
    sizes += n_steps;
    seeds += 2 * n_steps;
  }
  return static_cast<Engine*>(engine)->schedule->run(steps, terms, nullptr);
}

// What a parameter (0) or a state of it (1, 2) of a model holds
void engine_parameter(void* engine, int64_t model, int64_t index, int64_t which, int64_t count, float* to) {
  const auto& models = static_cast<Engine*>(engine)->models;
  const Trained& trained = models[static_cast<size_t>(model)].parameters[static_cast<size_t>(index)];
  const float* from[] = {trained.value, trained.state0, trained.state1};
  std::memcpy(to, from[which], static_cast<size_t>(count) * sizeof(float));
}

// The i-th buffer of the first model: its name (null beyond the last), place and shape
const char* engine_buffer(void* engine, int64_t i, float** values, int64_t* rows, int64_t* cols, int64_t* stride) {
  const std::vector<Buffer>& buffers = static_cast<Engine*>(engine)->schedule->buffers();
  if (i >= static_cast<int64_t>(buffers.size())) return nullptr;
  const Buffer& buffer = buffers[static_cast<size_t>(i)];
  *values = buffer.values;
  *rows = buffer.rows;
  *cols = buffer.cols;
  *stride = buffer.stride;
  return buffer.name.c_str();
}

int64_t engine_launches_per_step(void* engine) { return static_cast<Engine*>(engine)->schedule->launches_per_step(); }

const char* engine_why_not_persistent(void* engine) {
  return static_cast<Engine*>(engine)->schedule->why_not_persistent().c_str();
}

void engine_turns(int64_t backwards, int64_t slow_block) { emulation::turns() = {backwards != 0, slow_block}; }

void engine_destroy(void* engine) {
  auto* e = static_cast<Engine*>(engine);
  delete e->schedule;
  for (const Model& model : e->models) {
    for (const Trained& trained : model.parameters) {
      cudaFree(trained.value);
      cudaFree(trained.state0);
      cudaFree(trained.state1);
    }
  }
  cudaFree(e->values);
  cudaFree(e->workspace);
  delete e;
}

}  // extern "C"
