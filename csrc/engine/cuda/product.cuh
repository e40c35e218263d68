// The product of two matrices that every layer is made of, C[m, n] = sum_k A[m, k] B[n, k], on tensor cores, in one
// block's tile of C. What is done with C is the caller's affair (layers.cuh, update.cuh).
//
// Operands are float in global memory. Pieces of the k indices go to shared memory by copies that do not wait, kStages
// pieces under way at a time. The k indices are cut into kSlices slices. Where a block's warps walk all slices at once,
// each slice has warps of its own: at a batch of 100 there are few tiles, and sharing k inside the block makes each of
// them quick. Elsewhere the warps walk one slice after another.
//
// `exact`: each operand is split, a = hi + lo with TF32 parts of 11 bits each, and C takes lo hi + hi lo + hi hi. The
// range is that of float, so there is nothing to check. Tensor cores truncate as they add up: they add up over 16 k
// only, whose sum is then added to C by ordinary float additions, which round to nearest. `fast`: operands rounded to
// bfloat16, one product.
//
// A sum has one order, fixed by the lengths and kSlices alone: k inside a fragment, fragments inside a slice, slices.
#pragma once

#include "kernels.h"
#include "tensor_core.cuh"

namespace vae_fast {
namespace engine {

constexpr int kWarp = 32;
constexpr int kStep = 16;  // k indices that a warp multiplies at a time

template <int kRows_, int kCols_, int kDepth_, int kWarpsM_, int kWarpsN_, int kWarpsK_, int kSlices_, int kStages_,
          int kBlocks_>
struct TileShape {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kDepth = kDepth_;  // of a stage, in each slice that is walked
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_;
  static constexpr int kSlices = kSlices_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // of a multiprocessor, at least
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN * kWarpsK;
  static constexpr int kWarpRows = kRows / kWarpsM, kWarpCols = kCols / kWarpsN;
  static constexpr int kFragmentsM = kWarpRows / 16, kFragmentsN = kWarpCols / 8;
  static constexpr int kSpan = kWarpsK * kDepth;  // k indices in a stage
  static constexpr int kQuads =
      (kRows * kCols / 4 + kThreads - 1) / kThreads;  // of a thread, when C is handed out in fours
  static constexpr int kSumStride = kCols + 4;
  static_assert(kWarpRows % 16 == 0 && kWarpCols % 8 == 0 && kDepth % kStep == 0);
  static_assert(kWarpsK == 1 || (kWarpsK == kSlices && kDepth == kStep));
  static_assert(kCols / 4 <= kWarp && kThreads % (kCols / 4) == 0);
};

// The tile shapes. A product takes Wide or else Medium where there are enough of them to fill the GPU, and else Narrow;
// Broad is for many models, in place of Narrow, whose sums' order it has; Updates are the gradients of weights. sm_86,
// sm_89 and sm_120 have 99 KB of shared memory, so Medium is their Narrow.
//                    rows cols depth  warps m n k  slices  stages  blocks   shared memory
using Narrow = TileShape<16, 32, 16, 1, 1, 8, 8, 4, 2>;   //       104,448 bytes; batch 100, 500 wide: 112 blocks
using Medium = TileShape<64, 64, 16, 2, 2, 2, 2, 4, 2>;   //        81,920 bytes
using Wide = TileShape<128, 64, 32, 4, 2, 1, 1, 3, 2>;    //        92,160 bytes
using Broad = TileShape<128, 64, 32, 4, 2, 1, 8, 3, 1>;   //        92,160 bytes
using Updates = TileShape<64, 64, 16, 2, 2, 2, 2, 5, 2>;  //        87,040 bytes; all of a minibatch of 128 is under way
static_assert(Broad::kSlices == Narrow::kSlices);

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
  const Own* own_;

  __device__ __forceinline__ explicit Here(const Now& now, int64_t later = 0) : bytes(blockIdx.z * now.model_bytes) {
    own_ = of_model(now.own);
    step = *of_model(now.cursor) + now.offset + later;
    size = of_model(now.sizes)[step];
  }

  __device__ __forceinline__ const Own& own() const { return *own_; }

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

// How the k indices are cut: slice i has those from i * slice on, `slice` of them, in whole steps.
template <class Shape>
struct Cut {
  int steps, steps_of_slice, pieces;  // a piece fills a stage

  __device__ __forceinline__ explicit Cut(int64_t ks) {
    steps = static_cast<int>((ks + kStep - 1) / kStep);
    steps_of_slice = (steps + Shape::kSlices - 1) / Shape::kSlices;
    constexpr int kStepsOfPiece = Shape::kDepth / kStep;
    pieces = Shape::kWarpsK > 1 ? steps_of_slice : (steps + kStepsOfPiece - 1) / kStepsOfPiece;
  }
};

// An operand's piece in shared memory: kLines lines of kWidth floats, a line being a row of the operand (kByRow), or
// else one k for all rows. The padding keeps the lanes of a warp that read fragments out of each other's banks.
//
// An object of this type is what a thread copies of each piece: fours of lines that lie kPass lines apart, the same
// fours of every piece. Addresses move on by the same number of floats from four to four, and from piece to piece.
template <class Shape, int kRows, bool kByRow>
class Operand {
 public:
  static constexpr int kLines = kByRow ? kRows : Shape::kSpan, kWidth = kByRow ? Shape::kSpan : kRows;
  static constexpr int kStride = kWidth + (kByRow ? 8 : 4), kFloats = kLines * kStride;
  static_assert(kByRow ? kStride % 32 == 8 : kStride % 16 == 4);

  // `first_row`: of the tile; rows at or beyond `rows`, and k beyond `ks`, are zeros.
  __device__ __forceinline__ Operand(const Matrix& m, const Cut<Shape>& cut, int64_t first_row, int64_t rows,
                                     int64_t ks)
      : aligned_(m.aligned) {
    const int line = static_cast<int>(threadIdx.x) / kFours, element = static_cast<int>(threadIdx.x) % kFours * 4;
    to_ = line * kStride + element;
    const int64_t slice = int64_t{cut.steps_of_slice} * kStep;
    const int in_k = kByRow ? element : line;
    const int64_t k = Shape::kWarpsK > 1 ? in_k / Shape::kDepth * slice + in_k % Shape::kDepth : in_k;
    k_left_ = static_cast<int>(ks - k);
    if constexpr (kByRow) {
      const int64_t row = first_row + line;
      from_ = m.row(row) + k;
      next_four_ = kPass * static_cast<int>(m.stride) >> (m.paired ? 1 : 0);
      rows_left_ = static_cast<int>(rows - row < kRows ? rows - row : kRows);
    } else {
      const int64_t row = first_row + element;
      k_pass_ = Shape::kWarpsK > 1 ? kPass / Shape::kDepth * static_cast<int>(slice) : kPass;
      from_ = m.row(k) + row;
      next_four_ = k_pass_ * static_cast<int>(m.stride) >> (m.paired ? 1 : 0);
      next_piece_ = Shape::kDepth * static_cast<int>(m.stride) >> (m.paired ? 1 : 0);
      rows_left_ = static_cast<int>(rows - row < 4 ? (rows - row < 0 ? 0 : rows - row) : 4);
    }
  }

  // Starts to copy the next piece to a stage.
  __device__ __forceinline__ void load(float* stage) {
    if (aligned_) {
      load_fours<true>(stage);
    } else {
      load_fours<false>(stage);
    }
    from_ += kByRow ? Shape::kDepth : next_piece_;
    k_left_ -= Shape::kDepth;
  }

  // Elements k and k + 1 of a row, k even and counted within the stage
  static __device__ __forceinline__ float2 pair(const float* stage, int row, int k) {
    if constexpr (kByRow) {
      return *reinterpret_cast<const float2*>(stage + row * kStride + k);
    } else {
      float2 two;
      two.x = stage[k * kStride + row];
      two.y = stage[(k + 1) * kStride + row];
      return two;
    }
  }

 private:
  template <bool kAligned>
  __device__ __forceinline__ void load_fours(float* stage) const {
    const float* from = from_;
    float* to = stage + to_;
    const int valid_k = k_left_ < 0 ? 0 : k_left_ < 4 ? k_left_ : 4;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int valid = kByRow ? (i * kPass < rows_left_ ? valid_k : 0) : (i * k_pass_ < k_left_ ? rows_left_ : 0);
      copy_async(to, from, valid, kAligned);
      from += next_four_;
      to += kPass * kStride;
    }
  }

  static constexpr int kFours = kWidth / 4, kPass = Shape::kThreads / kFours, kSlots = kLines / kPass;
  static_assert(kFours * kPass == Shape::kThreads && kSlots * kPass == kLines);
  static_assert(kPass % 2 == 0 && (kByRow || Shape::kWarpsK == 1 || kPass % Shape::kDepth == 0));

  const float* from_;
  int next_four_, next_piece_ = 0;  // floats
  int to_, k_left_, rows_left_, k_pass_ = 0;
  bool aligned_;
};

// hi has 11 bits, nearest, ties away from zero; of lo, which is exact, the tensor cores read 11 bits. hi of a NaN may
// be any number, but lo is NaN then.
__device__ __forceinline__ void split(float value, uint32_t& high, uint32_t& low) {
  high = (__float_as_uint(value) + 0x1000u) & 0xffffe000u;
  low = __float_as_uint(value - __uint_as_float(high));
}

template <int M, int N>
__device__ __forceinline__ void clear(float (&c)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[m][n][i] = 0.0f;
    }
  }
}

template <int M, int N>
__device__ __forceinline__ void add(float (&to)[M][N][4], const float (&more)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[m][n][i] += more[m][n][i];
    }
  }
}

// What kStep indices of k from `at` on give to a warp's part of C. Index 2t of k is TF32's t, index 2t + 1 its t + 4.
template <Precision kPrecision, class Shape, class A, class B>
__device__ __forceinline__ void add_step(float (&c)[Shape::kFragmentsM][Shape::kFragmentsN][4], const float* a_stage,
                                         const float* b_stage, int first_row, int first_col, int at) {
  constexpr int M = Shape::kFragmentsM, N = Shape::kFragmentsN;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4;
  at += lane % 4 * 2;
  if constexpr (kPrecision == Precision::fast) {
    uint32_t a[M][4], b[N][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const float2 upper = A::pair(a_stage, first_row + 16 * m + g, at + 8 * half);
        const float2 lower = A::pair(a_stage, first_row + 16 * m + g + 8, at + 8 * half);
        a[m][2 * half] = pack_bf16(upper.x, upper.y);
        a[m][2 * half + 1] = pack_bf16(lower.x, lower.y);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float2 two = B::pair(b_stage, first_col + 8 * n + g, at + 8 * half);
        b[n][half] = pack_bf16(two.x, two.y);
      }
    }
    multiply_add(BF16{}, c, a, b);
  } else {
    float sum[M][N][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[2][M][4], b[2][N][2];  // high and low
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const float2 upper = A::pair(a_stage, first_row + 16 * m + g, at + 8 * half);
        const float2 lower = A::pair(a_stage, first_row + 16 * m + g + 8, at + 8 * half);
        split(upper.x, a[0][m][0], a[1][m][0]);
        split(lower.x, a[0][m][1], a[1][m][1]);
        split(upper.y, a[0][m][2], a[1][m][2]);
        split(lower.y, a[0][m][3], a[1][m][3]);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float2 two = B::pair(b_stage, first_col + 8 * n + g, at + 8 * half);
        split(two.x, b[0][n][0], b[1][n][0]);
        split(two.y, b[0][n][1], b[1][n][1]);
      }
      multiply_add(TF32{}, sum, a[1], b[0]);
      multiply_add(TF32{}, sum, a[0], b[1]);
      multiply_add(TF32{}, sum, a[0], b[0]);
    }
    add(c, sum);
  }
}

template <class Shape, bool kAByRow, bool kBByRow>
struct TileMemory {
  using A = Operand<Shape, Shape::kRows, kAByRow>;
  using B = Operand<Shape, Shape::kCols, kBByRow>;
  static constexpr int kStageFloats = A::kFloats + B::kFloats;
  static constexpr int kSumFloats = Shape::kWarpsK * Shape::kRows * Shape::kSumStride;  // in place of the stages
  static constexpr size_t kBytes =
      sizeof(float) * (Shape::kStages * kStageFloats > kSumFloats ? Shape::kStages * kStageFloats : kSumFloats);
};

// Where a block's tile of C begins, and the ends of the matrices.
struct TileOf {
  int64_t row, col;        // the tile's first
  int64_t rows, cols, ks;  // of the whole product
};

// The tile of C in shared memory, kWarpsK summands of each element; see `four`. Waits for the launches ahead, and
// before that reads of B alone, if `b_settled`; then calls `after_wait`. `each_piece` is called with every piece of A
// in turn. Ends with the block in step.
template <Precision kPrecision, class Shape, bool kAByRow, bool kBByRow, class AfterWait, class EachPiece>
__device__ __forceinline__ void multiply_tile(float* memory, const Matrix& a, const Matrix& b, int64_t a_first_row,
                                              const TileOf& tile, bool b_settled, const AfterWait& after_wait,
                                              const EachPiece& each_piece) {
  using Memory = TileMemory<Shape, kAByRow, kBByRow>;
  using A = typename Memory::A;
  using B = typename Memory::B;
  constexpr bool kWalksSlices = Shape::kSlices > Shape::kWarpsK;  // one after another
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp_k = warp / (Shape::kWarpsM * Shape::kWarpsN);
  const int first_row = warp / Shape::kWarpsN % Shape::kWarpsM * Shape::kWarpRows;
  const int first_col = warp % Shape::kWarpsN * Shape::kWarpCols;
  const Cut<Shape> cut(tile.ks);
  const auto stage = [&](int piece) { return memory + piece % Shape::kStages * Memory::kStageFloats; };

  B b_part(b, cut, tile.col, tile.cols, tile.ks);
  const int ahead = cut.pieces < Shape::kStages - 1 ? cut.pieces : Shape::kStages - 1;
  if (b_settled) {  // its first pieces all belong to the first group
    for (int piece = 0; piece < ahead; ++piece) b_part.load(stage(piece) + A::kFloats);
  }
  wait_for_earlier_launches();
  let_next_launch_begin();
  A a_part(a, cut, a_first_row + tile.row, a_first_row + tile.rows, tile.ks);
#pragma unroll
  for (int piece = 0; piece < Shape::kStages - 1; ++piece) {
    if (piece < ahead) {
      a_part.load(stage(piece));
      if (!b_settled) b_part.load(stage(piece) + A::kFloats);
    }
    commit_copies();  // an empty group too: the count of groups is the count of pieces
  }
  after_wait();

  float c[Shape::kFragmentsM][Shape::kFragmentsN][4] = {};
  [[maybe_unused]] float total[Shape::kFragmentsM][Shape::kFragmentsN][4] = {};
  [[maybe_unused]] int steps_left = cut.steps_of_slice;
  for (int piece = 0; piece < cut.pieces; ++piece) {
    wait_for_copies<Shape::kStages - 2>();
    __syncthreads();  // this piece has arrived for all, and all are done with the one before it
    if (piece + Shape::kStages - 1 < cut.pieces) {
      float* next = stage(piece + Shape::kStages - 1);
      a_part.load(next);
      b_part.load(next + A::kFloats);
    }
    commit_copies();
    const float* now = stage(piece);
#pragma unroll 1
    for (int step = 0; step < Shape::kDepth / kStep; ++step) {  // unrolled it spills
      add_step<kPrecision, Shape, A, B>(c, now, now + A::kFloats, first_row, first_col,
                                        warp_k * Shape::kDepth + step * kStep);
      if constexpr (kWalksSlices) {
        if (--steps_left == 0) {
          steps_left = cut.steps_of_slice;
          add(total, c);
          clear(c);
        }
      }
    }
    each_piece(now);
  }
  if constexpr (kWalksSlices) {
    add(total, c);
    clear(c);
    add(c, total);
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

struct Place {  // of the first of four neighbours in a row of C
  int64_t row, col;
};

// Four neighbours of C in a row, as a thread gets them: the index-th of its kQuads.
template <class Shape>
struct Four {
  float value[4];

  __device__ __forceinline__ Four(const float* memory, int index) {
    const int four = static_cast<int>(threadIdx.x) + index * Shape::kThreads;
    const int row = four / (Shape::kCols / 4), col = four % (Shape::kCols / 4) * 4;
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
