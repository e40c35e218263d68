// What csrc/cpu/amx.inl uses of AMX and AVX512_BF16, element by element, for processors that have neither: see
// avx512_emulation.h. Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: TILELOADD,
// TDPBF16PS, TILESTORED, VDPBF16PS.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace vae_fast {
namespace amx_emulation {

struct Tile {
  uint32_t element[16][16];
};
struct State {
  bool configured = false;
  Tile tile[8];
};
inline State& state() {
  thread_local State of_thread;
  return of_thread;
}

// Anything but eight full tiles, or an instruction without them, traps, as it would there.
inline void load_config(const void* from) {
  const uint8_t* config = static_cast<const uint8_t*>(from);
  bool full = config[0] == 1 && config[1] == 0;
  for (int i = 0; i < 8; ++i) full &= config[16 + 2 * i] == 64 && config[17 + 2 * i] == 0 && config[48 + i] == 16;
  if (!full) __builtin_trap();
  state().configured = true;
  std::memset(state().tile, 0, sizeof state().tile);
}
inline void release() { state().configured = false; }
inline Tile& tile(int number) {
  if (!state().configured) __builtin_trap();
  return state().tile[number];
}
inline void zero(int number) { std::memset(&tile(number), 0, sizeof(Tile)); }
inline void load(int number, const void* from, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(tile(number).element[i], static_cast<const char*>(from) + i * stride, 64);
}
inline void store(int number, void* to, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * stride, tile(number).element[i], 64);
}
// c[m][n] += sum_k a[m][2 k] b[k][2 n] + sum_k a[m][2 k + 1] b[k][2 n + 1], each sum one fused multiplication after
// another, rounded to nearest; numbers below 2^-126 are zero.
inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float flushed(float value) { return std::fabs(value) < 0x1p-126f ? 0.0f : value; }
inline void multiply_add(int c, int a, int b) {
  for (int m = 0; m < 16; ++m) {
    float sum[16][2] = {};
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = tile(a).element[m][k];
      for (int n = 0; n < 16; ++n) {
        const uint32_t right = tile(b).element[k][n];
        sum[n][0] = flushed(std::fma(flushed(as_float(left << 16)), flushed(as_float(right << 16)), sum[n][0]));
        sum[n][1] =
            flushed(std::fma(flushed(as_float(left & 0xFFFF0000u)), flushed(as_float(right & 0xFFFF0000u)), sum[n][1]));
      }
    }
    for (int n = 0; n < 16; ++n) {
      const float total = flushed(flushed(as_float(tile(c).element[m][n])) + flushed(sum[n][0] + sum[n][1]));
      std::memcpy(&tile(c).element[m][n], &total, sizeof total);
    }
  }
}

// sum + a b of the pairs in each lane, the upper number's product first
__attribute__((always_inline)) inline __m512 add_pairs(__m512 sum, __m512bh a, __m512bh b) {
  uint32_t left[16], right[16];
  std::memcpy(left, &a, sizeof left), std::memcpy(right, &b, sizeof right);
  for (int i = 0; i < 16; ++i) {
    const float upper =
        std::fma(flushed(as_float(left[i] & 0xFFFF0000u)), flushed(as_float(right[i] & 0xFFFF0000u)), flushed(sum[i]));
    sum[i] = flushed(std::fma(flushed(as_float(left[i] << 16)), flushed(as_float(right[i] << 16)), flushed(upper)));
  }
  return sum;
}

}  // namespace amx_emulation
}  // namespace vae_fast

#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps vae_fast::amx_emulation::add_pairs
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig vae_fast::amx_emulation::load_config
#define _tile_release vae_fast::amx_emulation::release
#define _tile_zero vae_fast::amx_emulation::zero
#define _tile_loadd vae_fast::amx_emulation::load
#define _tile_stored vae_fast::amx_emulation::store
#define _tile_dpbf16ps vae_fast::amx_emulation::multiply_add
