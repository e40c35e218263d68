// What the stand-alone CUDA programs of this folder share: errors, launches, timing, and results as JSON lines that
// latency.py reads.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#define CHECK(call) ::measure::check(call, #call, __FILE__, __LINE__)

namespace measure {

inline void check(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s:%d: %s: %s\n", file, line, call, cudaGetErrorString(error));
  std::exit(1);
}

// About a second. A wait that lasts longer will never end: the kernel traps, and the host sees a launch failure.
constexpr long long kTimeoutCycles = 2'000'000'000;

// Counts the time of one wait: `while (!ready()) timeout.tick();`
class Timeout {
 public:
  __device__ __forceinline__ Timeout() { start_ = clock64(); }
  __device__ __forceinline__ void tick() {
    if (clock64() - start_ > kTimeoutCycles) __trap();
  }

 private:
  long long start_;
};

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

// Keeps the stream busy while the host queues what is to be timed. The clock ticks coarsely, and still ends.
static __global__ void backlog(unsigned nanoseconds_to_wait) {
  const uint64_t end = nanoseconds() + nanoseconds_to_wait;
  while (nanoseconds() < end) __nanosleep(1000);
}

struct Launch {
  int blocks, threads;
  size_t shared_bytes = 0;
  int cluster = 0;            // blocks per cluster; 0: launched without
  bool cooperative = false;   // refused where not all blocks can run at once
  bool programmatic = false;  // may begin before the kernel in front of it has ended
  cudaStream_t stream = nullptr;

  template <class... Parameters, class... Arguments>
  cudaError_t run(void (*kernel)(Parameters...), Arguments... arguments) const {
    cudaLaunchAttribute attributes[3];
    const cudaLaunchConfig_t config = configure(attributes);
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  }

  // How many clusters run at once; 0 where this size cannot run at all.
  template <class... Parameters>
  int active_clusters(void (*kernel)(Parameters...)) const {
    cudaLaunchAttribute attributes[3];
    const cudaLaunchConfig_t config = configure(attributes);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
      cudaGetLastError();  // or the next check would find it
      return 0;
    }
    return clusters;
  }

 private:
  cudaLaunchConfig_t configure(cudaLaunchAttribute* attributes) const {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    if (cluster > 0) {
      cudaLaunchAttribute& a = attributes[config.numAttrs++];
      a.id = cudaLaunchAttributeClusterDimension;
      a.val.clusterDim.x = cluster;
      a.val.clusterDim.y = a.val.clusterDim.z = 1;
    }
    if (cooperative) {
      cudaLaunchAttribute& a = attributes[config.numAttrs++];
      a.id = cudaLaunchAttributeCooperative;
      a.val.cooperative = 1;
    }
    if (programmatic) {
      cudaLaunchAttribute& a = attributes[config.numAttrs++];
      a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      a.val.programmaticStreamSerializationAllowed = 1;
    }
    return config;
  }
};

// The most shared memory a block may have, and clusters of more than eight blocks.
template <class... Parameters>
void allow_everything(void (*kernel)(Parameters...), size_t shared_bytes) {
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

// Microseconds per round of every repetition of `work`, which queues `rounds` rounds on the stream.
template <class Work>
std::vector<double> time(cudaStream_t stream, int rounds, int repetitions, const Work& work) {
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  std::vector<double> samples;
  for (int i = -2; i < repetitions; ++i) {  // the first two warm up
    backlog<<<1, 1, 0, stream>>>(100'000);
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(start, stream));
    work();
    CHECK(cudaEventRecord(stop, stream));
    CHECK(cudaStreamSynchronize(stream));
    float milliseconds;
    CHECK(cudaEventElapsedTime(&milliseconds, start, stop));
    if (i >= 0) samples.push_back(1e3 * milliseconds / rounds);
  }
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(stop));
  return samples;
}

// One result: a JSON object on a line of its own.
class Line {
 public:
  explicit Line(const std::string& what) { text("what", what); }

  Line& text(const char* name, const std::string& value) { return raw(name, '"' + value + '"'); }
  Line& number(const char* name, double value) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%.7g", value);
    return raw(name, digits);
  }
  // Median, 10 % and 90 % quantile and count, as Timing of timing.py has them.
  Line& quantiles(const char* name, std::vector<double> samples) {
    std::sort(samples.begin(), samples.end());
    const size_t n = samples.size(), last = n - 1;
    const double median = 0.5 * (samples[last / 2] + samples[n / 2]);
    Line of("");
    of.fields_.clear();
    of.number("median", median)
        .number("low", samples[(last + 5) / 10])
        .number("high", samples[(9 * last + 5) / 10])
        .number("count", static_cast<double>(n));
    return raw(name, '{' + of.fields_ + '}');
  }
  void print() const {
    std::printf("{%s}\n", fields_.c_str());
    std::fflush(stdout);  // what is measured stays measured if the next kernel traps
  }

 private:
  Line& raw(const char* name, const std::string& value) {
    fields_ += (fields_.empty() ? "\"" : ", \"") + std::string(name) + "\": " + value;
    return *this;
  }

  std::string fields_;
};

struct Device {
  cudaDeviceProp properties;
  int processors;
  cudaStream_t stream;

  Device() {
    CHECK(cudaGetDeviceProperties(&properties, 0));
    processors = properties.multiProcessorCount;
    CHECK(cudaStreamCreate(&stream));
    int driver, runtime;
    CHECK(cudaDriverGetVersion(&driver));
    CHECK(cudaRuntimeGetVersion(&runtime));
    Line("device")
        .text("name", properties.name)
        .number("multiprocessors", processors)
        .number("l2_bytes", properties.l2CacheSize)
        .number("shared_bytes_per_block", static_cast<double>(properties.sharedMemPerBlockOptin))
        .number("driver_cuda", driver)
        .number("runtime_cuda", runtime)
        .print();
  }
};

}  // namespace measure
