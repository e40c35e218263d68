// The product of two matrices that every layer is made of, C[m, n] = sum_k A[m, k] B[n, k], on tensor cores, in one
// block's tile of C. What is done with C is the caller's affair (layers.cuh, update.cuh).
//
// Operands are float in global memory. Chunks of kDepth of the k indices go to shared memory by copies that do not
// wait, kStages chunks under way at a time. The warps of a block share a tile by rows, columns and, kWarpsK of them, by
// k: at a batch of 100 there are few tiles, and sharing k inside the block makes each of them quick.
//
// `exact`: each operand is split, a = hi + lo with TF32 parts of 11 bits each, and C takes lo hi + hi lo + hi hi. The
// range is that of float, so there is nothing to check. Tensor cores truncate as they add up: they add up over one
// chunk only, whose sum is then added to C by ordinary float additions, which round to nearest. `fast`: operands
// rounded to bfloat16, one product.
//
// A sum has one order, fixed by the shapes alone: k inside a fragment, fragments inside a chunk, chunks, then kWarpsK.
#pragma once

#include "kernels.h"
#include "tensor_core.cuh"

namespace vae_fast {
namespace engine {

constexpr int kWarp = 32;

template <int kRows_, int kCols_, int kDepth_, int kWarpsM_, int kWarpsN_, int kWarpsK_, int kStages_>
struct TileShape {
  static constexpr int kRows = kRows_, kCols = kCols_, kDepth = kDepth_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_, kStages = kStages_;
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN * kWarpsK;
  static constexpr int kWarpRows = kRows / kWarpsM, kWarpCols = kCols / kWarpsN;
  static constexpr int kFragmentsM = kWarpRows / 16, kFragmentsN = kWarpCols / 8;
  static constexpr int kQuads = kRows * kCols / 4 / kThreads;  // of a thread, when C is handed out in fours
  static constexpr int kSumStride = kCols + 4;
  static_assert(kWarpRows % 16 == 0 && kWarpCols % 8 == 0 && kDepth % (16 * kWarpsK) == 0);
  static_assert(kQuads * kThreads * 4 == kRows * kCols && kCols / 4 <= kWarp);
};

// The tile shapes. Stages: bytes under way in a multiprocessor must cover a latency of about 0.7 us at the 64 bytes per
// cycle that it can take, 70 KB; and 99 KB of shared memory are all that sm_86, sm_89 and sm_120 have.
//                    rows cols depth  warps m n k  stages   shared memory
using Narrow = TileShape<32, 32, 64, 1, 2, 4, 5>;  //        92,160 bytes; batch 100, 500 wide: 64 blocks
using Wide = TileShape<64, 64, 32, 2, 2, 2, 4>;    //        81,920 bytes (updates 69,632); where it fills the GPU
using Broad = TileShape<64, 64, 64, 2, 2, 4, 2>;   //        73,728 bytes; for many models, in place of Narrow,
static_assert(Broad::kDepth == Narrow::kDepth && Broad::kWarpsK == Narrow::kWarpsK);  // whose sums' order it has

constexpr int kPartCols = 32;  // what is added up over columns is so over so many, whatever the tile

// A matrix of float in global memory. With `paired`, row r is row r / 2 of first or, for odd r, of second: mu and
// logvar of a latent, or of a feature, then stand side by side in the product, in one thread.
struct Matrix {
  const float *first, *second;
  int64_t stride;  // floats from a row to the next
  bool paired;
  bool aligned;  // every row begins at a multiple of 16 bytes

  __device__ __forceinline__ const float* row(int64_t r) const {
    if (!paired) return first + r * stride;
    return (r & 1 ? second : first) + (r >> 1) * stride;
  }
};

// What a block knows of the step: which model it does, that model's B, and where among all steps it is.
struct Here {
  int64_t bytes, step, size;

  __device__ __forceinline__ explicit Here(const Now& now, int64_t later = 0) : bytes(blockIdx.z * now.model_bytes) {
    step = *of_model(now.cursor) + now.offset + later;
    size = of_model(now.sizes)[step];
  }

  // What the block's model has where the first has p
  template <class T>
  __device__ __forceinline__ T* of_model(T* p) const {
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes));
  }
  __device__ __forceinline__ Matrix of_model(Matrix m) const {
    move(m.first, m.second);
    return m;
  }
  template <class... T>
  __device__ __forceinline__ void move(T*&... pointers) const {
    ((pointers = of_model(pointers)), ...);
  }
};

inline bool on_sixteen_bytes(const void* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % 4 == 0;
}

inline Matrix matrix_of(const float* first, int64_t stride, const float* second = nullptr) {
  return {first, second, stride, second != nullptr,
          on_sixteen_bytes(first, stride) && on_sixteen_bytes(second, stride)};
}

template <class Args>
int launch_kernel(cudaLaunchConfig_t config, void (*kernel)(Args), const Args& args, bool overlap) {
#if !defined(VAE_FAST_CUDA_EMULATION)
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  if (overlap) {
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
#endif
  cudaLaunchKernelEx(&config, kernel, args);
  return cudaGetLastError();
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A chunk of an operand in shared memory: kLines lines of kWidth floats, a line being a row (kByRow), or else one k for
// all rows. The padding keeps the lanes of a warp that read fragments out of each other's banks.
template <int kRows, int kDepth, bool kByRow>
struct SharedTile {
  static constexpr int kLines = kByRow ? kRows : kDepth, kWidth = kByRow ? kDepth : kRows;
  static constexpr int kStride = kWidth + (kByRow ? 8 : 4), kFloats = kLines * kStride;
  static_assert(kByRow ? kStride % 32 == 8 : kStride % 16 == 4);

  // Starts to copy the lines from first_line on and their elements from first_element on; zeros beyond the ends.
  template <int kThreads>
  static __device__ __forceinline__ void load(float* tile, const Matrix& from, int64_t first_line, int64_t lines,
                                              int64_t first_element, int64_t width) {
    constexpr int kFours = kLines * kWidth / 4;
#pragma unroll
    for (int i = 0; i < (kFours + kThreads - 1) / kThreads; ++i) {
      const int four = static_cast<int>(threadIdx.x) + i * kThreads;
      if (kFours % kThreads != 0 && four >= kFours) break;
      const int line = four / (kWidth / 4), element = four % (kWidth / 4) * 4;
      const int64_t left = first_line + line < lines ? width - first_element - element : 0;
      const int valid = left <= 0 ? 0 : left < 4 ? static_cast<int>(left) : 4;
      const float* source = valid ? from.row(first_line + line) + first_element + element : from.first;
      copy_async(tile + line * kStride + element, source, valid, from.aligned);
    }
  }

  // Elements k and k + 1, k even, of a row
  static __device__ __forceinline__ float2 pair(const float* tile, int row, int k) {
    if constexpr (kByRow) {
      return *reinterpret_cast<const float2*>(tile + row * kStride + k);
    } else {
      float2 two;
      two.x = tile[k * kStride + row];
      two.y = tile[(k + 1) * kStride + row];
      return two;
    }
  }
};

__device__ __forceinline__ void split(float value, uint32_t& high, uint32_t& low) {
  high = round_tf32(value);
  low = round_tf32(value - __uint_as_float(high));
}

// A chunk's contribution to what one warp has of C. Index 2t of k is TF32's t, index 2t + 1 its t + 4.
template <Precision kPrecision, class Shape, class TileA, class TileB>
__device__ __forceinline__ void add_chunk(float (&c)[Shape::kFragmentsM][Shape::kFragmentsN][4], const float* a_tile,
                                          const float* b_tile, int first_row, int first_col, int first_k) {
  constexpr int M = Shape::kFragmentsM, N = Shape::kFragmentsN;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  [[maybe_unused]] float chunk[M][N][4] = {};
#pragma unroll
  for (int k = 0; k < Shape::kDepth; k += 16 * Shape::kWarpsK) {
    if constexpr (kPrecision == Precision::fast) {
      uint32_t a[M][4], b[N][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = first_k + k + 8 * half + 2 * t;
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const float2 upper = TileA::pair(a_tile, first_row + 16 * m + g, at);
          const float2 lower = TileA::pair(a_tile, first_row + 16 * m + g + 8, at);
          a[m][2 * half] = pack_bf16(upper.x, upper.y);
          a[m][2 * half + 1] = pack_bf16(lower.x, lower.y);
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const float2 two = TileB::pair(b_tile, first_col + 8 * n + g, at);
          b[n][half] = pack_bf16(two.x, two.y);
        }
      }
      multiply_add(BF16{}, c, a, b);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = first_k + k + 8 * half + 2 * t;
        uint32_t a[2][M][4], b[2][N][2];  // high and low
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const float2 upper = TileA::pair(a_tile, first_row + 16 * m + g, at);
          const float2 lower = TileA::pair(a_tile, first_row + 16 * m + g + 8, at);
          split(upper.x, a[0][m][0], a[1][m][0]);
          split(lower.x, a[0][m][1], a[1][m][1]);
          split(upper.y, a[0][m][2], a[1][m][2]);
          split(lower.y, a[0][m][3], a[1][m][3]);
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const float2 two = TileB::pair(b_tile, first_col + 8 * n + g, at);
          split(two.x, b[0][n][0], b[1][n][0]);
          split(two.y, b[0][n][1], b[1][n][1]);
        }
        multiply_add(TF32{}, chunk, a[1], b[0]);
        multiply_add(TF32{}, chunk, a[0], b[1]);
        multiply_add(TF32{}, chunk, a[0], b[0]);
      }
    }
  }
  if constexpr (kPrecision == Precision::exact) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[m][n][i] += chunk[m][n][i];
      }
    }
  }
}

template <class Shape, bool kAByRow, bool kBByRow>
struct TileMemory {
  using A = SharedTile<Shape::kRows, Shape::kDepth, kAByRow>;
  using B = SharedTile<Shape::kCols, Shape::kDepth, kBByRow>;
  static constexpr int kStageFloats = A::kFloats + B::kFloats;
  static constexpr int kSumFloats = Shape::kWarpsK * Shape::kRows * Shape::kSumStride;  // in place of the stages
  static constexpr size_t kBytes = sizeof(float) * Shape::kStages * kStageFloats;
  static_assert(kSumFloats <= Shape::kStages * kStageFloats);
};

// Where a block's tile of C begins, and the ends of the matrices.
struct TileOf {
  int64_t row, col;        // the tile's first
  int64_t rows, cols, ks;  // of the whole product
};

// The tile of C in shared memory, kWarpsK summands of each element; see `four`. `each_chunk` is called with every
// chunk of A in turn. Waits for the launches ahead, and before that reads of B alone, if `b_settled`. Ends with the
// block in step.
template <Precision kPrecision, class Shape, bool kAByRow, bool kBByRow, class EachChunk>
__device__ __forceinline__ void multiply_tile(float* memory, const Matrix& a, const Matrix& b, int64_t a_first_row,
                                              const TileOf& tile, bool b_settled, const EachChunk& each_chunk) {
  using Memory = TileMemory<Shape, kAByRow, kBByRow>;
  using A = typename Memory::A;
  using B = typename Memory::B;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp_k = warp / (Shape::kWarpsM * Shape::kWarpsN);
  const int first_row = warp / Shape::kWarpsN % Shape::kWarpsM * Shape::kWarpRows;
  const int first_col = warp % Shape::kWarpsN * Shape::kWarpCols;
  const int chunks = static_cast<int>((tile.ks + Shape::kDepth - 1) / Shape::kDepth);

  const auto load_a = [&](int chunk) {
    if (chunk >= chunks) return;
    float* to = memory + chunk % Shape::kStages * Memory::kStageFloats;
    const int64_t k = int64_t{chunk} * Shape::kDepth;
    if constexpr (kAByRow) {
      A::template load<Shape::kThreads>(to, a, a_first_row + tile.row, a_first_row + tile.rows, k, tile.ks);
    } else {
      A::template load<Shape::kThreads>(to, a, k, tile.ks, tile.row, tile.rows);
    }
  };
  const auto load_b = [&](int chunk) {
    if (chunk >= chunks) return;
    float* to = memory + chunk % Shape::kStages * Memory::kStageFloats + A::kFloats;
    const int64_t k = int64_t{chunk} * Shape::kDepth;
    if constexpr (kBByRow) {
      B::template load<Shape::kThreads>(to, b, tile.col, tile.cols, k, tile.ks);
    } else {
      B::template load<Shape::kThreads>(to, b, k, tile.ks, tile.col, tile.cols);
    }
  };
  const auto load = [&](int chunk) {
    load_a(chunk);
    load_b(chunk);
    commit_copies();  // an empty group too: the count of groups is the count of chunks
  };

  float c[Shape::kFragmentsM][Shape::kFragmentsN][4] = {};
  if (b_settled) {  // its first chunks all belong to the first group
    for (int chunk = 0; chunk < Shape::kStages - 1; ++chunk) load_b(chunk);
  }
  wait_for_earlier_launches();
  let_next_launch_begin();
  for (int chunk = 0; chunk < Shape::kStages - 1; ++chunk) {
    load_a(chunk);
    if (!b_settled) load_b(chunk);
    commit_copies();
  }
  for (int chunk = 0; chunk < chunks; ++chunk) {
    wait_for_copies<Shape::kStages - 2>();
    __syncthreads();  // this chunk has arrived for all, and all are done with the one before it
    load(chunk + Shape::kStages - 1);
    const float* stage = memory + chunk % Shape::kStages * Memory::kStageFloats;
    add_chunk<kPrecision, Shape, A, B>(c, stage, stage + A::kFloats, first_row, first_col, 16 * warp_k);
    each_chunk(stage);
  }
  wait_for_copies<0>();
  __syncthreads();
#pragma unroll
  for (int m = 0; m < Shape::kFragmentsM; ++m) {
#pragma unroll
    for (int n = 0; n < Shape::kFragmentsN; ++n) {
      const int row = warp_k * Shape::kRows + first_row + 16 * m + lane / 4;
      float* sums = memory + row * Shape::kSumStride + first_col + 8 * n + lane % 4 * 2;
      sums[0] = c[m][n][0];
      sums[1] = c[m][n][1];
      sums[8 * Shape::kSumStride] = c[m][n][2];
      sums[8 * Shape::kSumStride + 1] = c[m][n][3];
    }
  }
  __syncthreads();
}

// Four neighbours of C in a row, as a thread gets them: the index-th of its kQuads.
template <class Shape>
struct Four {
  int row, col;  // in the tile
  float value[4];

  __device__ __forceinline__ Four(const float* memory, int index) {
    const int four = static_cast<int>(threadIdx.x) + index * Shape::kThreads;
    row = four / (Shape::kCols / 4);
    col = four % (Shape::kCols / 4) * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = 0.0f;
#pragma unroll
    for (int k = 0; k < Shape::kWarpsK; ++k) {
      const float4 part = *reinterpret_cast<const float4*>(memory + (k * Shape::kRows + row) * Shape::kSumStride + col);
      value[0] += part.x;
      value[1] += part.y;
      value[2] += part.z;
      value[3] += part.w;
    }
  }
};

// The sum over the lanes that hold kPartCols of a row, in a fixed order; all of a warp call it.
__device__ __forceinline__ float sum_over_part(float value) {
#pragma unroll
  for (int offset = kPartCols / 8; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

}  // namespace engine
}  // namespace vae_fast
