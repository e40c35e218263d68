// The functions of csrc/engine/cuda/tensor_core.cuh for the emulated device. Operands lose what the hardware does not
// read, products are exact, and the sum over the K of one instruction is truncated to a float, as on a device. A copy
// that does not wait is made when the thread waits for it, and not before: what is read too early is the NaN that
// shared memory is full of.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace vae_fast {
namespace engine {

inline uint32_t pack_bf16(float first, float second) {
  return __float2bfloat16_rn(first).bits | static_cast<uint32_t>(__float2bfloat16_rn(second).bits) << 16;
}

namespace emulated {

inline float truncated(double sum) {
  const float nearest = static_cast<float>(sum);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(sum) ? std::nextafterf(nearest, 0.0f) : nearest;
}

// Of what one lane holds in a register: its element k of kElements
inline double element(TF32, uint32_t bits, int) { return __uint_as_float(bits & ~0x1fffu); }
inline double element(BF16, uint32_t bits, int k) { return __uint_as_float(k == 0 ? bits << 16 : bits & 0xffff0000u); }
inline double element(FP16, uint32_t bits, int k) {
  return __half2float({static_cast<uint16_t>(k == 0 ? bits & 0xffff : bits >> 16)});
}
inline int elements(TF32) { return 1; }
inline int elements(FP16) { return 2; }
inline int elements(BF16) { return 2; }

constexpr int kMostRegisters = 64;

}  // namespace emulated

template <class Format, int M, int N>
void multiply_add(Format format, float (&c)[M][N][4], const uint32_t (&a)[M][4], const uint32_t (&b)[N][2]) {
  using namespace emulated;
  static_assert(4 * M + 2 * N <= kMostRegisters);
  static uint32_t registers[emulation::kMaxThreads / emulation::kWarp][2][emulation::kWarp][kMostRegisters];
  const int thread = emulation::linear_thread(), lane = thread % emulation::kWarp;
  emulation::Meeting& warp = emulation::block().warps[thread / emulation::kWarp];
  if (warp.members != emulation::kWarp) emulation::stop("a product without all lanes of a warp");
  auto& held = registers[thread / emulation::kWarp][warp.generation % 2];
  std::memcpy(held[lane], a, sizeof a);
  std::memcpy(held[lane] + 4 * M, b, sizeof b);
  emulation::meet(warp, lane, static_cast<uint64_t>(elements(format)));
  const int g = lane / 4, t = lane % 4;
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      for (int i = 0; i < 4; ++i) {
        // c[i]: row g or g + 8, of whose registers 0 and 2, or 1 and 3; column 2t or 2t + 1, row of B
        const int row = i / 2, col = 2 * t + i % 2;
        double sum = c[m][n][i];
        for (int owner = 0; owner < 4; ++owner) {
          for (int half = 0; half < 2; ++half) {
            const uint32_t left = held[4 * g + owner][4 * m + row + 2 * half];
            const uint32_t right = held[4 * col + owner][4 * M + 2 * n + half];
            for (int k = 0; k < elements(format); ++k) sum += element(format, left, k) * element(format, right, k);
          }
        }
        c[m][n][i] = truncated(sum);
      }
    }
  }
}

namespace emulated {

struct Copy {
  float* to;
  const float* from;
  int valid;
};
struct Copies {
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;  // under way, the oldest first
};
inline Copies& copies() {
  static Copies of_threads[emulation::kMaxThreads];
  return of_threads[emulation::linear_thread()];
}

}  // namespace emulated

inline void copy_async(float* to, const float* from, int valid, bool aligned) {
  check_alignment(to, aligned ? 16 : 4);
  if (aligned) check_alignment(from, 16);
  emulated::copies().open.push_back({to, from, valid});
}

inline void commit_copies() {
  emulated::copies().groups.push_back(std::move(emulated::copies().open));
  emulated::copies().open.clear();
}

template <int kGroups>
void wait_for_copies() {
  auto& groups = emulated::copies().groups;
  while (groups.size() > static_cast<size_t>(kGroups)) {
    for (const emulated::Copy& copy : groups.front()) {
      for (int i = 0; i < 4; ++i) copy.to[i] = i < copy.valid ? copy.from[i] : 0.0f;
    }
    groups.erase(groups.begin());
  }
}

inline void read_four(const float* from, float (&v)[4]) {
  check_alignment(from, 16);
  std::memcpy(v, from, sizeof v);
}

inline void write_four(float* to, const float (&v)[4]) {
  check_alignment(to, 16);
  std::memcpy(to, v, sizeof v);
}

// Launches of the emulated device do not overlap.
inline void wait_for_earlier_launches() {}
inline void let_next_launch_begin() {}

inline float* dynamic_shared() { return emulation::block().shared; }

}  // namespace engine
}  // namespace vae_fast
