// The one kernel of all operators: walk the rows of a [rows, cols] tensor, and where the operator sums over a row, add
// up what its threads found. An operator says what it reads, does and writes:
//
//   struct Op {
//     using Element;                              // the type of its tensors
//     static constexpr bool kVector;              // every row starts on a chunk boundary: see vec.cuh
//     static constexpr int kSums;                 // sums over a row that it wants, in Real<Element>; 0 for a map
//     static constexpr int kRegisters;            // of a thread, if not the 64 that keep 1024 threads on a processor
//     Row row(int64_t r) const;                   // pointers to row r and its constants
//     void prepare(row) const;                    // if there: what a row needs, while its first chunk is on its way
//     Input load(row, int64_t col, int n) const;  // what it needs of the n elements from col on, still unused
//     void apply(row, input, int64_t col, int n, sums) const;  // computes and writes, adds to sums.value[k]
//     R* sum(int k) const;                        // where sum k of every row goes (not for a map)
//   };
//
// A row that is summed has one owner: a few lanes, a warp or a block. A row too wide for one block (kWholeRow) is cut
// into segments: a first launch leaves the sum of each, a second adds those up, in order. Who adds what is fixed by the
// width of the row alone, so a row's sum is the same from run to run, on every GPU and whatever the other rows are.
// Rows of a map are cut into segments too, so that few but wide rows fill the machine.
#pragma once

#include <algorithm>

#include "vec.cuh"

namespace vae_fast {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kBlock = 128;           // threads of a block that holds several rows, or a segment of one
constexpr int kWideBlock = 256;       // threads of a block that sums one wide row
constexpr int kSegmentPerThread = 4;  // chunks of a map that a thread handles

// Chunks of the widest row that one block sums (16 for each thread of kWideBlock), chunks of a segment of wider rows
// (eight for each thread of kBlock), and the most segments of a row: beyond them a block sums several, so that the
// second launch has narrow rows only. (The tests lower these to reach every case.)
#ifndef VAE_FAST_WIDE_ROWS
#define VAE_FAST_WIDE_ROWS 4096, 1024, 4096
#endif
constexpr int64_t kWideRows[] = {VAE_FAST_WIDE_ROWS};
constexpr int64_t kWholeRow = kWideRows[0], kSegment = kWideRows[1], kMaxSegments = kWideRows[2];

// Limits of a grid; beyond them blocks take several rows or segments. (The tests lower them to reach that case.)
#ifndef VAE_FAST_MAX_GRID
#define VAE_FAST_MAX_GRID 0x7fffffff, 0xffff
#endif
constexpr int64_t kMaxGrid[] = {VAE_FAST_MAX_GRID};

// Threads that share a row, by the number of chunks in it: about one to eight chunks for each. 64 threads have four
// chunks each of 1024 floats; but 784 floats are 196 chunks, and of 128 such rows, which leave most of a GPU idle, 128
// threads are done sooner: 3.6 us against 4.7 on an H200, between kernels that differed in their registers too.
struct RowWidth {
  int64_t chunks;  // at most
  int threads;
};
constexpr RowWidth kRowWidths[] = {{1, 1},       {2, 2},        {4, 4},    {8, 8},        {16, 16},
                                   {128, kWarp}, {224, kBlock}, {256, 64}, {1024, kBlock}};

inline int threads_per_row(int64_t chunks, bool sums) {
  for (const RowWidth& width : kRowWidths) {
    if (chunks <= width.chunks) return width.threads;
  }
  return sums ? kWideBlock : kBlock;
}

template <class R, int kSums>
struct Sums {
  R value[kSums > 0 ? kSums : 1] = {};
};

// The sum of v over the threads that share a row, in a fixed order; every one of them gets it. A row wider than a warp
// has the block to itself.
template <class R>
__device__ __forceinline__ R sum_over_row(R v) {
  const int lanes = blockDim.x < kWarp ? static_cast<int>(blockDim.x) : kWarp;
  for (int offset = lanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullMask, v, offset);
  if (blockDim.x <= kWarp) return v;

  __shared__ R warp_sums[kWideBlock / kWarp];
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  __syncthreads();  // the readers of the sum before this one are done
  if (lane == 0) warp_sums[threadIdx.x / kWarp] = v;
  __syncthreads();
  v = lane < warps ? warp_sums[lane] : R{};
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullMask, v, offset);
  return v;
}

// The largest block, and the registers that its threads may have: Op::kRegisters if it says so.
template <class Op>
constexpr int block_of() {
  return Op::kSums > 0 ? kWideBlock : kBlock;
}
template <class Op>
constexpr auto registers_of(int) -> decltype(Op::kRegisters) {
  return Op::kRegisters;
}
template <class Op>
constexpr int registers_of(...) {
  return sizeof(typename Op::Element) == 8 ? 128 : 64;  // double is there for gradient checks
}

// What a row needs beside its elements, once the first of these are on their way: Op::prepare if there is one.
template <class Op>
__device__ __forceinline__ auto prepare_row(const Op& op, typename Op::Row& row, int) -> decltype(op.prepare(row)) {
  op.prepare(row);
}
template <class Op>
__device__ __forceinline__ void prepare_row(const Op&, typename Op::Row&, ...) {}

// Block (threads that share a row, rows); grid (rows, segments of a row). `segment` and the loops count chunks. Where
// `parts` is there, it takes the sums of segments, [kSums, rows, gridDim.y].
// What the memory has on its way is what the resident threads have asked for, so the launch bounds ask for many of
// them.
template <class Op>
__global__ void __launch_bounds__(block_of<Op>(), 65536 / (block_of<Op>() * registers_of<Op>(0)))
    rows_kernel(const Op op, int64_t rows, int64_t cols, int64_t segment, Real<typename Op::Element>* parts) {
  constexpr int N = kChunk<typename Op::Element>;
  const int64_t chunks = (cols + N - 1) / N;
  const int64_t row_step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  const int64_t segment_step = gridDim.y * segment;
  const int stride = static_cast<int>(blockDim.x);
  const auto elements = [cols](int64_t chunk) {  // of this chunk
    return Op::kVector || cols - chunk * N >= N ? N : static_cast<int>(cols - chunk * N);
  };

  // All threads of a block go round this loop equally often: the sums need every lane.
  for (int64_t block_row = static_cast<int64_t>(blockIdx.x) * blockDim.y; block_row < rows; block_row += row_step) {
    const int64_t r = block_row + threadIdx.y;
    Sums<Real<typename Op::Element>, Op::kSums> sums;
    if (r < rows) {
      typename Op::Row row = op.row(r);
      for (int64_t first = blockIdx.y * segment; first < chunks; first += segment_step) {
        const int64_t last = first + segment < chunks ? first + segment : chunks;
        int64_t chunk = first + threadIdx.x;
        if (chunk >= last) continue;
        typename Op::Input next = op.load(row, chunk * N, elements(chunk));
        prepare_row(op, row, 0);
        while (chunk < last) {  // the next chunk is on its way while this one is worked on
          const typename Op::Input input = next;
          const int64_t current = chunk;
          chunk += stride;
          if (chunk < last) next = op.load(row, chunk * N, elements(chunk));
          op.apply(row, input, current * N, elements(current), sums);
        }
      }
    }
    if constexpr (Op::kSums > 0) {
#pragma unroll
      for (int k = 0; k < Op::kSums; ++k) sums.value[k] = sum_over_row(sums.value[k]);
      if (r < rows && threadIdx.x == 0) {
#pragma unroll
        for (int k = 0; k < Op::kSums; ++k) {
          (parts ? parts[(k * rows + r) * gridDim.y + blockIdx.y] : op.sum(k)[r]) = sums.value[k];
        }
      }
    }
  }
}

// The second launch for wide rows: adds up what the segments of every row left.
template <class R, int kOpSums>
struct AddSegments {
  using Element = R;
  static constexpr bool kVector = false;
  static constexpr int kSums = kOpSums, N = kChunk<R>;

  const R* parts;  // [kSums, rows, count]
  int64_t rows, count;
  R* out[kSums];  // [rows] each

  struct Row {
    int64_t first;
  };
  struct Input {
    Chunk<R, N> parts[kSums];
  };

  __device__ Row row(int64_t r) const { return {r * count}; }

  __device__ Input load(const Row& row, int64_t c, int n) const {
    Input in;
#pragma unroll
    for (int k = 0; k < kSums; ++k) in.parts[k] = load_chunk<false, N>(parts + k * rows * count + row.first + c, n);
    return in;
  }

  __device__ void apply(const Row&, const Input& in, int64_t, int, Sums<R, kSums>& sums) const {
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
#pragma unroll
      for (int j = 0; j < N; ++j) sums.value[k] += in.parts[k].template get<R>(j);  // zero beyond the n that there are
    }
  }

  __device__ R* sum(int k) const { return out[k]; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Op>
int launch_grid(const Op& op, int64_t rows, int64_t cols, int threads, int64_t segment, int64_t segments, void* stream,
                Real<typename Op::Element>* parts = nullptr) {
  const int rows_per_block = threads <= (Op::kSums > 0 ? kWarp : kBlock) ? kBlock / threads : 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min(ceil_div(rows, rows_per_block), kMaxGrid[0])),
                        static_cast<unsigned>(segments));
  config.blockDim = dim3(static_cast<unsigned>(threads), static_cast<unsigned>(rows_per_block));
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchKernelEx(&config, rows_kernel<Op>, op, rows, cols, segment, parts);
  return cudaGetLastError();  // of this launch too
}

// Launches `op` on a [rows, cols] tensor. A sum over no elements is zero and is written; an empty map is not launched.
template <class Op>
int launch_rows(const Op& op, int64_t rows, int64_t cols, void* stream, const Workspace& workspace) {
  if (rows == 0 || (cols == 0 && Op::kSums == 0)) return cudaSuccess;
  const int64_t chunks = ceil_div(cols, kChunk<typename Op::Element>);
  const int threads = threads_per_row(chunks, Op::kSums > 0);
  if constexpr (Op::kSums == 0) {
    const int64_t segment = int64_t{threads} * kSegmentPerThread;
    return launch_grid(op, rows, cols, threads, segment, std::min(ceil_div(chunks, segment), kMaxGrid[1]), stream);
  } else {
    if (chunks <= kWholeRow) return launch_grid(op, rows, cols, threads, std::max<int64_t>(chunks, 1), 1, stream);
    using R = Real<typename Op::Element>;
    const int64_t count = std::min({ceil_div(chunks, kSegment), kMaxSegments, kMaxGrid[1]});
    R* parts = static_cast<R*>(workspace(static_cast<size_t>(rows * Op::kSums * count) * sizeof(R)));
    if (int error = launch_grid(op, rows, cols, kBlock, kSegment, count, stream, parts)) return error;
    AddSegments<R, Op::kSums> add{parts, rows, count, {}};
    for (int k = 0; k < Op::kSums; ++k) add.out[k] = op.sum(k);
    const int64_t part_chunks = ceil_div(count, kChunk<R>);
    return launch_grid(add, rows, count, threads_per_row(part_chunks, true), part_chunks, 1, stream);
  }
}

// Row r of a [rows, cols] tensor of T
template <class T>
__device__ __forceinline__ const T* row_of(const void* tensor, int64_t r, int64_t cols) {
  return static_cast<const T*>(tensor) + r * cols;
}
template <class T>
__device__ __forceinline__ T* row_of(void* tensor, int64_t r, int64_t cols) {
  return static_cast<T*>(tensor) + r * cols;
}

// The row of x that belongs to row r: samples come in front, so the rows of x repeat. The division, in 32 bits where
// that does, is for the rows beyond the first sample only.
__device__ __forceinline__ int64_t target_row(int64_t r, int64_t x_rows) {
  if (r < x_rows) return r;
  if (r <= 0xffffffffll) return static_cast<uint32_t>(r) % static_cast<uint32_t>(x_rows);
  return r % x_rows;
}

}  // namespace cuda
}  // namespace vae_fast
