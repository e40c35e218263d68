// What a product of a training step costs in tiles of other shapes: the paper's three large layers at a batch of 100,
// by the kernel of csrc/engine/cuda/layers.cu with shapes that the engine does not use beside the one that it does.
// Each is launched again and again as in a step, one launch overlapping the next, many to a CUDA graph.
//
//   nvcc -gencode=arch=compute_90a,code=sm_90a -std=c++20 -O3 bench/tiles.cu -o tiles && ./tiles
//
// JSON lines on stdout: microseconds per launch. Times only: that every shape computes the same is not checked here,
// and a shape is for the engine once its tests have passed with it.
#include "../csrc/engine/cuda/layers.cu"
#include "measure.cuh"

namespace {

using namespace vae_fast;
using namespace vae_fast::engine;

constexpr int kLaunches = 50, kRepetitions = 30, kBatch = 100;

template <class T>
T* on_device(const std::vector<T>& values) {
  T* p = nullptr;
  CHECK(cudaMalloc(&p, values.size() * sizeof(T)));
  CHECK(cudaMemcpy(p, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return p;
}

// Numbers that repeat and are not zero: a product of zeros is faster.
float* numbers(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  uint32_t state = 1;
  for (float& value : values)
    value = static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-24f - 0.5f;
  return on_device(values);
}

struct Problem {
  const char* name;
  int64_t ins, outs;
  bool forward;
};

template <class Shape, bool kForward>
int launch(const Problem& problem, const Now& now, const float* a, const float* b, const float* bias, float* out,
           const Way& way) {
  if constexpr (kForward) {
    const ActivateHidden epilogue{bias, problem.outs, Activation::tanh, out, problem.outs};
    return launch_shape<Precision::exact, Shape, true>(
        Product<ActivateHidden>{now, matrix_of(a, problem.ins), matrix_of(b, problem.ins), 1, problem.outs, problem.ins,
                                epilogue},
        way);
  } else {
    const DeriveHidden epilogue{Activation::tanh, bias, out, problem.ins};
    return launch_shape<Precision::exact, Shape, false>(
        Product<DeriveHidden>{now, matrix_of(a, problem.outs), matrix_of(b, problem.ins), 1, problem.ins, problem.outs,
                              epilogue},
        way);
  }
}

template <class Shape>
void measure_shape(const char* name, const std::vector<Problem>& problems, const Now& now, int processors) {
  float *a = numbers(kBatch * 1024), *b = numbers(1024 * 1024), *bias = numbers(kBatch * 1024),
        *out = numbers(kBatch * 1024);
  cudaStream_t stream;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (const Problem& problem : problems) {
    const Way way{Precision::exact, kBatch, processors, 227 << 10, stream, true, true};
    const auto go = [&] {
      return problem.forward ? ::launch<Shape, true>(problem, now, a, b, bias, out, way)
                             : ::launch<Shape, false>(problem, now, a, b, bias, out, way);
    };
    measure::Line line("product");
    line.text("how", std::string(problem.name) + ", " + name)
        .number("rows", Shape::kRows)
        .number("cols", Shape::kCols)
        .number("threads", Shape::kThreads);
    line.number("stages", Shape::kStages);
    if (int error = go()) {  // too much shared memory, say
      std::fprintf(stderr, "%s, %s: %s\n", problem.name, name, cudaGetErrorString(static_cast<cudaError_t>(error)));
      continue;
    }
    CHECK(cudaStreamSynchronize(stream));
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < kLaunches; ++i) CHECK(static_cast<cudaError_t>(go()));
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&executable, graph, 0));
    const auto replay = [&] { CHECK(cudaGraphLaunch(executable, stream)); };
    replay();
    line.quantiles("us", measure::time(stream, kLaunches, kRepetitions, replay)).print();
    CHECK(cudaGraphExecDestroy(executable));
    CHECK(cudaGraphDestroy(graph));
  }
  CHECK(cudaStreamDestroy(stream));
  for (float* p : {a, b, bias, out}) CHECK(cudaFree(p));
}

}  // namespace

int main() {
  const measure::Device device;
  Now now = {};
  now.cursor = on_device<int64_t>({0});
  now.sizes = on_device<int64_t>({kBatch});
  now.seeds = on_device<int64_t>({1, 2});
  now.models = 1;
  now.own = on_device<Own>({{0.02, 20, 1.0f}});
  const std::vector<Problem> problems = {{"forward 784 to 500", 784, 500, true},
                                         {"forward 500 to 784", 500, 784, true},
                                         {"backward 784 to 500", 500, 784, false}};
  measure_shape<Narrow>("the engine's", problems, now, device.processors);
  measure_shape<TileShape<16, 32, 16, 1, 1, 8, 8, 3, 2>>("a stage less", problems, now, device.processors);
  measure_shape<TileShape<16, 32, 16, 1, 2, 8, 8, 4, 2>>("twice the warps by columns", problems, now,
                                                         device.processors);
  measure_shape<TileShape<16, 32, 16, 1, 1, 16, 16, 3, 1>>("twice the warps by k", problems, now, device.processors);
  measure_shape<TileShape<16, 32, 16, 1, 2, 16, 16, 3, 1>>("four times the warps", problems, now, device.processors);
  measure_shape<TileShape<16, 32, 16, 1, 1, 4, 4, 6, 2>>("half the warps by k", problems, now, device.processors);
  measure_shape<TileShape<16, 16, 16, 1, 1, 8, 8, 5, 2>>("half the columns", problems, now, device.processors);
  measure_shape<TileShape<16, 64, 16, 1, 2, 8, 8, 3, 1>>("twice the columns and warps", problems, now,
                                                         device.processors);
  measure_shape<TileShape<32, 32, 16, 1, 1, 8, 8, 3, 2>>("twice the rows", problems, now, device.processors);
  measure_shape<TileShape<32, 32, 16, 2, 1, 8, 8, 3, 1>>("twice the rows and warps", problems, now, device.processors);
  measure_shape<Medium>("the engine's Medium", problems, now, device.processors);
}
