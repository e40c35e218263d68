// binary16 of the emulated device. Conversions round to nearest, ties to even.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  const float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                          : exponent     ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25)
                                         : std::ldexp(static_cast<float>(fraction), -24);
  return h.bits & 0x8000 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float f) {
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const float a = std::fabs(f);
  if (std::isnan(f)) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (a >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent;
  std::frexp(a, &exponent);  // a < 2^exponent
  const int unit = exponent < -13 || a == 0.0f ? -24 : exponent - 11;
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(a, -unit)));  // exact but for the rounding to an integer
  return {static_cast<uint16_t>(sign + (unit == -24 ? steps : (unit + 25) * 1024 + steps - 1024))};
}

inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline float __low2float(__half2 pair) { return __half2float(pair.x); }
inline float __high2float(__half2 pair) { return __half2float(pair.y); }
