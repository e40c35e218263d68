// What waiting costs on this GPU: the numbers that decide between many small kernels and one persistent kernel for a
// training step (design A and B of the trainer). A step of the paper's model is eight dependent matrix products of a
// microsecond each, so its floor is made of these waits and of moving what one multiprocessor (SM) has written to all
// others:
//
//   barriers   all SMs wait for all: cooperative groups' grid.sync(); one counter; a flag per block
//   handoff    one SM writes a flag that another waits for, one way, over several pairs of SMs
//   clusters   the barrier of a cluster of blocks; how many clusters of a size find a seat at once, on how many SMs
//   graph      from one node of a CUDA graph to the next, with and without programmatic dependent launch
//   broadcast  a barrier, then every SM reads the same bytes: plain loads, bulk copies to shared memory, and bulk
//              copies of which each block of a cluster fetches its share for all (multicast)
//
//   nvcc -arch=sm_90a -std=c++17 -O3 bench/latency.cu -o latency && ./latency [SECTION ...]
//
// JSON lines on stdout: microseconds per round over repeated launches of many rounds, so that what a launch itself
// costs (a few microseconds in a millisecond) is lost in them. Waits that are loops here trap after a second; those of
// the hardware (grid.sync, the barriers of a block and of a cluster) cannot be given a time-out, cannot hang either
// where all blocks run at once, and latency.py stops the program if they do.
#include <cooperative_groups.h>

#include <cstring>
#include <set>

#include "measure.cuh"

namespace {

namespace cg = cooperative_groups;
using measure::allow_everything;
using measure::Device;
using measure::Launch;
using measure::Line;
using measure::Timeout;

constexpr int kRepetitions = 30;
constexpr size_t kWholeProcessor = 208 * 1024;  // of shared memory: no second block fits beside it

// --- waiting -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void add_release(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ __forceinline__ void store_release(unsigned* flag, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ __forceinline__ unsigned load_acquire(const unsigned* flag) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

// Until the flag has come to `target`. Flags only grow, modulo 2^32, so that no launch has to reset them.
__device__ __forceinline__ void wait_for(const unsigned* flag, unsigned target) {
  Timeout timeout;
  while (static_cast<int>(load_acquire(flag) - target) < 0) timeout.tick();
}

// All blocks add to one counter, and one thread of each waits for the sum.
__device__ __forceinline__ void counter_barrier(unsigned* counter, unsigned target) {
  __syncthreads();
  if (threadIdx.x == 0) {
    add_release(counter);
    wait_for(counter, target);
  }
  __syncthreads();
}

// Every block has a flag of its own, and its threads share the waiting for all flags: no atomic operation.
__device__ __forceinline__ void flag_barrier(unsigned* flags, unsigned target) {
  __syncthreads();
  if (threadIdx.x == 0) store_release(flags + blockIdx.x, target);
  for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) wait_for(flags + block, target);
  __syncthreads();
}

// --- barriers ------------------------------------------------------------------------------------------------------

__global__ void grid_sync_kernel(int rounds) {
  cg::grid_group grid = cg::this_grid();
  for (int i = 0; i < rounds; ++i) grid.sync();
}

__global__ void counter_kernel(int rounds, unsigned* counter, unsigned base) {
  for (int i = 1; i <= rounds; ++i) counter_barrier(counter, base + i * gridDim.x);
}

__global__ void flag_kernel(int rounds, unsigned* flags, unsigned base) {
  for (int i = 1; i <= rounds; ++i) flag_barrier(flags, base + i);
}

// Zeroed words on the device.
unsigned* zeros(size_t count) {
  unsigned* words;
  CHECK(cudaMalloc(&words, count * sizeof(unsigned)));
  CHECK(cudaMemset(words, 0, count * sizeof(unsigned)));
  return words;
}

void barriers(const Device& device) {
  const int rounds = 2000;
  unsigned* counter = zeros(32);
  unsigned* flags = zeros(device.processors);
  unsigned counted = 0, flagged = 0;
  for (int threads : {32, 256, 1024}) {
    Launch launch{device.processors, threads};
    launch.cooperative = true;
    launch.stream = device.stream;
    const auto report = [&](const char* how, const std::vector<double>& us) {
      Line("barrier")
          .text("how", how)
          .number("blocks", launch.blocks)
          .number("threads", threads)
          .quantiles("us", us)
          .print();
    };
    report("grid.sync",
           measure::time(device.stream, rounds, kRepetitions, [&] { CHECK(launch.run(grid_sync_kernel, rounds)); }));
    report("counter", measure::time(device.stream, rounds, kRepetitions, [&] {
             CHECK(launch.run(counter_kernel, rounds, counter, counted));
             counted += rounds * device.processors;
           }));
    report("flags", measure::time(device.stream, rounds, kRepetitions, [&] {
             CHECK(launch.run(flag_kernel, rounds, flags, flagged));
             flagged += rounds;
           }));
  }
  CHECK(cudaFree(counter));
  CHECK(cudaFree(flags));
}

// --- handoff -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ unsigned processor_id() {
  unsigned id;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(id));
  return id;
}

// Blocks 0 and `partner` answer each other; the rest have only come to take the other SMs.
__global__ void handoff_kernel(int rounds, int partner, unsigned* flags, unsigned base, unsigned* processors) {
  const bool first = blockIdx.x == 0;
  if (threadIdx.x != 0 || (!first && static_cast<int>(blockIdx.x) != partner)) return;
  unsigned *mine = flags + (first ? 0 : 32), *other = flags + (first ? 32 : 0);  // 128 bytes apart
  processors[first ? 0 : 1] = processor_id();
  for (int i = 1; i <= rounds; ++i) {
    if (first) store_release(mine, base + i);
    wait_for(other, base + i);
    if (!first) store_release(mine, base + i);
  }
}

void handoff(const Device& device) {
  const int rounds = 2000;
  unsigned* flags = zeros(64);
  unsigned* processors = zeros(2);
  unsigned base = 0;
  allow_everything(handoff_kernel, kWholeProcessor);
  Launch launch{device.processors, 32, kWholeProcessor};
  launch.cooperative = true;
  launch.stream = device.stream;
  for (int pair = 0; pair < 9; ++pair) {
    const int partner = std::max(1, pair * (device.processors - 1) / 8);
    const std::vector<double> us = measure::time(device.stream, 2 * rounds, kRepetitions, [&] {
      CHECK(launch.run(handoff_kernel, rounds, partner, flags, base, processors));
      base += rounds;
    });
    unsigned ids[2];
    CHECK(cudaMemcpy(ids, processors, sizeof ids, cudaMemcpyDeviceToHost));
    Line("handoff").number("pair", pair).number("from_sm", ids[0]).number("to_sm", ids[1]).quantiles("us", us).print();
  }
  CHECK(cudaFree(flags));
  CHECK(cudaFree(processors));
}

// --- clusters ------------------------------------------------------------------------------------------------------

template <bool kOrdered>
__global__ void cluster_kernel(int rounds) {
  for (int i = 0; i < rounds; ++i) {
    if constexpr (kOrdered) {
      asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    } else {  // orders no memory of this block: what a barrier costs where nothing was written
      asm volatile("barrier.cluster.arrive.relaxed.aligned;");
    }
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
}

// Every block stays long enough for all to be there at once.
__global__ void seat_kernel(unsigned* processors) {
  if (threadIdx.x != 0) return;
  processors[blockIdx.x] = processor_id();
  const uint64_t end = measure::nanoseconds() + 200'000;
  while (measure::nanoseconds() < end) __nanosleep(1000);
}

void clusters(const Device& device) {
  const int rounds = 2000;
  unsigned* processors = zeros(device.processors);
  allow_everything(cluster_kernel<true>, kWholeProcessor);
  allow_everything(cluster_kernel<false>, kWholeProcessor);
  allow_everything(seat_kernel, kWholeProcessor);
  for (int size : {1, 2, 4, 8, 16}) {
    Launch launch{device.processors / size * size, 256, kWholeProcessor, size};
    launch.stream = device.stream;
    const int seated = launch.active_clusters(seat_kernel);
    Line line("cluster seating");
    line.number("cluster", size).number("clusters_at_once", seated);
    if (seated == 0) {
      line.print();
      continue;
    }
    launch.blocks = std::min(launch.blocks, seated * size);
    CHECK(launch.run(seat_kernel, processors));
    std::vector<unsigned> ids(launch.blocks);
    CHECK(cudaStreamSynchronize(device.stream));
    CHECK(cudaMemcpy(ids.data(), processors, ids.size() * sizeof(unsigned), cudaMemcpyDeviceToHost));
    line.number("blocks", launch.blocks);
    line.number("multiprocessors", static_cast<double>(std::set<unsigned>(ids.begin(), ids.end()).size())).print();
    if (size == 1) continue;
    const auto report = [&](const char* how, const std::vector<double>& us) {
      Line("cluster barrier")
          .text("how", how)
          .number("cluster", size)
          .number("blocks", launch.blocks)
          .quantiles("us", us)
          .print();
    };
    report("release, acquire", measure::time(device.stream, rounds, kRepetitions,
                                             [&] { CHECK(launch.run(cluster_kernel<true>, rounds)); }));
    report("relaxed", measure::time(device.stream, rounds, kRepetitions,
                                    [&] { CHECK(launch.run(cluster_kernel<false>, rounds)); }));
  }
  CHECK(cudaFree(processors));
}

// --- graph ---------------------------------------------------------------------------------------------------------

__global__ void node() {}

// Lets the next kernel be put in place at once, and waits for all that the one before has written.
__global__ void programmatic_node() {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

void graph(const Device& device) {
  const int nodes = 500;
  for (int blocks : {1, device.processors}) {
    for (bool programmatic : {false, true}) {
      Launch launch{blocks, 256};
      launch.programmatic = programmatic;
      launch.stream = device.stream;
      cudaGraph_t captured;
      cudaGraphExec_t executable;
      CHECK(cudaStreamBeginCapture(device.stream, cudaStreamCaptureModeThreadLocal));
      for (int i = 0; i < nodes; ++i) CHECK(launch.run(programmatic ? programmatic_node : node));
      CHECK(cudaStreamEndCapture(device.stream, &captured));
      CHECK(cudaGraphInstantiate(&executable, captured, 0));
      const std::vector<double> us =
          measure::time(device.stream, nodes, kRepetitions, [&] { CHECK(cudaGraphLaunch(executable, device.stream)); });
      Line("graph node")
          .text("how", programmatic ? "programmatic dependent launch" : "plain")
          .number("blocks", blocks)
          .quantiles("us", us)
          .print();
      CHECK(cudaGraphExecDestroy(executable));
      CHECK(cudaGraphDestroy(captured));
    }
  }
}

// --- broadcast -----------------------------------------------------------------------------------------------------

enum class Read { nothing, plain, bulk, multicast };

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* arrived) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(arrived))
               : "memory");
}

// To the same place in every block of the cluster, and counted by the barrier of each.
__device__ __forceinline__ void multicast_copy(void* to, const void* from, unsigned bytes, uint64_t* arrived,
                                               unsigned ranks) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const uint16_t all = static_cast<uint16_t>((1u << ranks) - 1);
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(arrived)), "h"(all)
      : "memory");
#else  // nvcc makes PTX for plain sm_90 besides, and warns of this instruction there
  __trap();
#endif
}

__device__ __forceinline__ void wait_for_bytes(uint64_t* arrived, unsigned phase) {
  Timeout timeout;
  for (unsigned done = 0; !done;) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(arrived)), "r"(phase)
        : "memory");
    timeout.tick();
  }
}

// Every round: all blocks meet, then each reads `bytes` of `source`. `sum` becomes the sum of all words read in the
// last round by all blocks, modulo 2^32, by which the host sees that they came.
template <Read kRead>
__global__ __launch_bounds__(1024) void broadcast_kernel(int rounds, unsigned* counter, unsigned base,
                                                         const uint4* source, unsigned bytes, unsigned piece,
                                                         unsigned* sum) {
  constexpr bool kCopies = kRead == Read::bulk || kRead == Read::multicast;
  extern __shared__ __align__(128) unsigned char buffer[];
  __shared__ __align__(8) uint64_t arrived;
  cg::cluster_group cluster = cg::this_cluster();
  const unsigned ranks = cluster.num_blocks(), rank = cluster.block_rank();
  const unsigned chunks = bytes / sizeof(uint4);
  const char* bytes_of_source = reinterpret_cast<const char*>(source);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&arrived)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster.sync();
  unsigned own = 0;
  for (int i = 0; i < rounds; ++i) {
    // Announced before the barrier, behind which a neighbour may already send.
    if (kCopies && threadIdx.x == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&arrived)), "r"(bytes)
                   : "memory");
    }
    counter_barrier(counter, base + (i + 1) * gridDim.x);
    if constexpr (kRead == Read::plain) {
      constexpr unsigned kInFlight = 8;
      own = 0;
      for (unsigned first = threadIdx.x; first < chunks; first += kInFlight * blockDim.x) {
        uint4 loaded[kInFlight];
#pragma unroll
        for (unsigned k = 0; k < kInFlight; ++k) {
          const unsigned chunk = first + k * blockDim.x;
          loaded[k] = chunk < chunks ? __ldcg(source + chunk) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (unsigned k = 0; k < kInFlight; ++k) own += loaded[k].x + loaded[k].y + loaded[k].z + loaded[k].w;
      }
    }
    if constexpr (kCopies) {
      if (threadIdx.x == 0) {
        const unsigned share = kRead == Read::multicast ? bytes / ranks : bytes;
        const unsigned begin = kRead == Read::multicast ? rank * share : 0;
        for (unsigned at = begin; at < begin + share; at += piece) {
          const unsigned size = min(piece, begin + share - at);
          if constexpr (kRead == Read::multicast) {
            multicast_copy(buffer + at, bytes_of_source + at, size, &arrived, ranks);
          } else {
            bulk_copy(buffer + at, bytes_of_source + at, size, &arrived);
          }
        }
      }
      wait_for_bytes(&arrived, i & 1);
    }
  }
  if constexpr (kCopies) {
    const unsigned* words = reinterpret_cast<const unsigned*>(buffer);
    for (unsigned w = threadIdx.x; w < 4 * chunks; w += blockDim.x) own += words[w];
  }
  if (kRead != Read::nothing) atomicAdd(sum, own);
  cluster.sync();  // a block that has left cannot be written to
}

class Broadcast {
 public:
  explicit Broadcast(const Device& device) : device_(device) {
    std::vector<unsigned> words(kMost / sizeof(unsigned));
    unsigned state = 1;
    for (unsigned& word : words) word = state = state * 1664525u + 1013904223u;
    words_ = words;
    counter_ = zeros(32);
    sum_ = zeros(1);
    CHECK(cudaMalloc(&source_, kMost));
    CHECK(cudaMemcpy(source_, words.data(), kMost, cudaMemcpyHostToDevice));
  }
  ~Broadcast() {
    cudaFree(counter_);
    cudaFree(sum_);
    cudaFree(source_);
  }

  template <Read kRead>
  void run(const char* how, unsigned bytes, int cluster, unsigned piece, int threads = 256) {
    const auto kernel = broadcast_kernel<kRead>;
    allow_everything(kernel, kWholeProcessor);
    Launch launch{device_.processors / cluster * cluster, threads, kWholeProcessor, cluster};
    launch.stream = device_.stream;
    const int seated = launch.active_clusters(kernel);
    launch.blocks = std::min(launch.blocks, seated * cluster);
    if (launch.blocks == 0) return;  // "cluster seating" has said so
    const auto go = [&](int rounds) {
      CHECK(launch.run(kernel, rounds, counter_, base_, source_, bytes, piece, sum_));
      base_ += static_cast<unsigned>(rounds) * launch.blocks;
    };
    if (kRead != Read::nothing) verify(how, bytes, launch.blocks, go);
    const int rounds = 500;
    const std::vector<double> us = measure::time(device_.stream, rounds, kRepetitions, [&] { go(rounds); });
    Line("broadcast")
        .text("how", how)
        .number("bytes", kRead == Read::nothing ? 0 : bytes)
        .number("cluster", cluster)
        .number("blocks", launch.blocks)
        .number("threads", threads)
        .quantiles("us", us)
        .print();
  }

  static constexpr unsigned kMost = 160 * 1024;

 private:
  template <class Go>
  void verify(const char* how, unsigned bytes, int blocks, const Go& go) {
    unsigned expected = 0, got;
    for (unsigned w = 0; w < bytes / sizeof(unsigned); ++w) expected += words_[w];
    CHECK(cudaMemsetAsync(sum_, 0, sizeof(unsigned), device_.stream));
    go(3);
    CHECK(cudaMemcpyAsync(&got, sum_, sizeof got, cudaMemcpyDeviceToHost, device_.stream));
    CHECK(cudaStreamSynchronize(device_.stream));
    if (got == expected * static_cast<unsigned>(blocks)) return;
    std::fprintf(stderr, "broadcast, %s, %u bytes: the blocks read a sum of %u, wanted %u\n", how, bytes, got,
                 expected * static_cast<unsigned>(blocks));
    std::exit(1);
  }

  const Device& device_;
  std::vector<unsigned> words_;
  unsigned *counter_, *sum_, base_ = 0;
  uint4* source_;
};

void broadcast(const Device& device) {
  Broadcast broadcast(device);
  for (int cluster : {1, 2, 4, 8}) broadcast.run<Read::nothing>("nothing", 16, cluster, 16);
  for (unsigned kilobytes : {16u, 104u, 160u}) {
    const unsigned bytes = kilobytes * 1024;
    for (int threads : {256, 1024}) broadcast.run<Read::plain>("plain", bytes, 1, bytes, threads);
    broadcast.run<Read::bulk>("bulk", bytes, 1, bytes);
    broadcast.run<Read::bulk>("bulk, pieces of 8 KB", bytes, 1, 8192);
    for (int cluster : {2, 4, 8}) broadcast.run<Read::multicast>("multicast", bytes, cluster, bytes);
  }
}

constexpr struct {
  const char* name;
  void (*run)(const Device&);
} kSections[] = {
    {"barriers", barriers}, {"handoff", handoff}, {"clusters", clusters}, {"graph", graph}, {"broadcast", broadcast},
};

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    bool known = false;
    for (const auto& section : kSections) known |= std::strcmp(argv[i], section.name) == 0;
    if (!known) {
      std::fprintf(stderr, "section: got %s, wanted barriers, handoff, clusters, graph or broadcast\n", argv[i]);
      return 2;
    }
  }
  const Device device;
  for (const auto& section : kSections) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted |= std::strcmp(argv[i], section.name) == 0;
    if (wanted) section.run(device);
  }
  CHECK(cudaDeviceSynchronize());
  return 0;
}
