// Making normals against loading them: the rates behind the choice of how a backward pass comes by eps (epsilon.py
// measures the choice itself). Making them is arithmetic: Philox4x32-10 and Box-Muller, nothing moved. Loading stored
// ones is memory: 4 bytes each, or 2. The copy is the ceiling of all that moves memory on this machine.
//
//   nvcc -arch=sm_90a -std=c++20 -O3 bench/normals.cu -o normals && ./normals
//
// JSON lines on stdout, as latency.cu.
#include <cuda_bf16.h>

#include "../csrc/cuda/noise.cuh"
#include "measure.cuh"

namespace {

using measure::Device;
using measure::Line;

constexpr int kThreads = 256;
constexpr int kPerThread = 16;  // normals, made or loaded before the next step of the grid
constexpr int kRepetitions = 20;
constexpr int64_t kCount = int64_t{1} << 28;  // 1 GiB of float32, far beyond any cache

// A sum that is never -1e30 is stored only if it is: the work must be done, and nothing is written.
__device__ __forceinline__ void keep(float sum, float* never) {
  if (sum == -1e30f) *never = sum;
}

__global__ __launch_bounds__(kThreads) void make_kernel(int64_t seed, int64_t count, float* never) {
  const int64_t stride = int64_t{gridDim.x} * kThreads * kPerThread;
  float sum = 0;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kPerThread; i < count; i += stride) {
    float eps[kPerThread];
    vae_fast::cuda::normals<true, vae_fast::cuda::ExactNormals>(seed, i, kPerThread, eps);
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) sum += eps[j];
  }
  keep(sum, never);
}

// Four loads of 16 bytes in flight, neighbouring threads side by side.
template <class T>
__global__ __launch_bounds__(kThreads) void load_kernel(const uint4* stored, int64_t count, float* never) {
  constexpr int kChunk = sizeof(uint4) / sizeof(T), kInFlight = 4;
  const int64_t chunks = count / kChunk, stride = int64_t{gridDim.x} * kThreads * kInFlight;
  float sum = 0;
  for (int64_t first = int64_t{blockIdx.x} * kThreads * kInFlight + threadIdx.x; first < chunks; first += stride) {
    uint4 loaded[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) loaded[k] = __ldcs(stored + first + k * kThreads);
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const T* values = reinterpret_cast<const T*>(&loaded[k]);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) sum += static_cast<float>(values[j]);
    }
  }
  keep(sum, never);
}

// Random bits, so that the memory's wires toggle as with data; a bfloat16 or float of such bits may be NaN, no matter.
__global__ void fill_kernel(uint32_t* words, int64_t count) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u;
    x = (x ^ (x >> 15)) * 2246822519u;
    words[i] = x ^ (x >> 13);
  }
}

void report(const char* what, std::vector<double> us, int64_t count, int64_t bytes) {
  Line line(what);
  line.quantiles("us", us);
  std::sort(us.begin(), us.end());
  const double median = us[us.size() / 2];
  line.number("elements", static_cast<double>(count));
  line.number("bytes", static_cast<double>(bytes));
  line.number("elements_per_us", static_cast<double>(count) / median);
  line.number("gigabytes_per_s", static_cast<double>(bytes) / median / 1e3).print();
}

}  // namespace

int main() {
  const Device device;
  uint4 *stored, *copied;
  float* never;
  CHECK(cudaMalloc(&stored, kCount * sizeof(float)));
  CHECK(cudaMalloc(&copied, kCount * sizeof(float)));
  CHECK(cudaMalloc(&never, sizeof(float)));
  fill_kernel<<<4 * device.processors, kThreads, 0, device.stream>>>(reinterpret_cast<uint32_t*>(stored), kCount);
  CHECK(cudaGetLastError());

  const auto time = [&](const auto& work) { return measure::time(device.stream, 1, kRepetitions, work); };
  // Eight blocks of 256 threads fill an SM; four times as many even out its last round.
  const int blocks = 32 * device.processors;
  report("make normals, float32", time([&] {
           make_kernel<<<blocks, kThreads, 0, device.stream>>>(11, kCount, never);
           CHECK(cudaGetLastError());
         }),
         kCount, 0);
  report("load stored normals, float32", time([&] {
           load_kernel<float><<<blocks, kThreads, 0, device.stream>>>(stored, kCount, never);
           CHECK(cudaGetLastError());
         }),
         kCount, kCount * 4);
  report("load stored normals, bfloat16", time([&] {
           load_kernel<__nv_bfloat16><<<blocks, kThreads, 0, device.stream>>>(stored, 2 * kCount, never);
           CHECK(cudaGetLastError());
         }),
         2 * kCount, kCount * 4);
  report("copy",
         time([&] { CHECK(cudaMemcpyAsync(copied, stored, kCount * 4, cudaMemcpyDeviceToDevice, device.stream)); }),
         kCount, 2 * kCount * 4);
  CHECK(cudaDeviceSynchronize());
  return 0;
}
