// The Python class CudaStep of vae_fast._C: training steps of MLP VAEs on a GPU. All the work is schedule.h's; here are
// checks, memory from torch's allocator, the current stream.
//
//   step = _C.CudaStep(
//       data_dim=784, encoder_hidden=[500], decoder_hidden=[500],
//       activation="tanh",           # or "relu", "softplus"
//       likelihood="bernoulli",      # or "gaussian", "gaussian_sigmoid_mean"
//       estimator="sgvb_b",          # or "sgvb_a", "wake_sleep"
//       logvar_scale=1.0,            # of the encoder's logvar = logvar_scale W h + b
//       num_samples=1,
//       weight_prior=0.0,            # 1/N, or 0 for none
//       optimizer="adagrad",         # or "sgd", "adam", "adamw"
//       options={"eps": 1e-8, "beta1": 0.9, "beta2": 0.999, "momentum": 0.0, "weight_decay": 0.0,
//                "accumulate_steps": 100},   # what an optimizer has not may be left out
//       precision="exact",           # or "fast"
//       models=[{                    # one, or several that are trained side by side
//           "latent_dim": 20, "beta": 1.0, "lr": 0.02,
//           "parameters": [...],     # float32 CUDA tensors in the order of named_parameters() (network.h)
//           "states": [[...], ...],  # for each optimizer state (Adagrad's sum; exp_avg, exp_avg_sq; momentum_buffer)
//       }, ...],                     # one float32 tensor for each parameter, like it
//       data=values,                 # uint8 or float32 [N, D]; with packed=True uint8 [N, ceil(D / 8)]
//       packed=False, dynamic=False,
//       scale=1 / 255,               # x = float32(values) * scale
//       persistent=False,            # steps by the kernel of persistent.h, where it can take them
//       timed=False,                 # which then counts the cycles of its phases: step.phases, after a run
//       batch_size=100,              # of the largest minibatch
//       most_steps=1000)             # that lie on the device at a time
//   terms = step.run(rows, sizes, seeds, updates)
//
// run takes CPU tensors of int64: rows [models, n, width], sizes [models, n], seeds [models, n, 2] (noise, binarise),
// and `updates`, for each model the number of updates before these (Adam's and Adagrad's step counters, which the
// caller keeps). It returns when the steps are done: (elbo, log_likelihood, kl) of each, float32 [models, n, 3] on the
// CPU. Parameters and states change in place, in the tensors given to the constructor, which this object keeps alive;
// so does `data`: where that moves, make another object. The GIL is released. A model's numbers do not depend on the
// others. step.steps_per_graph and step.launches_per_step say how a step is launched,
// step.persistent whether it is not but taken by persistent.h, and step.why_not_persistent why it is not, in a few
// words.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../arguments.h"
#include "schedule.h"

namespace vae_fast {
namespace engine {
namespace {

namespace py = pybind11;
using at::Tensor;

void check_cuda(int error) {
  TORCH_CHECK(error == 0, "CUDA: ", cuda::error_string(error), " in the native engine's step");
}

// A model as Python gives it
struct Given {
  int64_t latent_dim;
  double beta, lr;
  std::vector<Tensor> parameters;
  std::vector<std::vector<Tensor>> states;
};

std::vector<Given> given_of(const py::sequence& models) {
  TORCH_CHECK_VALUE(models.size() > 0, "models: got none, wanted one or more");
  std::vector<Given> found;
  for (const py::handle& model : models) {
    const auto of = [&](const char* name) { return model[py::str(name)]; };
    found.push_back({py::cast<int64_t>(of("latent_dim")), py::cast<double>(of("beta")), py::cast<double>(of("lr")),
                     py::cast<std::vector<Tensor>>(of("parameters")),
                     py::cast<std::vector<std::vector<Tensor>>>(of("states"))});
  }
  return found;
}

class CudaStep {
 public:
  CudaStep(Network network, const Objective& objective, const Optimizer& optimizer, Precision precision,
           std::vector<Given> models, Tensor data, bool packed, bool dynamic, double scale, int64_t batch_size,
           int64_t most_steps, bool persistent, bool timed)
      : models_(std::move(models)), data_(std::move(data)), batch_size_(batch_size) {
    TORCH_CHECK_VALUE(data_.is_cuda(), "data: got device ", data_.device(), ", wanted a CUDA device");
    TORCH_CHECK_VALUE(batch_size >= 1, "batch_size: got ", batch_size, ", wanted an integer of 1 or more");
    TORCH_CHECK_VALUE(most_steps >= 1, "most_steps: got ", most_steps, ", wanted an integer of 1 or more");
    const Data described = data_of(data_, packed, dynamic, scale, network);
    std::vector<Model> trained;
    int64_t most_latents = 0;
    for (const Given& given : models_) {
      TORCH_CHECK_VALUE(
          optimizer.kind != OptimizerKind::adamw || optimizer.weight_decay == 0 || given.lr == models_[0].lr,
          "lr: got ", given.lr, " beside ", models_[0].lr, ", wanted the same for all models of AdamW's weight_decay");
      network.latent_dim = given.latent_dim;
      TORCH_CHECK_VALUE(objective.estimator != Estimator::wake_sleep || given.beta == 1, "beta: got ", given.beta,
                        " with the estimator \"wake_sleep\", wanted 1");
      most_latents = std::max(most_latents, given.latent_dim);
      Model model{{given.lr, given.latent_dim, static_cast<float>(given.beta)}, {}};
      for (const Parameter& p : parameters_of(given.parameters, given.states, network, optimizer, data_.device()))
        model.parameters.push_back({p.value, p.state[0], p.state[1]});
      trained.push_back(std::move(model));
    }
    network.latent_dim = most_latents;
    Optimizer of_all = optimizer;
    of_all.lr = models_[0].lr;
    const c10::cuda::CUDAGuard guard(data_.device());
    Gpu gpu = {};
    const int device = data_.get_device();
    check_cuda(cudaDeviceGetAttribute(&gpu.multiprocessors, cudaDevAttrMultiProcessorCount, device));
    check_cuda(cudaDeviceGetAttribute(&gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    const char* wanted = std::getenv("VAE_FAST_CUDA_OVERLAP");  // 0: to measure what overlapping launches are worth
    gpu.overlap = can_overlap() && !(wanted && std::string(wanted) == "0");
    int cooperative = 0;
    check_cuda(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device));
    gpu.persistent = persistent;
    gpu.cooperative = cooperative && can_overlap();  // which are of sm_90 and later
    gpu.timed = timed;
    int64_t widest = 2 * std::max(network.data_dim, most_latents);
    for (int64_t width : network.encoder_hidden) widest = std::max(widest, width);
    for (int64_t width : network.decoder_hidden) widest = std::max(widest, width);
    const int64_t most = (int64_t{1} << 31) / (widest + 4) / objective.num_samples;  // kernels count them in 32 bits
    TORCH_CHECK_VALUE(batch_size < most, "batch_size: got ", batch_size, ", wanted fewer than ", most,
                      " with layers of ", widest, " numbers and ", objective.num_samples, " samples");
    schedule_ = std::make_unique<Schedule>(network, objective, of_all, described, precision, std::move(trained),
                                           batch_size, most_steps, gpu, [this](size_t bytes) {
                                             workspace_ = at::zeros({static_cast<int64_t>(bytes)},
                                                                    data_.options().dtype(at::kByte));
                                             return workspace_.mutable_data_ptr();
                                           });
    c10::cuda::getCurrentCUDAStream().synchronize();  // whoever had this memory before is done
  }

  ~CudaStep() {
    const c10::cuda::CUDAGuard guard(data_.device());
    schedule_.reset();
  }

  Tensor run(const Tensor& rows, const Tensor& sizes, const Tensor& seeds, const std::vector<int64_t>& updates) {
    const auto count = static_cast<int64_t>(models_.size());
    for (const auto& [name, tensor] : {std::pair("rows", rows), std::pair("sizes", sizes), std::pair("seeds", seeds)}) {
      TORCH_CHECK_VALUE(tensor.dim() > 0 && tensor.size(0) == count, name, ": got shape ", tensor.sizes(), ", wanted ",
                        count, " models first");
    }
    TORCH_CHECK_VALUE(updates.size() == models_.size(), "updates: got ", updates.size(), " numbers, wanted ", count);
    std::vector<Steps> steps;
    for (int64_t m = 0; m < count; ++m)
      steps.push_back(steps_of(rows.select(0, m), sizes.select(0, m), seeds.select(0, m),
                               updates[static_cast<size_t>(m)], data_.size(0)));
    TORCH_CHECK_VALUE(steps[0].width <= batch_size_, "rows: got width ", steps[0].width, ", wanted the batch_size, ",
                      batch_size_, ", at most");
    const Tensor terms = at::empty({count, steps[0].count, 3}, at::kFloat);
    const c10::cuda::CUDAGuard guard(data_.device());
    check_cuda(schedule_->run(steps, terms.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream().stream()));
    // Autograd may have kept a parameter for a backward pass, which must not take these for the same values.
    for (const Given& model : models_)
      for (const Tensor& parameter : model.parameters) parameter.unsafeGetTensorImpl()->bump_version();
    return terms;
  }

  int64_t steps_per_graph() const { return schedule_->steps_per_graph(); }
  int64_t launches_per_step() const { return schedule_->launches_per_step(); }
  bool persistent() const { return schedule_->persistent(); }
  std::string why_not_persistent() const { return schedule_->why_not_persistent(); }
  std::vector<std::tuple<std::string, std::string, std::vector<double>>> phases() const {
    std::vector<std::tuple<std::string, std::string, std::vector<double>>> found;
    for (const Phase& phase : schedule_->phases())
      found.emplace_back(phase.encoder ? "encoder" : "decoder", phase.name, phase.cycles);
    return found;
  }

 private:
  std::vector<Given> models_;
  Tensor data_, workspace_;
  int64_t batch_size_;
  std::unique_ptr<Schedule> schedule_;
};

std::unique_ptr<CudaStep> make(int64_t data_dim, std::vector<int64_t> encoder_hidden,
                               std::vector<int64_t> decoder_hidden, const std::string& activation,
                               const std::string& likelihood, const std::string& estimator, int64_t num_samples,
                               double weight_prior, const std::string& optimizer, const py::dict& options,
                               const std::string& precision, const py::sequence& models, Tensor data, bool packed,
                               bool dynamic, double scale, int64_t batch_size, int64_t most_steps, double logvar_scale,
                               bool persistent, bool timed) {
  return std::make_unique<CudaStep>(network_of(data_dim, std::move(encoder_hidden), 0, std::move(decoder_hidden),
                                               activation, likelihood, logvar_scale),
                                    objective_of(estimator, num_samples, 1, weight_prior),
                                    optimizer_of(optimizer, options), precision_of(precision), given_of(models),
                                    std::move(data), packed, dynamic, scale, batch_size, most_steps, persistent, timed);
}

}  // namespace

void bind_cuda_step(py::module_& m) {
  using py::arg;
  py::class_<CudaStep>(m, "CudaStep", "Training steps of MLP VAEs on a GPU; see csrc/engine/cuda/step.cpp.")
      .def(py::init(&make), py::kw_only(), arg("data_dim"), arg("encoder_hidden"), arg("decoder_hidden"),
           arg("activation"), arg("likelihood"), arg("estimator"), arg("num_samples"), arg("weight_prior"),
           arg("optimizer"), arg("options"), arg("precision"), arg("models"), arg("data"), arg("packed"),
           arg("dynamic"), arg("scale"), arg("batch_size"), arg("most_steps") = 1000, arg("logvar_scale") = 1.0,
           arg("persistent") = false, arg("timed") = false)
      .def("run", &CudaStep::run, py::call_guard<py::gil_scoped_release>(), arg("rows"), arg("sizes"), arg("seeds"),
           arg("updates"))
      .def_property_readonly("steps_per_graph", &CudaStep::steps_per_graph)
      .def_property_readonly("launches_per_step", &CudaStep::launches_per_step)
      .def_property_readonly("persistent", &CudaStep::persistent)
      .def_property_readonly("why_not_persistent", &CudaStep::why_not_persistent)
      .def_property_readonly("phases", &CudaStep::phases);
}

}  // namespace engine
}  // namespace vae_fast
