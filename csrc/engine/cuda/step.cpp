// The Python class CudaStep of vae_fast._C: training steps of an MLP VAE on a GPU. All the work is schedule.h's; here
// are checks, memory from torch's allocator, the current stream.
//
//   step = _C.CudaStep(
//       data_dim=784, latent_dim=20, encoder_hidden=[500], decoder_hidden=[500],
//       activation="tanh",           # or "relu"
//       likelihood="bernoulli",      # or "gaussian", "gaussian_sigmoid_mean"
//       estimator="sgvb_b",          # or "sgvb_a"
//       num_samples=1, beta=1.0,
//       weight_prior=0.0,            # 1/N, or 0 for none
//       optimizer="adagrad",         # or "sgd", "adam", "adamw"
//       options={"lr": 0.02, "eps": 1e-8, "beta1": 0.9, "beta2": 0.999, "momentum": 0.0, "weight_decay": 0.0,
//                "accumulate_steps": 100},   # what an optimizer has not may be left out
//       precision="exact",           # or "fast"
//       parameters=[...],            # float32 CUDA tensors in the order of named_parameters() (network.h)
//       states=[[...], ...],         # for each optimizer state (Adagrad's sum; exp_avg, exp_avg_sq; momentum_buffer)
//                                    # one float32 tensor for each parameter, like it
//       data=values,                 # uint8 or float32 [N, D]; with bits=True uint8 [N, ceil(D / 8)]
//       bits=False, dynamic=False,
//       scale=1 / 255,               # x = float32(values) * scale
//       batch_size=100,              # of the largest minibatch
//       most_steps=1000)             # that lie on the device at a time
//   terms = step.run(rows, sizes, seeds, updates)
//
// run takes CPU tensors of int64: rows [n, width], sizes [n], seeds [n, 2] (noise, binarise), and `updates`, the number
// of updates before these (Adam's and Adagrad's step counters, which the caller keeps). It returns when the steps are
// done: (elbo, log_likelihood, kl) of each, float32 [n, 3] on the CPU. Parameters and states change in place, in the
// tensors given to the constructor, which this object keeps alive; so does `data`: where that moves, make another
// object. The GIL is released. step.steps_per_graph and step.launches_per_step say how a step is launched.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "schedule.h"

namespace vae_fast {
namespace engine {
namespace {

namespace py = pybind11;
using at::Tensor;

template <class Choice>
Choice choose(const char* name, const std::string& got, std::initializer_list<const char*> wanted) {
  std::string names;
  int position = 0;
  for (const char* choice : wanted) {
    if (got == choice) return static_cast<Choice>(position);
    names += (position++ ? ", \"" : "\"") + std::string(choice) + "\"";
  }
  C10_THROW_ERROR(ValueError, c10::str(name, ": got \"", got, "\", wanted one of ", names));
}

void check_cuda(int error) {
  TORCH_CHECK(error == 0, "CUDA: ", cuda::error_string(error), " in the native engine's step");
}

// The shapes of the parameters, as network.h numbers them
std::vector<std::vector<int64_t>> shapes_of(const Network& network) {
  std::vector<std::vector<int64_t>> shapes;
  const auto layer = [&](int64_t ins, int64_t outs) {
    shapes.push_back({outs, ins});
    shapes.push_back({outs});
  };
  int64_t width = network.data_dim;
  for (int64_t outs : network.encoder_hidden) layer(std::exchange(width, outs), outs);
  for (int i = 0; i < 2; ++i) layer(width, network.latent_dim);
  width = network.latent_dim;
  for (int64_t outs : network.decoder_hidden) layer(std::exchange(width, outs), outs);
  for (int i = 0; i < (network.likelihood == Likelihood::bernoulli ? 1 : 2); ++i) layer(width, network.data_dim);
  return shapes;
}

void check_trained(const std::string& name, const Tensor& t, at::IntArrayRef shape, const at::Device& device) {
  TORCH_CHECK_VALUE(t.sizes() == shape, name, ": got shape ", t.sizes(), ", wanted ", shape);
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, name, ": got dtype ", t.scalar_type(), ", wanted float32");
  TORCH_CHECK_VALUE(t.device() == device, name, ": got device ", t.device(), ", wanted ", device, ", where data is");
  TORCH_CHECK_VALUE(t.is_contiguous(), name, ": got strides ", t.strides(), ", wanted a contiguous tensor");
}

const int64_t* integers(const char* name, const Tensor& t, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.sizes() == shape, name, ": got shape ", t.sizes(), ", wanted ", shape);
  TORCH_CHECK_TYPE(t.scalar_type() == at::kLong && t.is_cpu() && t.is_contiguous(), name, ": got ", t.scalar_type(),
                   " on ", t.device(), ", wanted contiguous int64 on the CPU");
  return t.const_data_ptr<int64_t>();
}

class CudaStep {
 public:
  CudaStep(Network network, const Objective& objective, const Optimizer& optimizer, Precision precision,
           std::vector<Tensor> parameters, std::vector<std::vector<Tensor>> states, Tensor data, bool bits,
           bool dynamic, double scale, int64_t batch_size, int64_t most_steps)
      : parameters_(std::move(parameters)),
        states_(std::move(states)),
        data_(std::move(data)),
        batch_size_(batch_size) {
    TORCH_CHECK_VALUE(data_.is_cuda(), "data: got device ", data_.device(), ", wanted a CUDA device");
    TORCH_CHECK_VALUE(batch_size >= 1, "batch_size: got ", batch_size, ", wanted an integer of 1 or more");
    TORCH_CHECK_VALUE(most_steps >= 1, "most_steps: got ", most_steps, ", wanted an integer of 1 or more");
    TORCH_CHECK_VALUE(objective.num_samples >= 1, "num_samples: got ", objective.num_samples,
                      ", wanted an integer of 1 or more");
    const at::ScalarType type = data_.scalar_type();
    TORCH_CHECK_TYPE(type == at::kByte || (type == at::kFloat && !bits), "data: got dtype ", type, ", wanted uint8",
                     bits ? " for packed bits" : " or float32");
    const int64_t width = bits ? (network.data_dim + 7) / 8 : network.data_dim;
    TORCH_CHECK_VALUE(data_.dim() == 2 && data_.size(1) == width && data_.is_contiguous(), "data: got shape ",
                      data_.sizes(), " and strides ", data_.strides(), ", wanted contiguous [N, ", width, "]");
    const size_t wanted_states = static_cast<size_t>(optimizer.states());
    TORCH_CHECK_VALUE(states_.size() == wanted_states, "states: got ", states_.size(), " lists, wanted ",
                      wanted_states);
    const auto shapes = shapes_of(network);
    TORCH_CHECK_VALUE(parameters_.size() == shapes.size(), "parameters: got ", parameters_.size(), " tensors, wanted ",
                      shapes.size());
    std::vector<Trained> trained(shapes.size());
    for (size_t i = 0; i < shapes.size(); ++i) {
      check_trained("parameters[" + std::to_string(i) + "]", parameters_[i], shapes[i], data_.device());
      trained[i].value = parameters_[i].mutable_data_ptr<float>();
    }
    for (size_t k = 0; k < states_.size(); ++k) {
      const std::string name = "states[" + std::to_string(k) + "]";
      TORCH_CHECK_VALUE(states_[k].size() == shapes.size(), name, ": got ", states_[k].size(), " tensors, wanted ",
                        shapes.size());
      for (size_t i = 0; i < shapes.size(); ++i) {
        check_trained(name + "[" + std::to_string(i) + "]", states_[k][i], shapes[i], data_.device());
        (k == 0 ? trained[i].state0 : trained[i].state1) = states_[k][i].mutable_data_ptr<float>();
      }
    }
    const c10::cuda::CUDAGuard guard(data_.device());
    int multiprocessors = 0;
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, data_.get_device()));
    const DType dtype = bits ? DType::bits : type == at::kFloat ? DType::f32 : DType::u8;
    const Data described{dtype,         dynamic,          static_cast<float>(scale),
                         data_.size(0), network.data_dim, data_.const_data_ptr()};
    schedule_ = std::make_unique<Schedule>(network, objective, optimizer, described, precision, trained, batch_size,
                                           most_steps, multiprocessors, [this](size_t bytes) {
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

  Tensor run(const Tensor& rows, const Tensor& sizes, const Tensor& seeds, int64_t updates) {
    TORCH_CHECK_VALUE(rows.dim() == 2, "rows: got shape ", rows.sizes(), ", wanted [steps, width]");
    const int64_t n = rows.size(0), width = rows.size(1);
    TORCH_CHECK_VALUE(width <= batch_size_, "rows: got width ", width, ", wanted the batch_size, ", batch_size_,
                      ", at most");
    const int64_t* row = integers("rows", rows, {n, width});
    const int64_t* size = integers("sizes", sizes, {n});
    const int64_t* seed = integers("seeds", seeds, {n, 2});
    for (int64_t i = 0; i < n; ++i) {
      TORCH_CHECK_VALUE(size[i] >= 1 && size[i] <= width, "sizes: got ", size[i], " at step ", i, ", wanted 1 to ",
                        width);
      for (int64_t b = 0; b < size[i]; ++b) {
        const int64_t found = row[i * width + b];
        TORCH_CHECK_INDEX(found >= 0 && found < data_.size(0), "rows: got ", found, " at step ", i, ", wanted 0 to ",
                          data_.size(0) - 1);
      }
    }
    const Tensor terms = at::empty({n, 3}, at::kFloat);
    const c10::cuda::CUDAGuard guard(data_.device());
    check_cuda(schedule_->run(row, width, size, seed, n, updates, terms.mutable_data_ptr<float>(),
                              c10::cuda::getCurrentCUDAStream().stream()));
    // Autograd may have kept a parameter for a backward pass, which must not take these for the same values.
    for (const Tensor& parameter : parameters_) parameter.unsafeGetTensorImpl()->bump_version();
    return terms;
  }

  int64_t steps_per_graph() const { return schedule_->steps_per_graph(); }
  int64_t launches_per_step() const { return schedule_->launches_per_step(); }

 private:
  std::vector<Tensor> parameters_;
  std::vector<std::vector<Tensor>> states_;
  Tensor data_, workspace_;
  int64_t batch_size_;
  std::unique_ptr<Schedule> schedule_;
};

Optimizer optimizer_of(const std::string& name, const py::dict& options) {
  Optimizer optimizer = {};
  optimizer.kind = choose<OptimizerKind>("optimizer", name, {"sgd", "adagrad", "adam", "adamw"});
  for (const auto& [key, value] : options) {
    const std::string option = py::cast<std::string>(key);
    const std::pair<const char*, double*> reals[] = {
        {"lr", &optimizer.lr},       {"eps", &optimizer.eps},           {"beta1", &optimizer.beta1},
        {"beta2", &optimizer.beta2}, {"momentum", &optimizer.momentum}, {"weight_decay", &optimizer.weight_decay}};
    bool known = option == "accumulate_steps";
    if (known) optimizer.accumulate_steps = py::cast<int64_t>(value);
    for (const auto& [real, place] : reals) {
      if (option == real) *place = py::cast<double>(value), known = true;
    }
    TORCH_CHECK_VALUE(known, "options: got \"", option,
                      "\", wanted lr, eps, beta1, beta2, momentum, weight_decay or accumulate_steps");
  }
  return optimizer;
}

std::unique_ptr<CudaStep> make(int64_t data_dim, int64_t latent_dim, std::vector<int64_t> encoder_hidden,
                               std::vector<int64_t> decoder_hidden, const std::string& activation,
                               const std::string& likelihood, const std::string& estimator, int64_t num_samples,
                               double beta, double weight_prior, const std::string& optimizer, const py::dict& options,
                               const std::string& precision, std::vector<Tensor> parameters,
                               std::vector<std::vector<Tensor>> states, Tensor data, bool bits, bool dynamic,
                               double scale, int64_t batch_size, int64_t most_steps) {
  Network network{data_dim,
                  latent_dim,
                  std::move(encoder_hidden),
                  std::move(decoder_hidden),
                  choose<Activation>("activation", activation, {"tanh", "relu"}),
                  choose<Likelihood>("likelihood", likelihood, {"bernoulli", "gaussian", "gaussian_sigmoid_mean"})};
  const Objective objective{choose<Estimator>("estimator", estimator, {"sgvb_b", "sgvb_a"}), num_samples,
                            static_cast<float>(beta), static_cast<float>(weight_prior)};
  return std::make_unique<CudaStep>(std::move(network), objective, optimizer_of(optimizer, options),
                                    choose<Precision>("precision", precision, {"exact", "fast"}), std::move(parameters),
                                    std::move(states), std::move(data), bits, dynamic, scale, batch_size, most_steps);
}

}  // namespace

void bind_cuda_step(py::module_& m) {
  using py::arg;
  py::class_<CudaStep>(m, "CudaStep", "Training steps of an MLP VAE on a GPU; see csrc/engine/cuda/step.cpp.")
      .def(py::init(&make), py::kw_only(), arg("data_dim"), arg("latent_dim"), arg("encoder_hidden"),
           arg("decoder_hidden"), arg("activation"), arg("likelihood"), arg("estimator"), arg("num_samples"),
           arg("beta"), arg("weight_prior"), arg("optimizer"), arg("options"), arg("precision"), arg("parameters"),
           arg("states"), arg("data"), arg("bits"), arg("dynamic"), arg("scale"), arg("batch_size"),
           arg("most_steps") = 1000)
      .def("run", &CudaStep::run, py::call_guard<py::gil_scoped_release>(), arg("rows"), arg("sizes"), arg("seeds"),
           arg("updates"))
      .def_property_readonly("steps_per_graph", &CudaStep::steps_per_graph)
      .def_property_readonly("launches_per_step", &CudaStep::launches_per_step);
}

}  // namespace engine
}  // namespace vae_fast
