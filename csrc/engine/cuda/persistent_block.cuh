// What both kinds of blocks of the persistent kernel do: wait for each other, split operands, multiply, update.
#pragma once

#include "elements.cuh"
#include "persistent_memory.h"

namespace vae_fast {
namespace engine {
namespace persistent {

// The piece of 16 bytes of a row of 128 that has columns 8 piece to 8 piece + 7 of a chunk: so that rows below each
// other are read from different banks.
__device__ __forceinline__ int piece_of(int row, int piece) { return piece ^ (row & 7); }

// Weights that a thread keeps in registers with their states: 16 of them, whichever block it is in.
struct Held {
  float w[16], s0[16], s1[16];
};
static_assert(kPairs * 8 == 16 && kTurns * 4 == 16);

template <Precision kPrecision, UpdateKind kKind>
struct Block {
  static constexpr int kParts = kPrecision == Precision::exact ? 2 : 1;
  static constexpr int kChunkHalves = halves_of_chunk(kParts);
  static constexpr int kStates = kKind == UpdateKind::adam ? 2 : kKind == UpdateKind::sgd ? 0 : 1;
  const Arguments& p;
  const Sizes& s;
  const Strides& strides;
  char* const memory;
  int thread, warp, lane, g, t;  // g and t as in tensor_core.cuh
  int row_group, k_group;        // of the warp
  bool out_of_range = false;
  int64_t last_look = 0;  // at the clock

  __device__ __forceinline__ explicit Block(const Arguments& arguments)
      : p(arguments),
        s(arguments.sizes),
        strides(arguments.strides),
        memory(reinterpret_cast<char*>(dynamic_shared())) {
    look_again();
  }

  // A phase of a step has ended. Its time is counted; and addresses that follow from the thread's place are made anew,
  // rather than kept over all phases in registers that there are not.
  __device__ __forceinline__ void end_of(int phase, const Place<int64_t>& spent) {
    look_again();
    if (!p.timed || thread != 0) return;
    const int64_t now = cycles();
    in(spent)[phase] += now - last_look;
    last_look = now;
  }
  __device__ __forceinline__ void start_clock(const Place<int64_t>& spent) {
    for (int phase = 0; thread == 0 && phase < kPhases; ++phase) in(spent)[phase] = 0;
    if (p.timed) last_look = cycles();
  }
  __device__ __forceinline__ void leave_cycles(const Place<int64_t>& spent) const {
    int64_t* to = p.exchanged.cycles + static_cast<int64_t>(blockIdx.x) * kPhases;
    for (int phase = 0; p.timed && thread == 0 && phase < kPhases; ++phase) to[phase] = in(spent)[phase];
  }
  __device__ __forceinline__ void look_again() {
    thread = opaque(static_cast<int>(threadIdx.x));
    warp = thread / kWarp;
    lane = thread % kWarp;
    g = lane / 4;
    t = lane % 4;
    row_group = warp % kGroups;
    k_group = warp / kGroups;
  }

  template <class T>
  __device__ __forceinline__ T* in(const Place<T>& place) const {
    return reinterpret_cast<T*>(memory + place.offset);
  }

  __device__ __forceinline__ uint32_t* event(Event which) const {
    return p.exchanged.events + which * (kBytesPerLine / 4);
  }

  // All threads: what they have written can be read behind `wait` for this event.
  __device__ __forceinline__ void signal(Event which) const {
    __syncthreads();
    if (thread == 0) add_to(event(which));
  }

  // All threads, until so many blocks have signalled it in each step up to this one. What they have written the first
  // thread may then take by bulk copies.
  __device__ __forceinline__ void wait(Event which, int64_t step, int blocks) const {
    if (thread == 0) {
      wait_for(event(which), static_cast<uint32_t>((step + 1) * blocks));
      order_global_before_copies();
    }
    __syncthreads();
  }

  struct Halves {
    uint16_t part[2];
  };
  __device__ __forceinline__ Halves split(float scaled) {
    out_of_range = out_of_range || !(fabsf(scaled) <= 65504.0f);
    const uint16_t high = half_bits(scaled);
    return {{high, kParts == 2 ? half_bits(scaled - half_value(high)) : uint16_t{0}}};
  }

  __device__ __forceinline__ static uint32_t pair_of(const Halves (&two)[2], int part) {
    return two[0].part[part] | static_cast<uint32_t>(two[1].part[part]) << 16;
  }

  // c += a b over 16 k; see persistent.h
  template <int kPartsA, int M, int N>
  __device__ __forceinline__ static void multiply(float (&c)[M][N][4], const uint32_t (&a)[kPartsA][M][4],
                                                  const uint32_t (&b)[kParts][N][2]) {
    float sum[M][N][4] = {};
    if constexpr (kPartsA == 2) multiply_add(FP16{}, sum, a[kPartsA - 1], b[0]);
    if constexpr (kParts == 2) multiply_add(FP16{}, sum, a[0], b[kParts - 1]);
    multiply_add(FP16{}, sum, a[0], b[0]);
    add(c, sum);
  }

  // Where the lane reads its fragments of B from: the first of [parts, rows, stride], of 8 rows and 16 columns. Those
  // of other rows and columns lie as far from there as they do from the first.
  __device__ __forceinline__ const uint16_t* b_of_lane(const uint16_t* from, int rows, int stride) const {
    const int part = kParts == 2 ? lane / 16 : 0;
    return from + (part * rows + lane % 8) * stride + lane / 8 % 2 * 8;
  }
  template <int N>
  __device__ __forceinline__ static void load_b(uint32_t (&b)[kParts][N][2], int n, const uint16_t* at) {
    uint32_t r[4];
    load_fragments(r, at);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      b[0][n][i] = r[i];
      b[kParts - 1][n][i] = r[2 * (kParts - 1) + i];
    }
  }

  // Gives a warp's sums of a row group to the sums of all k groups, [kGroups, rows, stride].
  template <int M, int N>
  __device__ __forceinline__ void leave(float* sums, int stride, const float (&c)[M][N][4]) const {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const int row = 32 * row_group + 16 * m + g;
      if (row - g >= s.rows) break;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float* to = sums + (k_group * kMostRows + row) * stride + 8 * n + 2 * t;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float2 two;
          two.x = c[m][n][2 * half];
          two.y = c[m][n][2 * half + 1];
          *reinterpret_cast<float2*>(to + half * 8 * stride) = two;
        }
      }
    }
  }

  // The sums over the k groups of two, or four, neighbours
  __device__ __forceinline__ static float2 two_sums(const float* sums, int stride, int row, int col) {
    float2 found = {};
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const float2 part = *reinterpret_cast<const float2*>(sums + (k * kMostRows + row) * stride + col);
      found.x += part.x;
      found.y += part.y;
    }
    return found;
  }
  __device__ __forceinline__ static void four_sums(const float* sums, int stride, int row, int col, float (&found)[4]) {
#pragma unroll
    for (float& one : found) one = 0.0f;
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const float4 part = *reinterpret_cast<const float4*>(sums + (k * kMostRows + row) * stride + col);
      found[0] += part.x;
      found[1] += part.y;
      found[2] += part.z;
      found[3] += part.w;
    }
  }

  __device__ __forceinline__ void step(const StepFactors& factors, float gradient, float& w, float& s0,
                                       float& s1) const {
    UpdateRule rule = p.rule;
    rule.kind = kKind;
    update(rule, factors, gradient, w, s0, s1);
  }
  __device__ __forceinline__ void step(const StepFactors& factors, float gradient, const Kept& kept, int i) const {
    float* value = in(kept.place) + i;
    step(factors, gradient, value[0], value[kept.count], value[2 * kept.count]);
  }
  // Of a weight, beside whose gradient the prior's stands
  __device__ __forceinline__ void step(const StepFactors& factors, float gradient, Held& held, int i) const {
    step(factors, Math<float>::fma(p.weight_prior, held.w[i], gradient), held.w[i], held.s0[i], held.s1[i]);
  }

  // `at` is the element's index in the tensors, or -1 where there is none
  __device__ __forceinline__ static void fetch(const Trained& from, int64_t at, float& w, float& s0, float& s1) {
    w = at >= 0 ? from.value[at] : 0.0f;
    s0 = kStates > 0 && at >= 0 ? from.state0[at] : 0.0f;
    s1 = kStates > 1 && at >= 0 ? from.state1[at] : 0.0f;
  }
  __device__ __forceinline__ void fetch(const Trained& from, int64_t at, const Kept& kept, int i) const {
    float* value = in(kept.place) + i;
    fetch(from, at, value[0], value[kept.count], value[2 * kept.count]);
  }
  __device__ __forceinline__ static void give_back(const Trained& to, int64_t at, float w, float s0, float s1) {
    if (at < 0) return;
    to.value[at] = w;
    if constexpr (kStates > 0) to.state0[at] = s0;
    if constexpr (kStates > 1) to.state1[at] = s1;
  }
  __device__ __forceinline__ void give_back(const Trained& to, int64_t at, const Kept& kept, int i) const {
    const float* value = in(kept.place) + i;
    give_back(to, at, value[0], value[kept.count], value[2 * kept.count]);
  }

  template <class IndexOf>
  __device__ __forceinline__ static void fetch(const Trained& from, Held& held, const IndexOf& index_of) {
#pragma unroll
    for (int i = 0; i < 16; ++i) fetch(from, index_of(i), held.w[i], held.s0[i], held.s1[i]);
  }
  template <class IndexOf>
  __device__ __forceinline__ static void give_back(const Trained& to, const Held& held, const IndexOf& index_of) {
#pragma unroll
    for (int i = 0; i < 16; ++i) give_back(to, index_of(i), held.w[i], held.s0[i], held.s1[i]);
  }

  // After the last step: whether every number of every block was in range, so that parameters may change.
  __device__ __forceinline__ bool ends_well() const {
    if (out_of_range) add_to(event(kOutOfRange));
    signal(kEnd);
    wait(kEnd, 0, s.encoder_blocks + s.decoder_blocks);
    return read_through(event(kOutOfRange)) == 0;
  }

  // Sums over the rows of a minibatch, four at a time, of columns that are 0 beyond it: of one is enough.
  __device__ __forceinline__ float dot(const float* a, const float* b) const {
    float sums[4] = {};
#pragma unroll 4
    for (int row = 0; row < s.rows; row += 4) {
      const float4 left = *reinterpret_cast<const float4*>(a + row), right = *reinterpret_cast<const float4*>(b + row);
      sums[0] = Math<float>::fma(left.x, right.x, sums[0]);
      sums[1] = Math<float>::fma(left.y, right.y, sums[1]);
      sums[2] = Math<float>::fma(left.z, right.z, sums[2]);
      sums[3] = Math<float>::fma(left.w, right.w, sums[3]);
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  __device__ __forceinline__ static float total(const float* a, int size) {
    float sums[4] = {};
    for (int row = 0; row < size; row += 4) {
      const float4 four = *reinterpret_cast<const float4*>(a + row);
      sums[0] += four.x;
      sums[1] += row + 1 < size ? four.y : 0.0f;
      sums[2] += row + 2 < size ? four.z : 0.0f;
      sums[3] += row + 3 < size ? four.w : 0.0f;
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  // sum + a b, n of them from float4s; n is a multiple of 4
  __device__ __forceinline__ static float add_dot(float sum, const float* a, const float* b, int n) {
#pragma unroll 2
    for (int i = 0; i < n; i += 4) {
      const float4 left = *reinterpret_cast<const float4*>(a + i), right = *reinterpret_cast<const float4*>(b + i);
      sum = Math<float>::fma(left.x, right.x, sum);
      sum = Math<float>::fma(left.y, right.y, sum);
      sum = Math<float>::fma(left.z, right.z, sum);
      sum = Math<float>::fma(left.w, right.w, sum);
    }
    return sum;
  }
};

}  // namespace persistent
}  // namespace engine
}  // namespace vae_fast
