// The update of every parameter, the gradient of each weight in a tile of registers that goes straight into the
// optimizer; the gather of minibatches; the cursor. Bytes and floors stand beside each struct in kernels.h.
//
// The update is the last launch of a step, and no launch of the step reads a parameter after it: parameters change in
// place, each by one thread. The next step's launches wait for it, as all launches on a stream do.
#include <algorithm>

#include "../../math/philox.h"
#include "../../math/splitmix.h"
#include "elements.cuh"
#include "kernels.h"
#include "product.cuh"

namespace vae_fast {
namespace engine {
namespace {

using UpdateShape = Updates;
constexpr int kThreads = UpdateShape::kThreads;

// --- the minibatches -------------------------------------------------------------------------------------------------

// Four of z' ~ N(0, I)
__device__ __forceinline__ void dream_latents(const Prepare& p, const Here& here, int64_t slot, int64_t four) {
  const int64_t fours = p.z_stride / 4, b = four / fours, first = four % fours * 4;
  if (b >= here.size) return;
  const int64_t latents = here.own().latents;
  const int64_t seed = substream(here.of_model(p.now.seeds)[2 * here.step], kDreamOfZ);
  float z[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) z[i] = first + i < latents ? philox_normal(seed, b * latents + first + i) : 0.0f;
  write_four(here.of_model(p.dream_z) + (slot * p.most_size + b) * p.z_stride + first, z);
}

__global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ Prepare p) {
  const int64_t slot = blockIdx.y;
  const Here here(p.now, slot);
  const int64_t step = here.step;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    here.of_model(p.factors)[slot] = factors_of(p.optimizer, here.own().lr, *here.of_model(p.updates) + step + 1);
  }
  const int64_t fours = p.x_stride / 4, four = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (p.dream_z) dream_latents(p, here, slot, four);
  const int64_t b = four / fours, col = four % fours * 4;
  if (b >= here.size) return;
  const int64_t row = here.of_model(p.rows)[step * p.width + b], seed = here.of_model(p.now.seeds)[2 * step + 1];
  float x[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (col + i >= p.data.cols) break;
    x[i] = datum(p.data, row, col + i) * p.data.scale;
    if (p.data.dynamic) x[i] = bernoulli_draw(seed, b * p.data.cols + col + i, x[i]);
  }
  write_four(here.of_model(p.x) + (slot * p.most_size + b) * p.x_stride + col, x);
}

__global__ void advance_kernel(int64_t* cursor, const __grid_constant__ Now now, int64_t count) {
  *Here(now).of_model(cursor) += count;
}

// --- the update ------------------------------------------------------------------------------------------------------

// A layer as the kernel reads it: which tiles of the grid are its own.
struct Job {
  int64_t samples, outs, ins;
  Matrix grad, in;
  bool paired, aligned;  // aligned: fours of weight and state begin at multiples of 16 bytes
  float logvar_scale;
  Trained weight[2], bias[2];
  int first_tile, column_tiles;
};

struct Jobs {
  Now now;
  int count, tiles;
  Job job[kMostLayers];
  UpdateRule rule;
  float weight_prior;
  const StepFactors* factors;
  float* terms;
  int64_t samples;
  int64_t ll_rows, kl_rows;
  const float *ll_parts, *kl_parts;
  int64_t ll_stride, kl_stride;
};

// Four floats from `at` on, of which `valid` are there; in one access if all are (kWhole).
template <bool kWhole>
__device__ __forceinline__ void load_some(const float* at, int valid, float (&v)[4]) {
  if constexpr (kWhole) {
    read_four(at, v);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = i < valid ? at[i] : 0.0f;
  }
}

template <bool kWhole>
__device__ __forceinline__ void store_some(float* at, int valid, const float (&v)[4]) {
  if constexpr (kWhole) {
    write_four(at, v);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < valid) at[i] = v[i];
    }
  }
}

__device__ __forceinline__ Trained of_model(const Here& here, Trained trained) {
  here.move(trained.value, trained.state0, trained.state1);
  return trained;
}

// Four parameters and their states, in registers between load and take_step. kKind is the rule's, known beforehand.
template <UpdateKind kKind, bool kWhole>
struct Parameters {
  static constexpr int kStates = kKind == UpdateKind::adam ? 2 : kKind == UpdateKind::sgd ? 0 : 1;
  float w[4], s0[4], s1[4];

  __device__ __forceinline__ void load(const Trained& from, int64_t at, int valid) {
    load_some<kWhole>(from.value + at, valid, w);
    if constexpr (kStates > 0) load_some<kWhole>(from.state0 + at, valid, s0);
    if constexpr (kStates > 1) load_some<kWhole>(from.state1 + at, valid, s1);
  }

  __device__ __forceinline__ void take_step(const Trained& to, int64_t at, int valid, UpdateRule rule,
                                            const StepFactors& factors, float scale, float prior,
                                            const float (&sums)[4]) {
    rule.kind = kKind;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float gradient = Math<float>::fma(prior, w[i], scale * sums[i]);
      update(rule, factors, gradient, w[i], s0[i], s1[i]);
    }
    store_some<kWhole>(to.value + at, valid, w);
    if constexpr (kStates > 0) store_some<kWhole>(to.state0 + at, valid, s0);
    if constexpr (kStates > 1) store_some<kWhole>(to.state1 + at, valid, s1);
  }
};

// The sum of parts[t * stride + r] over t < count and rows r, by one block: a warp has every so many t, a lane of it
// every so many r, and the threads add up in a tree.
__device__ double sum_of_parts(const float* parts, int64_t count, int64_t rows, int64_t stride, double* scratch) {
  double sum = 0.0;
  for (int64_t t = threadIdx.x / kWarp; t < count; t += kThreads / kWarp) {
#pragma unroll 4
    for (int64_t r = threadIdx.x % kWarp; r < rows; r += kWarp) sum += parts[t * stride + r];
  }
  __syncthreads();
  scratch[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
  }
  __syncthreads();
  return scratch[0];
}

__device__ void write_terms(const Jobs& p, const Here& here, double* scratch) {
  const int64_t rows = here.size * p.samples;
  const float *ll_parts = here.of_model(p.ll_parts), *kl_parts = here.of_model(p.kl_parts);
  const double ll = sum_of_parts(ll_parts, p.ll_rows, rows, p.ll_stride, scratch) / static_cast<double>(rows);
  const double kl = sum_of_parts(kl_parts, p.kl_rows, here.size, p.kl_stride, scratch) / static_cast<double>(here.size);
  if (threadIdx.x != 0) return;
  float* terms = here.of_model(p.terms) + 3 * here.step;
  terms[0] = static_cast<float>(ll - static_cast<double>(here.own().beta) * kl);
  terms[1] = static_cast<float>(ll);
  terms[2] = static_cast<float>(kl);
}

// What a block's tile of sums, in shared memory, does to its weights. A thread's fours stand below each other, in every
// kRowStep-th row: of the same tensor, since the step is even. All of them are on their way before the first is used.
// kWhole: the tile has no edge, and its fours begin at multiples of 16 bytes.
template <UpdateKind kKind, bool kWhole>
__device__ __forceinline__ void update_weights(const float* memory, const Jobs& p, const Here& here, const Job& job,
                                               const TileOf& tile, const StepFactors& factors, float scale) {
  using Shape = UpdateShape;
  constexpr int kRowStep = Shape::kThreads / (Shape::kCols / 4);
  static_assert(kRowStep % 2 == 0);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first_row = tile.row + thread / (Shape::kCols / 4), col = tile.col + thread % (Shape::kCols / 4) * 4;
  if (!kWhole && (first_row >= tile.rows || col >= tile.cols)) return;
  const Trained trained = of_model(here, job.weight[job.paired ? first_row & 1 : 0]);
  const int valid = kWhole || tile.cols - col >= 4 ? 4 : static_cast<int>(tile.cols - col);
  const int64_t first = (job.paired ? first_row >> 1 : first_row) * job.ins + col;
  const int64_t stride = (job.paired ? kRowStep / 2 : kRowStep) * job.ins;
  Parameters<kKind, kWhole> parameters[Shape::kQuads] = {};
#pragma unroll
  for (int i = 0; i < Shape::kQuads; ++i) {
    if (kWhole || first_row + i * kRowStep < tile.rows) parameters[i].load(trained, first + i * stride, valid);
  }
#pragma unroll
  for (int i = 0; i < Shape::kQuads; ++i) {
    if (!kWhole && first_row + i * kRowStep >= tile.rows) break;
    const Four<Shape> four(memory, i);
    parameters[i].take_step(trained, first + i * stride, valid, p.rule, factors, scale, p.weight_prior, four.value);
  }
}

// And to its biases, if it is the first of a row of tiles
template <UpdateKind kKind>
__device__ __forceinline__ void update_biases(const Jobs& p, const Here& here, const Job& job, const TileOf& tile,
                                              float sum, const StepFactors& factors, float scale) {
  using Shape = UpdateShape;
  const int thread = static_cast<int>(threadIdx.x);
  if (tile.col != 0 || thread >= Shape::kRows || tile.row + thread >= tile.rows) return;
  const int64_t row = tile.row + thread, at = job.paired ? row >> 1 : row;
  const Trained trained = of_model(here, job.bias[job.paired ? row & 1 : 0]);
  const float sums[4] = {job.paired && row & 1 ? sum / job.logvar_scale : sum};
  Parameters<kKind, false> own = {};
  own.load(trained, at, 1);
  own.take_step(trained, at, 1, p.rule, factors, scale, 0.0f, sums);
}

template <Precision kPrecision, UpdateKind kKind>
__global__ void __launch_bounds__(kThreads, 2) update_kernel(const __grid_constant__ Jobs p) {
  using Shape = UpdateShape;
  float* memory = dynamic_shared();
  const Here here(p.now);
  const int tile_index = static_cast<int>(blockIdx.x);
  if (tile_index == p.tiles) {
    wait_for_earlier_launches();
    write_terms(p, here, reinterpret_cast<double*>(memory));
    return;
  }
  int index = 0;
  while (index + 1 < p.count && tile_index >= p.job[index + 1].first_tile) ++index;
  const Job& job = p.job[index];
  const int in_job = tile_index - job.first_tile;
  const TileOf tile{in_job / job.column_tiles * int64_t{Shape::kRows},
                    in_job % job.column_tiles * int64_t{Shape::kCols}, job.outs, job.ins, here.size * job.samples};
  const StepFactors factors = *here.of_model(p.factors);  // of a launch long ago
  const float scale = -1.0f / static_cast<float>(tile.ks);

  // The first tile of a row of tiles has the bias too: the sum of the gradient over the minibatch, of every fourth
  // first.
  using A = typename TileMemory<Shape, false, false>::A;
  const int thread = static_cast<int>(threadIdx.x);
  const bool has_bias = tile.col == 0 && thread < Shape::kRows;
  float bias_sums[4] = {};
  const Matrix grad = here.of_model(job.grad), in = here.of_model(job.in);
  const auto add_bias = [&](const float* piece) {
    if (has_bias) {
#pragma unroll
      for (int k = 0; k < Shape::kSpan; ++k) bias_sums[k % 4] += piece[k * A::kStride + thread];
    }
  };
  multiply_tile<kPrecision, Shape, false, false>(memory, grad, in, 0, tile, false, [] {}, add_bias);
  if (job.aligned && tile.row + Shape::kRows <= tile.rows && tile.col + Shape::kCols <= tile.cols) {
    update_weights<kKind, true>(memory, p, here, job, tile, factors, scale);
  } else {
    update_weights<kKind, false>(memory, p, here, job, tile, factors, scale);
  }
  const float bias_sum = (bias_sums[0] + bias_sums[1]) + (bias_sums[2] + bias_sums[3]);
  update_biases<kKind>(p, here, job, tile, bias_sum, factors, scale);
}

template <Precision kPrecision, UpdateKind kKind>
int launch_update(const Jobs& jobs, const Way& way) {
  constexpr size_t kBytes = TileMemory<UpdateShape, false, false>::kBytes;
  const auto kernel = update_kernel<kPrecision, kKind>;
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes))
    return error;
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>(jobs.tiles + (jobs.terms ? 1 : 0)), 1, static_cast<unsigned>(jobs.now.models));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = way.stream;
  return launch_kernel(config, kernel, jobs, way.overlap);
}

template <Precision kPrecision>
int launch_update(const Jobs& jobs, const Way& way) {
  switch (jobs.rule.kind) {
    case UpdateKind::sgd:
      return launch_update<kPrecision, UpdateKind::sgd>(jobs, way);
    case UpdateKind::momentum:
      return launch_update<kPrecision, UpdateKind::momentum>(jobs, way);
    case UpdateKind::adagrad:
      return launch_update<kPrecision, UpdateKind::adagrad>(jobs, way);
    case UpdateKind::adam:
      return launch_update<kPrecision, UpdateKind::adam>(jobs, way);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int launch(const Prepare& args, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  const int64_t stride = args.dream_z ? std::max(args.x_stride, args.z_stride) : args.x_stride;
  config.gridDim = dim3(static_cast<unsigned>(ceil_div(args.most_size * stride / 4, kThreads)),
                        static_cast<unsigned>(args.count), static_cast<unsigned>(args.now.models));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  cudaLaunchKernelEx(&config, prepare_kernel, args);
  return cudaGetLastError();
}

int launch(const Update& args, const Way& way) {
  Jobs jobs = {};
  jobs.now = args.now;
  jobs.count = args.layers;
  for (int i = 0; i < args.layers; ++i) {
    const UpdateLayer& layer = args.layer[i];
    Job& job = jobs.job[i];
    job = {layer.samples,
           layer.outs,
           layer.ins,
           matrix_of(layer.grad, layer.grad_stride),
           matrix_of(layer.in, layer.in_stride),
           layer.paired,
           true,
           layer.logvar_scale,
           {},
           {},
           jobs.tiles,
           static_cast<int>(ceil_div(layer.ins, UpdateShape::kCols))};
    for (int half = 0; half < (layer.paired ? 2 : 1); ++half) {
      job.weight[half] = layer.weight[half];
      job.bias[half] = layer.bias[half];
      for (const float* p : {layer.weight[half].value, layer.weight[half].state0, layer.weight[half].state1}) {
        job.aligned = job.aligned && on_sixteen_bytes(p, layer.ins);  // a null is
      }
    }
    jobs.tiles += static_cast<int>(ceil_div(layer.outs, UpdateShape::kRows)) * job.column_tiles;
  }
  jobs.rule = args.rule;
  jobs.weight_prior = args.weight_prior;
  jobs.factors = args.factors;
  jobs.terms = args.terms;
  jobs.samples = args.samples;
  jobs.ll_rows = args.ll_rows;
  jobs.kl_rows = args.kl_rows;
  jobs.ll_parts = args.ll_parts;
  jobs.kl_parts = args.kl_parts;
  jobs.ll_stride = args.ll_stride;
  jobs.kl_stride = args.kl_stride;
  return way.precision == Precision::exact ? launch_update<Precision::exact>(jobs, way)
                                           : launch_update<Precision::fast>(jobs, way);
}

#if !defined(VAE_FAST_CUDA_EMULATION)
bool can_overlap() {
  cudaFuncAttributes attributes = {};
  if (cudaFuncGetAttributes(&attributes, advance_kernel) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return attributes.ptxVersion >= 90;  // what the source was translated for, also of code translated further on loading
}
#endif

int advance(int64_t* cursor, const Now& now, int64_t count, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1, 1, static_cast<unsigned>(now.models));
  config.blockDim = dim3(1);
  config.stream = stream;
  cudaLaunchKernelEx(&config, advance_kernel, cursor, now, count);
  return cudaGetLastError();
}

}  // namespace engine
}  // namespace vae_fast
