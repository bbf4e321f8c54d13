// 16-bit floating point in plain C++: IEEE half precision, for set-up and for processors without
// instructions for it, and bfloat16, the upper half of a float.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>

namespace motley {

static inline float from_half(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 0) {  // zero or subnormal: mantissa · 2^-24
    const float value = float(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Rounded to nearest even; what is too large becomes infinity.
static inline uint16_t to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;     // not a number
  if (bits >= 0x477ff000) return sign | 0x7c00;    // 65,520 and more
  if (bits < 0x38800000) {                         // below 2^-14: let the adder round at 2^-24
    float shifted;
    std::memcpy(&shifted, &bits, 4);
    shifted += 0.5f;
    std::memcpy(&bits, &shifted, 4);
    return uint16_t(sign | (bits - 0x3f000000));
  }
  bits += 0xfff + (bits >> 13 & 1) - 0x38000000;  // round, and move the exponent's bias
  return uint16_t(sign | bits >> 13);
}

static inline float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

// Of a number that is not negative, rounded up.
static inline uint16_t to_bfloat16_above(float value) {
  return uint16_t((std::bit_cast<uint32_t>(value) + 0xffff) >> 16);
}

}  // namespace motley
