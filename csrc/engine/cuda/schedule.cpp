#include "schedule.h"

#include <algorithm>
#include <utility>

#include "../update_rule.h"

namespace vae_fast {
namespace engine {
namespace {

constexpr int64_t kStepsPerGraph = 50;                  // a launch of a graph, some microseconds, is shared by so many
constexpr int64_t kMinibatchFloats = int64_t{4} << 20;  // of x in a graph's steps: 16 MB, so that it stays in the L2
constexpr int64_t kWord = sizeof(int64_t);
constexpr size_t kMostGraphs = 4;  // beyond them steps are launched as they are

int64_t to_fours(int64_t n) { return (n + 3) / 4 * 4; }

}  // namespace

// --- buffers ---------------------------------------------------------------------------------------------------------

Schedule::Schedule(const Network& network, const Objective& objective, const Optimizer& optimizer, const Data& data,
                   Precision precision, std::vector<Model> models, int64_t most_size, int64_t most_steps,
                   const Gpu& gpu, const cuda::Workspace& workspace)
    : network_(network),
      objective_(objective),
      optimizer_(optimizer),
      data_(data),
      precision_(precision),
      models_(std::move(models)),
      most_size_(most_size),
      most_steps_(most_steps),
      group_(std::clamp<int64_t>(kMinibatchFloats / (this->models() * most_size * to_fours(data.cols)), 1,
                                 kStepsPerGraph)),
      gpu_(gpu),
      why_not_persistent_(!gpu.persistent    ? "nobody asked for it"
                          : !gpu.cooperative ? "a GPU before sm_90"
                                             : persistent::why_not(network, objective, data, precision, this->models(),
                                                                   most_size, gpu.multiprocessors, gpu.shared_bytes)) {
  int parameter = 0;
  const auto add = [&](std::vector<Layer>& layers, int64_t ins, int64_t outs, bool paired) {
    layers.push_back({ins, outs, parameter, paired, nullptr, nullptr, 0, 0});
    parameter += paired ? 4 : 2;
    return outs;
  };
  int64_t width = network_.data_dim;
  for (int64_t outs : network_.encoder_hidden) width = add(encoder_, width, outs, false);
  add(encoder_, width, network_.latent_dim, true);
  width = network_.latent_dim;
  for (int64_t outs : network_.decoder_hidden) width = add(decoder_, width, outs, false);
  add(decoder_, width, network_.data_dim, network_.likelihood != Likelihood::bernoulli);
  group_ = std::min(group_, most_steps_);
  lay_out(workspace);
}

Schedule::~Schedule() {
  for (auto& [count, graph] : graphs_) cudaGraphExecDestroy(graph);
  if (capture_stream_) cudaStreamDestroy(capture_stream_);
}

// Every buffer begins at a multiple of 256 bytes of one allocation, which has a part for every model.
void Schedule::lay_out(const cuda::Workspace& workspace) {
  std::vector<std::pair<void**, size_t>> places;
  const auto place = [&](auto*& pointer, int64_t count) {
    places.emplace_back(reinterpret_cast<void**>(&pointer), static_cast<size_t>(count) * sizeof *pointer);
  };
  const auto matrix = [&](const std::string& name, float*& pointer, int64_t rows, int64_t cols, int64_t& stride) {
    stride = to_fours(cols);
    place(pointer, rows * stride);
    buffers_.push_back({name, nullptr, rows, cols, stride});
  };
  buffers_.reserve(64);
  const int64_t decoder_rows = objective_.num_samples * most_size_;
  matrix("x", x_, group_ * most_size_, data_.cols, x_stride_);
  matrix("z", z_, decoder_rows, network_.latent_dim, z_stride_);
  matrix("eps", eps_, decoder_rows, network_.latent_dim, z_stride_);
  if (objective_.estimator == Estimator::wake_sleep) {
    matrix("dream x", dream_x_, most_size_, data_.cols, x_stride_);
    matrix("dream z", dream_z_, group_ * most_size_, network_.latent_dim, z_stride_);
  }
  for (auto* layers : {&encoder_, &decoder_}) {
    const std::string half = layers == &encoder_ ? "encoder" : "decoder";
    const int64_t rows = layers == &encoder_ ? most_size_ : decoder_rows;
    for (size_t i = 0; i < layers->size(); ++i) {
      Layer& layer = (*layers)[i];
      const int64_t cols = layer.paired ? 2 * layer.outs : layer.outs;
      const bool last = i + 1 == layers->size();
      const std::string name = half + (!last ? "." + std::to_string(i) : half == "encoder" ? ".heads" : ".output");
      if (!last || half == "encoder") matrix(name, layer.out, rows, cols, layer.stride);
      matrix("grad " + name, layer.grad, rows, cols, layer.grad_stride);
    }
  }
  const Layer& output = decoder_.back();
  const int64_t output_cols = output.paired ? 2 * output.outs : output.outs;
  matrix("ll_parts", ll_parts_, column_parts(output_cols), decoder_rows, ll_stride_);
  matrix("kl_parts", kl_parts_, column_parts(2 * network_.latent_dim), most_size_, kl_stride_);
  parameters_ = models_[0].parameters;
  starts_.resize(models_.size());
  if (models() > 1) {
    const auto shapes = parameter_shapes(network_);
    for (size_t i = 0; i < shapes.size(); ++i) {
      const int64_t count = shapes[i].size() == 2 ? shapes[i][0] * shapes[i][1] : shapes[i][0];
      for (float** tensor : {&parameters_[i].value, &parameters_[i].state0, &parameters_[i].state1}) {
        if (*tensor) place(*tensor, count);
      }
    }
  }
  place(own_, 1);
  const int64_t persistent_steps = std::min(most_steps_, persistent::kMostSteps);
  place(factors_, persistent() ? std::max(persistent_steps, group_) : group_);
  if (persistent())
    place(exchanged_, persistent::bytes_of(persistent::sizes_of(network_, most_size_), persistent_steps));
  place(cursor_, 1);
  place(updates_, 1);
  place(rows_, most_steps_ * most_size_);
  place(sizes_, most_steps_);
  place(seeds_, 2 * most_steps_);
  place(terms_, 3 * most_steps_);

  for (auto& [pointer, size] : places) model_bytes_ += static_cast<int64_t>((size + 255) / 256 * 256);
  char* memory = static_cast<char*>(workspace(static_cast<size_t>(models() * model_bytes_)));
  for (auto& [pointer, size] : places) {
    *pointer = memory;
    memory += (size + 255) / 256 * 256;
  }
  for (size_t i = 0; i < buffers_.size(); ++i) buffers_[i].values = static_cast<float*>(*places[i].first);
}

// --- a step ----------------------------------------------------------------------------------------------------------

Now Schedule::now(int64_t offset) const { return {cursor_, offset, sizes_, seeds_, models(), model_bytes_, own_}; }

MatrixOf Schedule::weight_of(const Layer& layer) const {
  const size_t first = static_cast<size_t>(layer.first_parameter);
  return {parameters_[first].value, layer.paired ? parameters_[first + 2].value : nullptr, layer.ins};
}

int Schedule::launch_step(int64_t offset, cudaStream_t stream) {
  const Now at = now(offset);
  const int64_t samples = objective_.num_samples;
  const Way encoder_way{precision_, most_size_, gpu_.multiprocessors, gpu_.shared_bytes, stream, gpu_.overlap};
  const Way decoder_way{precision_, samples * most_size_, gpu_.multiprocessors, gpu_.shared_bytes,
                        stream,     gpu_.overlap};
  const float* x = x_ + offset * most_size_ * x_stride_;
  const auto parameter = [&](const Layer& layer, int i) {
    return parameters_[static_cast<size_t>(layer.first_parameter + i)].value;
  };
  launches_ = 0;
  int error = 0;
  const auto go = [&](const auto& args, Way way, int per_latent = 0) {
    way.weights_settled = launches_++ > 0;  // the first comes right after an update
    way.per_latent = per_latent;
    if (!error) error = launch(args, way);
  };
  // See Way. Of a single model all latents are its own.
  const auto per_latent = [&](const Layer& from) { return models() > 1 && &from == &decoder_.front() ? 1 : 0; };
  const auto forward = [&](const std::vector<Layer>& layers, const float* in, int64_t stride, const Way& way) {
    const int64_t rows = &layers == &encoder_ ? 1 : samples;
    for (size_t i = 0; i + 1 < layers.size(); ++i) {
      const Layer& layer = layers[i];
      go(HiddenForward{at, rows, layer.ins, layer.outs, in, stride, parameter(layer, 0), parameter(layer, 1),
                       network_.activation, layer.out, layer.stride},
         way, per_latent(layer));
      in = layer.out;
      stride = layer.stride;
    }
    return std::pair(in, stride);
  };
  const auto backward = [&](const std::vector<Layer>& layers, const Way& way) {
    const int64_t rows = &layers == &encoder_ ? 1 : samples;
    for (size_t i = layers.size() - 1; i > 0; --i) {
      const Layer &layer = layers[i], &below = layers[i - 1];
      go(HiddenBackward{at, rows, layer.paired ? 2 * layer.outs : layer.outs, layer.ins, layer.grad, layer.grad_stride,
                        weight_of(layer), network_.activation, below.out, below.stride, below.grad},
         way, models() > 1 && &layer == &encoder_.back() ? 2 : 0);
    }
  };

  const bool wake_sleep = objective_.estimator == Estimator::wake_sleep;
  const Layer &heads = encoder_.back(), &output = decoder_.back(), &first = decoder_.front();
  const float *weight_logvar = output.paired ? parameter(output, 2) : nullptr,
              *bias_logvar = output.paired ? parameter(output, 3) : nullptr;
  const auto [h, h_stride] = forward(encoder_, x, x_stride_, encoder_way);
  go(LatentForward{at, objective_.estimator, network_.logvar_scale, samples, heads.ins, heads.outs, h, h_stride,
                   parameter(heads, 0), parameter(heads, 1), parameter(heads, 2), parameter(heads, 3), heads.out,
                   heads.stride, z_, eps_, z_stride_, kl_parts_, kl_stride_},
     encoder_way);
  const float* dream_z = wake_sleep ? dream_z_ + offset * most_size_ * z_stride_ : nullptr;
  if (wake_sleep) {  // before the decoder is wanted with z, whose activations the update reads
    const auto [dreamed, stride] = forward(decoder_, dream_z, z_stride_, decoder_way);
    go(DreamForward{at, network_.likelihood, output.ins, output.outs, dreamed, stride, parameter(output, 0),
                    parameter(output, 1), weight_logvar, bias_logvar, dream_x_, x_stride_},
       decoder_way, per_latent(output));
  }
  const auto [last, last_stride] = forward(decoder_, z_, z_stride_, decoder_way);
  go(OutputForward{at, network_.likelihood, samples, output.ins, output.outs, last, last_stride, parameter(output, 0),
                   parameter(output, 1), weight_logvar, bias_logvar, x, x_stride_, output.grad, output.grad_stride,
                   ll_parts_, ll_stride_},
     decoder_way, per_latent(output));
  backward(decoder_, decoder_way);
  if (wake_sleep) {
    const auto [seen, stride] = forward(encoder_, dream_x_, x_stride_, encoder_way);
    go(Recognise{at, network_.logvar_scale, heads.ins, heads.outs, seen, stride, parameter(heads, 0),
                 parameter(heads, 1), parameter(heads, 2), parameter(heads, 3), dream_z, z_stride_, heads.grad,
                 heads.grad_stride},
       encoder_way);
  } else {
    go(LatentBackward{at, objective_.estimator, network_.logvar_scale, samples,
                      first.paired ? 2 * first.outs : first.outs, network_.latent_dim, first.grad, first.grad_stride,
                      weight_of(first), heads.out, heads.stride, z_, eps_, z_stride_, heads.grad},
       encoder_way);
  }
  backward(encoder_, encoder_way);
  if (!error) error = launch_update(offset, wake_sleep ? dream_x_ : x, decoder_way);
  return error;
}

// `x`: what the encoder's first layer took
int Schedule::launch_update(int64_t offset, const float* x, const Way& way) {
  Update update = {};
  update.now = now(offset);
  update.rule = rule_of(optimizer_);
  update.weight_prior = objective_.weight_prior;
  update.factors = factors_ + offset;
  update.samples = objective_.num_samples;
  const Layer& output = decoder_.back();
  update.ll_rows = column_parts(output.paired ? 2 * output.outs : output.outs);
  update.kl_rows = column_parts(2 * network_.latent_dim);
  update.ll_parts = ll_parts_;
  update.kl_parts = kl_parts_;
  update.ll_stride = ll_stride_;
  update.kl_stride = kl_stride_;

  // The largest layers first would be fairest; the last layer of the decoder is, and so is the encoder's first.
  std::vector<UpdateLayer> layers;
  for (auto* half : {&decoder_, &encoder_}) {
    const bool encoder = half == &encoder_;
    const float* in = encoder ? x : z_;
    int64_t stride = encoder ? x_stride_ : z_stride_;
    for (const Layer& layer : *half) {
      const auto trained = [&](int i) { return parameters_[static_cast<size_t>(layer.first_parameter + i)]; };
      UpdateLayer part = {};
      part.samples = encoder ? 1 : objective_.num_samples;
      part.outs = layer.paired ? 2 * layer.outs : layer.outs;
      part.ins = layer.ins;
      part.grad = layer.grad;
      part.grad_stride = layer.grad_stride;
      part.in = in;
      part.in_stride = stride;
      part.paired = layer.paired;
      part.logvar_scale = &layer == &encoder_.back() ? network_.logvar_scale : 1.0f;
      for (int i = 0; i < (layer.paired ? 2 : 1); ++i) {
        part.weight[i] = trained(2 * i);
        part.bias[i] = trained(2 * i + 1);
      }
      layers.push_back(part);
      in = layer.out;
      stride = layer.stride;
    }
  }
  for (size_t begin = 0; begin < layers.size(); begin += kMostLayers) {
    update.layers = static_cast<int>(std::min(layers.size() - begin, size_t{kMostLayers}));
    std::copy_n(layers.begin() + static_cast<std::ptrdiff_t>(begin), update.layers, update.layer);
    update.terms = begin == 0 ? terms_ : nullptr;
    ++launches_;
    if (int error = launch(update, way)) return error;
  }
  return cudaSuccess;
}

// --- many steps ------------------------------------------------------------------------------------------------------

int Schedule::launch_steps(int64_t count, cudaStream_t stream) {
  const Prepare prepare{now(0),    count,      most_size_, data_,    rows_,    most_size_, x_,
                        x_stride_, optimizer_, updates_,   factors_, dream_z_, z_stride_};
  if (int error = launch(prepare, stream)) return error;
  for (int64_t offset = 0; offset < count; ++offset) {
    if (int error = launch_step(offset, stream)) return error;
  }
  return advance(cursor_, now(0), count, stream);
}

// The graph of `count` steps, captured when it is first wanted; none where there are too many already.
int Schedule::graph_of(int64_t count, cudaGraphExec_t& graph) {
  graph = nullptr;
  if (auto found = graphs_.find(count); found != graphs_.end()) {
    graph = found->second;
    return cudaSuccess;
  }
  if (graphs_.size() == kMostGraphs) return cudaSuccess;
  if (!capture_stream_) {  // not the caller's: the default stream cannot be captured
    if (cudaError_t error = cudaStreamCreateWithFlags(&capture_stream_, cudaStreamNonBlocking)) return error;
  }
  if (cudaError_t error = cudaStreamBeginCapture(capture_stream_, cudaStreamCaptureModeThreadLocal)) return error;
  const int launched = launch_steps(count, capture_stream_);
  cudaGraph_t captured = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(capture_stream_, &captured);
  int error = launched ? launched : static_cast<int>(ended);
  if (!error) error = cudaGraphInstantiate(&graph, captured, 0);
  if (captured) cudaGraphDestroy(captured);
  if (!error) graphs_[count] = graph;
  return error;
}

// Between the models' parameters and the memory where several of them are trained
int Schedule::exchange(bool import, cudaStream_t stream) {
  if (models() == 1) return cudaSuccess;
  for (size_t m = 0; m < models_.size(); ++m) {
    Network own = network_;
    own.latent_dim = models_[m].own.latents;
    const auto shapes = parameter_shapes(own), padded = parameter_shapes(network_);
    for (size_t i = 0; i < shapes.size(); ++i) {
      const auto size = [](int64_t floats) { return static_cast<size_t>(floats) * sizeof(float); };
      const bool matrix = shapes[i].size() == 2;
      const size_t rows = matrix ? static_cast<size_t>(shapes[i][0]) : 1, width = size(shapes[i].back());
      const size_t padded_width = size(padded[i].back());
      const size_t padded_bytes = (matrix ? static_cast<size_t>(padded[i][0]) : 1) * padded_width;
      const Trained &given = models_[m].parameters[i], &kept = parameters_[i];
      for (const auto& [outside, first] : {std::pair(given.value, kept.value), std::pair(given.state0, kept.state0),
                                           std::pair(given.state1, kept.state1)}) {
        if (!outside) continue;
        float* inside = of_model(first, m);
        cudaError_t error = cudaSuccess;
        if (import && padded_bytes != rows * width) error = cudaMemsetAsync(inside, 0, padded_bytes, stream);
        if (!error) {
          error = import ? cudaMemcpy2DAsync(inside, padded_width, outside, width, width, rows,
                                             cudaMemcpyDeviceToDevice, stream)
                         : cudaMemcpy2DAsync(outside, width, inside, padded_width, width, rows,
                                             cudaMemcpyDeviceToDevice, stream);
        }
        if (error) return error;
      }
    }
  }
  return cudaSuccess;
}

// To the device: what `count` steps from `begin` on read, of every model
int Schedule::load(const std::vector<Steps>& steps, int64_t begin, int64_t count, cudaStream_t stream) {
  for (size_t m = 0; m < models_.size(); ++m) {
    const Steps& own = steps[m];
    // Copies may read what they are given until the stream has been waited for.
    starts_[m] = {0, own.updates_before + begin};
    const auto copy = [&](auto* to, const auto* from, int64_t number) {
      return cudaMemcpyAsync(of_model(to, m), from, static_cast<size_t>(number) * sizeof *from, cudaMemcpyHostToDevice,
                             stream);
    };
    const size_t row_bytes = static_cast<size_t>(own.width * kWord);
    cudaError_t error = copy(cursor_, &starts_[m].cursor, 1);
    if (!error) error = copy(updates_, &starts_[m].updates, 1);
    if (!error) error = copy(own_, &models_[m].own, 1);
    if (!error) {
      error =
          cudaMemcpy2DAsync(of_model(rows_, m), static_cast<size_t>(most_size_ * kWord), own.rows + begin * own.width,
                            row_bytes, row_bytes, static_cast<size_t>(count), cudaMemcpyHostToDevice, stream);
    }
    if (!error) error = copy(sizes_, own.sizes + begin, count);
    if (!error) error = copy(seeds_, own.seeds + 2 * begin, 2 * count);
    if (error) return error;
  }
  return cudaSuccess;
}

// The loaded steps by the persistent kernel, as far as it can take them: to the launch, if any, where a number is
// beyond its range, which changes nothing. Nothing is taken that way any more then, nor on a GPU that has no room for
// it.
int Schedule::run_persistent(int64_t count, int64_t& done, cudaStream_t stream) {
  using namespace persistent;
  const Sizes sizes = sizes_of(network_, most_size_);
  const Exchanged exchanged = persistent::lay_out(sizes, std::min(most_steps_, kMostSteps), exchanged_);
  for (int64_t some = 0; persistent() && done < count; done += some) {
    some = std::min(count - done, kMostSteps);
    const Gather gather{now(done),       some,       most_size_, data_,   rows_, most_size_, exchanged.x,
                        sizes.row_bytes, optimizer_, updates_,   factors_};
    const persistent::Launch launch{sizes,
                                    exchanged,
                                    persistent::parameters_of(parameters_),
                                    precision_,
                                    network_.activation,
                                    objective_.estimator,
                                    network_.logvar_scale,
                                    models_[0].own.beta,
                                    objective_.weight_prior,
                                    data_.dynamic ? 1.0f : data_.scale,
                                    rule_of(optimizer_),
                                    sizes_ + done,
                                    seeds_ + 2 * done,
                                    factors_,
                                    some,
                                    gpu_.timed};
    if (int error = persistent::launch(gather, stream)) return error;
    const int error = persistent::launch(launch, terms_ + 3 * done, stream);
    bool out_of_range = error == cudaErrorCooperativeLaunchTooLarge;
    if (error && !out_of_range) return error;
    if (!error) {
      if (int failed = persistent::out_of_range(launch, out_of_range, stream)) return failed;
    }
    if (out_of_range) {
      why_not_persistent_ = error ? "a GPU without room for its blocks" : "a number beyond the range of a half";
      some = 0;
    } else if (gpu_.timed) {
      if (int failed = read_phases(sizes, exchanged, some, stream)) return failed;
    }
  }
  return done < count ? advance(cursor_, now(0), done, stream) : 0;
}

int Schedule::read_phases(const persistent::Sizes& sizes, const persistent::Exchanged& exchanged, int64_t steps,
                          cudaStream_t stream) {
  using namespace persistent;
  std::vector<int64_t> cycles(static_cast<size_t>(kPhases * (sizes.encoder_blocks + sizes.decoder_blocks)));
  if (cudaError_t error = cudaMemcpyAsync(cycles.data(), exchanged.cycles, cycles.size() * sizeof(int64_t),
                                          cudaMemcpyDeviceToHost, stream))
    return error;
  if (cudaError_t error = cudaStreamSynchronize(stream)) return error;
  phases_.clear();
  for (const bool encoder : {true, false}) {
    const int first = encoder ? 0 : sizes.encoder_blocks;
    const int blocks = encoder ? sizes.encoder_blocks : sizes.decoder_blocks;
    for (int i = 0; i < kPhases && phase_name(encoder, i); ++i) {
      phases_.push_back({phase_name(encoder, i), encoder, {}});
      for (int block = first; block < first + blocks; ++block)
        phases_.back().cycles.push_back(static_cast<double>(cycles[static_cast<size_t>(block * kPhases + i)]) /
                                        static_cast<double>(steps));
    }
  }
  return cudaSuccess;
}

int Schedule::run(const std::vector<Steps>& steps, float* terms, cudaStream_t stream) {
  const int64_t n_steps = steps[0].count;
  if (int error = exchange(true, stream)) return error;
  for (int64_t begin = 0; begin < n_steps; begin += most_steps_) {
    const int64_t count = std::min(most_steps_, n_steps - begin);
    if (int error = load(steps, begin, count, stream)) return error;
    int64_t taken = 0;
    if (int error = persistent() ? run_persistent(count, taken, stream) : 0) return error;
    // The very first steps are launched as they are: the driver loads kernels when they are first used, which a capture
    // may not do.
    for (int64_t done = taken; done < count;) {
      const int64_t some = std::min(group_, count - done);
      cudaGraphExec_t graph = nullptr;
      if (int failed = warm_ ? graph_of(some, graph) : 0) return failed;
      if (int failed = graph ? cudaGraphLaunch(graph, stream) : launch_steps(some, stream)) return failed;
      warm_ = true;
      done += some;
    }
    cudaError_t error = cudaSuccess;
    for (size_t m = 0; m < models_.size() && !error; ++m) {
      error = cudaMemcpyAsync(terms + 3 * (static_cast<int64_t>(m) * n_steps + begin), of_model(terms_, m),
                              static_cast<size_t>(3 * count) * sizeof(float), cudaMemcpyDeviceToHost, stream);
    }
    if (!error) error = cudaStreamSynchronize(stream);
    if (error) return error;
  }
  if (int error = exchange(false, stream)) return error;
  return cudaStreamSynchronize(stream);
}

}  // namespace engine
}  // namespace vae_fast
