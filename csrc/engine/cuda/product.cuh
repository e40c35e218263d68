// The product of two matrices that every layer is made of, C[m, n] = sum_k A[m, k] B[n, k], on tensor cores, in one
// block's tile of C. What is done with C is the caller's affair (layers.cu, update.cu).
//
// `exact`: an operand lies in memory in three bfloat16 parts, which together are the float (kernels.h, Parts), and C
// takes the six products of parts that are above 2^-24 of the whole: hi hi, hi mid, mid hi, hi lo, lo hi, mid mid. The
// range is that of float, so there is nothing to check. Tensor cores truncate as they add up: they add up over 16 k
// only, whose sum is then added to C by ordinary float additions, which round to nearest. `fast`: hi hi alone. Whoever
// writes an operand splits it, once; nobody who reads it does.
//
// Pieces of kSpan k indices go to shared memory by copies that do not wait, kStages of them under way at a time. The
// warps of a block share a tile by rows, columns and, kWarpsK of them, by k: at a batch of 100 there are few tiles, and
// sharing k inside the block makes each of them quick. A sum has one order, fixed by kWarpsK alone: a warp adds up
// every kWarpsK-th 16 k, and then the warps are added up.
#pragma once

#include "kernels.h"
#include "tensor_core.cuh"

namespace vae_fast {
namespace engine {

constexpr int kWarp = 32;
constexpr int kStep = 16;  // k indices that a warp multiplies at a time; and columns of a group of Parts
constexpr int kParts = 3;
constexpr int kGroup = kParts * kStep;  // of a group, bfloat16 numbers

template <int kRows_, int kCols_, int kSpan_, int kWarpsM_, int kWarpsN_, int kWarpsK_, int kStages_, int kBlocks_>
struct TileShape {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kSpan = kSpan_;  // k indices of a stage
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // of a multiprocessor, at least
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN * kWarpsK;
  static constexpr int kWarpRows = kRows / kWarpsM, kWarpCols = kCols / kWarpsN;
  static constexpr int kFragmentsM = kWarpRows / 16, kFragmentsN = kWarpCols / 8;
  static constexpr int kSumStride = kCols + 4;  // of C in shared memory; in column kCols, sums of A's rows
  // Of a thread, when C is handed out in fours
  static constexpr int kQuads = (kRows * kCols / 4 + kThreads - 1) / kThreads;
  static_assert(kWarpRows % 16 == 0 && kWarpCols % 16 == 0 && kSpan % (kStep * kWarpsK) == 0);
  static_assert(kCols / 4 <= kWarp && kThreads % (kCols / 4) == 0);
};

// The tile shapes. A product takes Wide or else Medium where there are enough of them to fill the GPU, and else Narrow,
// whatever is beside it: a model's bits are the same alone and among others. Of each two fit into a multiprocessor, and
// one into the 99 KB that are all that sm_86, sm_89 and sm_120 have.
//                    rows cols span  warps m n k  stages blocks   shared memory
using Narrow = TileShape<16, 32, 96, 1, 2, 6, 3, 2>;  //           88,320 bytes; batch 100, 500 wide: 112 blocks
using Medium = TileShape<64, 64, 32, 2, 2, 2, 3, 2>;  //           79,872 bytes; updates 76,800
using Wide = TileShape<128, 64, 32, 4, 2, 1, 2, 2>;   //           79,872 bytes

constexpr int kPartCols = 32;  // what is added up over columns is so over so many, whatever the tile

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
  __device__ __forceinline__ Parts of_model(Parts m) const {
    move(m.values);
    return m;
  }
  template <class... T>
  __device__ __forceinline__ void move(T*&... pointers) const {
    ((pointers = of_model(pointers)), ...);
  }
};

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

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Neighbours of a row into their parts: what one has left over when it is rounded is the next, exactly. kCount is 2 or
// 4, and `col` a multiple of it.
template <int kCount>
__device__ __forceinline__ void write_parts(const Parts& to, int64_t row, int64_t col, const float (&v)[kCount]) {
  uint16_t* at = to.values + row * to.stride + col / kStep * kGroup + col % kStep;
  float rest[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) rest[i] = v[i];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    uint32_t packed[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      packed[i / 2] = pack_bf16(rest[i], rest[i + 1]);
      rest[i] -= __uint_as_float(packed[i / 2] << 16);
      rest[i + 1] -= __uint_as_float(packed[i / 2] & 0xffff0000u);
    }
    write_words(at + part * kStep, packed);
  }
}

// An operand's piece in shared memory: the groups of Parts of kLines lines as they lie in global memory, a line being a
// row of the operand (kByRow), or else one k for all rows. The padding makes a line an odd number of 16 bytes, so that
// eight lines lie in different banks.
//
// An object of this type is what a thread copies of each piece: kUnits times 16 bytes of every kPass-th line.
template <Precision kPrecision, class Shape, int kRows, bool kByRow>
class Operand {
 public:
  static constexpr int kLines = kByRow ? kRows : Shape::kSpan, kGroups = (kByRow ? Shape::kSpan : kRows) / kStep;
  static constexpr int kPitch = kGroups * kGroup + 8, kSize = kLines * kPitch;  // bfloat16 numbers
  static_assert(kPitch / 8 % 2 == 1);

  // `first_row`: of the tile; rows at or beyond `rows`, and k beyond `ks`, are zeros.
  __device__ __forceinline__ Operand(const Parts& m, int64_t first_row, int64_t rows, int64_t ks) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes, line = static_cast<int>(threadIdx.x) / kLanes;
    constexpr bool kWhole = kPrecision == Precision::exact;
    const int offset = kWhole ? lane * 8 : lane / 2 * kGroup + lane % 2 * 8;  // of 16 bytes; of `fast`, of hi alone
    const int first = kWhole ? lane : lane / 2;
    to_ = line * kPitch + offset;
    const int64_t across = ceil_div(kByRow ? ks : rows, kStep) - (kByRow ? 0 : first_row / kStep);
    units_left_ = static_cast<int>(across < kMost ? across : kMost) * (kWhole ? 2 * kParts : 1) - first;
    next_lines_ = kPass * static_cast<int>(m.stride);
    if constexpr (kByRow) {
      from_ = m.values + (first_row + line) * m.stride + offset;
      lines_left_ = static_cast<int>(rows - first_row < kRows ? rows - first_row : kRows) - line;
      next_piece_ = kGroups * kGroup;
    } else {
      from_ = m.values + line * m.stride + first_row / kStep * kGroup + offset;
      lines_left_ = static_cast<int>(ks) - line;
      next_piece_ = Shape::kSpan * static_cast<int>(m.stride);
    }
  }

  // Starts to copy the next piece to a stage.
  __device__ __forceinline__ void load(uint16_t* stage) {
    const uint16_t* from = from_;
    uint16_t* to = stage + to_;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (kLines % kPass == 0 || static_cast<int>(threadIdx.x) / kLanes + i * kPass < kLines) {
#pragma unroll
        for (int j = 0; j < kUnits; ++j) {
          const bool valid = i * kPass < lines_left_ && j * kLanes < units_left_;
          copy_async(to + j * kLanes * 8, from + j * kLanes * 8, valid);
        }
      }
      from += next_lines_;
      to += kPass * kPitch;
    }
    from_ += next_piece_;
    if constexpr (kByRow) {
      units_left_ -= kGroups * (kPrecision == Precision::exact ? 2 * kParts : 1);
    } else {
      lines_left_ -= Shape::kSpan;
    }
  }

  // Where the lane's row of four 8 x 8 matrices begins, of 16 rows from `row` on and 16 k: those of rows 0 to 7, then
  // of 8 to 15, and then both again for k from 8 on; or, with kColumns, first by k and then by rows.
  template <bool kColumns>
  static __device__ __forceinline__ int place(int row) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, matrix = lane / 8;
    const int down = (kColumns ? matrix / 2 : matrix % 2) * 8, right = (kColumns ? matrix % 2 : matrix / 2) * 8;
    if constexpr (kByRow) return (row + down + lane % 8) * kPitch + right;
    return (right + lane % 8) * kPitch + row / kStep * kGroup + down;
  }
  static constexpr int kNextStep = kByRow ? kGroup : kStep * kPitch;  // from 16 k to the next
  static constexpr int kNextRows = kByRow ? kStep * kPitch : kGroup;  // from 16 rows to the next

 private:
  static constexpr int kUnits = kPrecision == Precision::exact ? kParts : 1;
  static constexpr int kLanes = 2 * kGroups, kPass = Shape::kThreads / kLanes, kSlots = (kLines + kPass - 1) / kPass;
  static constexpr int64_t kMost = 1 << 26;
  static_assert(Shape::kThreads % kLanes == 0 && (kLines % kPass == 0 || kSlots == 1));

  const uint16_t* from_;
  int next_lines_, next_piece_;
  int to_, units_left_, lines_left_;
};

template <int M, int N>
__device__ __forceinline__ void add(float (&to)[M][N][4], int m, const float (&more)[1][N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[m][n][i] += more[0][n][i];
  }
}

// What kStep indices of k give to a warp's part of C, and to the sums of its rows of A. a, b: the lane's places.
template <Precision kPrecision, class Shape, class A, class B, bool kAByRow, bool kBByRow>
__device__ __forceinline__ void add_step(float (&c)[Shape::kFragmentsM][Shape::kFragmentsN][4],
                                         float (&row_sums)[Shape::kFragmentsM][1][4], bool wants_row_sums,
                                         const uint16_t* a, const uint16_t* b) {
  constexpr int M = Shape::kFragmentsM, N = Shape::kFragmentsN;
  constexpr int kHeld = kPrecision == Precision::exact ? kParts : 1;
  // The products, by parts of A and of B, the smallest first; and in which sum. A product waits for the one before it
  // in its sum, so that where a warp has few fragments there are several sums.
  constexpr int kProducts = kPrecision == Precision::exact ? 6 : 1;
  constexpr int kSums = kProducts > 1 && M * N <= 4 ? 3 : 1;
  constexpr int kOfA[6] = {kHeld - 1, 0, 1, 1, 0, 0}, kOfB[6] = {0, kHeld - 1, 1, 0, 1, 0};
  constexpr int kSumOf[6] = {0, 1 % kSums, 2 % kSums, 0, 1 % kSums, 2 % kSums};
  uint32_t b_parts[kHeld][N][2];
#pragma unroll
  for (int part = 0; part < kHeld; ++part) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t four[4];
      load_matrices<!kBByRow>(four, b + n / 2 * B::kNextRows + part * kStep);
      b_parts[part][n][0] = four[0];
      b_parts[part][n][1] = four[1];
      b_parts[part][n + 1][0] = four[2];
      b_parts[part][n + 1][1] = four[3];
    }
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
    uint32_t a_parts[kHeld][1][4];
#pragma unroll
    for (int part = 0; part < kHeld; ++part) {
      load_matrices<!kAByRow>(a_parts[part][0], a + m * A::kNextRows + part * kStep);
    }
    float sums[kSums][1][N][4] = {};
#pragma unroll
    for (int i = 0; i < kProducts; ++i) multiply_add(sums[kSumOf[i]], a_parts[kOfA[i]], b_parts[kOfB[i]]);
    if constexpr (kSums == 3) {
      add(sums[0], 0, sums[1]);
      add(sums[2], 0, sums[0]);
    }
    add(c, m, sums[kSums - 1]);
    if (wants_row_sums) {
      const uint32_t ones[1][2] = {{0x3f803f80u, 0x3f803f80u}};
      float of_rows[1][1][4] = {};
#pragma unroll
      for (int part = kHeld - 1; part >= 0; --part) multiply_add(of_rows, a_parts[part], ones);
      add(row_sums, m, of_rows);
    }
  }
}

template <Precision kPrecision, class Shape, bool kAByRow, bool kBByRow>
struct TileMemory {
  using A = Operand<kPrecision, Shape, Shape::kRows, kAByRow>;
  using B = Operand<kPrecision, Shape, Shape::kCols, kBByRow>;
  static constexpr int kStage = A::kSize + B::kSize;
  static constexpr size_t kSums = sizeof(float) * Shape::kWarpsK * Shape::kRows * Shape::kSumStride;  // in their place
  static constexpr size_t kStages = sizeof(uint16_t) * Shape::kStages * kStage;
  static constexpr size_t kBytes = kStages > kSums ? kStages : kSums;
};

// Where a block's tile of C begins, and the ends of the matrices.
struct TileOf {
  int64_t row, col;        // the tile's first
  int64_t rows, cols, ks;  // of the whole product
};

// The tile of C in shared memory, kWarpsK summands of each element, see `Four`; and with `wants_row_sums` the sums over
// k of A's rows in column kCols. A's rows begin with a_first_row. Waits for the launches ahead, and before that reads
// of B alone, if `b_settled`; then calls `after_wait`. Ends with the block in step.
template <Precision kPrecision, class Shape, bool kAByRow, bool kBByRow, class AfterWait>
__device__ __forceinline__ void multiply_tile(float* memory, const Parts& a, const Parts& b, int64_t a_first_row,
                                              const TileOf& tile, bool b_settled, bool wants_row_sums,
                                              const AfterWait& after_wait) {
  using Memory = TileMemory<kPrecision, Shape, kAByRow, kBByRow>;
  using A = typename Memory::A;
  using B = typename Memory::B;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp_k = warp / (Shape::kWarpsM * Shape::kWarpsN);
  const int first_row = warp / Shape::kWarpsN % Shape::kWarpsM * Shape::kWarpRows;
  const int first_col = warp % Shape::kWarpsN * Shape::kWarpCols;
  const int pieces = static_cast<int>((tile.ks + Shape::kSpan - 1) / Shape::kSpan);
  const int a_place = A::template place<false>(first_row) + warp_k * A::kNextStep;
  const int b_place = A::kSize + B::template place<true>(first_col) + warp_k * B::kNextStep;
  uint16_t* const stages = reinterpret_cast<uint16_t*>(memory);

  B b_part(b, tile.col, tile.cols, tile.ks);
  if (b_settled) {  // its first pieces all belong to the first group
#pragma unroll
    for (int piece = 0; piece < Shape::kStages - 1; ++piece) {
      if (piece < pieces) b_part.load(stages + piece * Memory::kStage + A::kSize);
    }
  }
  wait_for_earlier_launches();
  let_next_launch_begin();
  const Parts a_rows{a.values + (kAByRow ? a_first_row * a.stride : 0), a.stride};
  A a_part(a_rows, tile.row, tile.rows, tile.ks);
#pragma unroll
  for (int piece = 0; piece < Shape::kStages - 1; ++piece) {
    if (piece < pieces) {
      a_part.load(stages + piece * Memory::kStage);
      if (!b_settled) b_part.load(stages + piece * Memory::kStage + A::kSize);
    }
    commit_copies();  // an empty group too: the count of groups is the count of pieces
  }
  after_wait();

  float c[Shape::kFragmentsM][Shape::kFragmentsN][4] = {}, row_sums[Shape::kFragmentsM][1][4] = {};
  int now = 0, next = Shape::kStages - 1;  // stages
  for (int piece = 0; piece < pieces; ++piece) {
    wait_for_copies<Shape::kStages - 2>();
    __syncthreads();  // this piece has arrived for all, and all are done with the one before it
    if (piece + Shape::kStages - 1 < pieces) {
      a_part.load(stages + next * Memory::kStage);
      b_part.load(stages + next * Memory::kStage + A::kSize);
    }
    commit_copies();
    const uint16_t* stage = stages + now * Memory::kStage;
#pragma unroll 1  // two at a time would spill
    for (int step = 0; step < Shape::kSpan / kStep / Shape::kWarpsK; ++step) {
      add_step<kPrecision, Shape, A, B, kAByRow, kBByRow>(c, row_sums, wants_row_sums && first_col == 0,
                                                          stage + a_place + step * Shape::kWarpsK * A::kNextStep,
                                                          stage + b_place + step * Shape::kWarpsK * B::kNextStep);
    }
    now = now + 1 == Shape::kStages ? 0 : now + 1;
    next = next + 1 == Shape::kStages ? 0 : next + 1;
  }
  wait_for_copies<0>();
  __syncthreads();
#pragma unroll
  for (int m = 0; m < Shape::kFragmentsM; ++m) {
    const int row = warp_k * Shape::kRows + first_row + 16 * m + lane / 4;
    float* sums = memory + row * Shape::kSumStride;
#pragma unroll
    for (int n = 0; n < Shape::kFragmentsN; ++n) {
      const int col = first_col + 8 * n + lane % 4 * 2;
      sums[col] = c[m][n][0];
      sums[col + 1] = c[m][n][1];
      sums[col + 8 * Shape::kSumStride] = c[m][n][2];
      sums[col + 8 * Shape::kSumStride + 1] = c[m][n][3];
    }
    if (wants_row_sums && first_col == 0 && lane % 4 == 0) {  // all columns of the product with ones are alike
      sums[Shape::kCols] = row_sums[m][0][0];
      sums[8 * Shape::kSumStride + Shape::kCols] = row_sums[m][0][2];
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
