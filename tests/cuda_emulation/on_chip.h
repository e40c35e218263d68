// The functions of csrc/engine/cuda/on_chip.cuh for the emulated device. A bulk copy is made when a thread waits for
// it, and not before: it reads what its source holds by then.
#pragma once

#include "cuda_fp16.h"
#include "tensor_core.h"

namespace vae_fast {
namespace engine {

namespace emulated {

inline const uint16_t* const* rows_of_lanes(const uint16_t* row) {
  static const uint16_t* rows[emulation::kMaxThreads / emulation::kWarp][2][emulation::kWarp];
  check_alignment(row, 16);
  const int thread = emulation::linear_thread(), lane = thread % emulation::kWarp;
  emulation::Meeting& warp = emulation::block().warps[thread / emulation::kWarp];
  auto& held = rows[thread / emulation::kWarp][warp.generation % 2];
  held[lane] = row;
  emulation::meet(warp, lane, 0);
  return held;
}

struct Bulk {
  void* to;
  const void* from;
  uint32_t bytes;
};
struct Counted {
  uint32_t phases = 0;  // that have ended
  int64_t expected = -1;
  std::vector<Bulk> copies;
};
inline std::map<const Arrival*, Counted>& counted() {
  static std::map<const Arrival*, Counted> instance;
  return instance;
}

}  // namespace emulated

inline void load_fragments(uint32_t (&r)[4], const uint16_t* row) {
  const uint16_t* const* rows = emulated::rows_of_lanes(row);
  const int lane = emulation::linear_thread() % emulation::kWarp;
  for (int i = 0; i < 4; ++i) {
    const uint16_t* own = rows[8 * i + lane / 4] + lane % 4 * 2;
    r[i] = own[0] | static_cast<uint32_t>(own[1]) << 16;
  }
}

inline void load_transposed_fragments(uint32_t (&r)[4], const uint16_t* row) {
  const uint16_t* const* rows = emulated::rows_of_lanes(row);
  const int lane = emulation::linear_thread() % emulation::kWarp;
  for (int i = 0; i < 4; ++i) {
    const uint16_t *first = rows[8 * i + lane % 4 * 2], *second = rows[8 * i + lane % 4 * 2 + 1];
    r[i] = first[lane / 4] | static_cast<uint32_t>(second[lane / 4]) << 16;
  }
}

inline uint16_t half_bits(float value) { return __float2half_rn(value).bits; }
inline float half_value(uint16_t bits) { return __half2float({bits}); }

inline uint32_t halves_of_bytes(uint32_t word, bool upper) {
  if (upper) word >>= 16;
  return half_bits(static_cast<float>(word & 255)) |
         static_cast<uint32_t>(half_bits(static_cast<float>(word >> 8 & 255))) << 16;
}

inline int opaque(int value) { return value; }
inline int64_t cycles() { return 0; }

template <class T>
T read_through(const T* from) {
  return *from;
}

inline void start_arrivals(Arrival* arrivals, int count) {
  for (int i = 0; i < count; ++i) emulated::counted()[arrivals + i] = {};
}

inline void expect_bytes(Arrival* arrival, uint32_t bytes) {
  emulated::Counted& own = emulated::counted().at(arrival);
  if (own.expected >= 0) emulation::stop("bytes expected before those expected before have come");
  own.expected = bytes;
}

inline void copy_bulk(void* to, const void* from, uint32_t bytes, Arrival* arrival) {
  check_alignment(to, 16);
  check_alignment(from, 16);
  if (bytes % 16 != 0) emulation::stop("a bulk copy of no multiple of 16 bytes");
  emulated::counted().at(arrival).copies.push_back({to, from, bytes});
}

inline void wait_for_bytes(Arrival* arrival, uint32_t phase) {
  emulated::Counted& own = emulated::counted().at(arrival);
  while ((own.phases & 1) == phase) {
    int64_t under_way = 0;
    for (const emulated::Bulk& copy : own.copies) under_way += copy.bytes;
    if (own.expected >= 0 && under_way > own.expected) emulation::stop("more bytes than were expected");
    if (own.expected != under_way) {
      emulation::wait_for_others();
      continue;
    }
    for (const emulated::Bulk& copy : own.copies) std::memcpy(copy.to, copy.from, copy.bytes);
    own.copies.clear();
    own.expected = -1;
    ++own.phases;
  }
  emulation::block().progress = true;
}

inline void order_global_before_copies() {}
inline void order_shared_before_copies() {}

inline void add_to(uint32_t* event) {
  ++*event;
  emulation::block().progress = true;
  emulation::pause_if_slow();
}

inline void wait_for(const uint32_t* event, uint32_t target) {
  while (static_cast<int32_t>(*event - target) < 0) emulation::wait_for_others();
  emulation::block().progress = true;
}

}  // namespace engine
}  // namespace vae_fast
