// 4 lanes: what every 64-bit Arm has, and its dot product instructions where the build allows them.
#pragma once
#include <arm_neon.h>

namespace motley::ISA {

constexpr int kLanes = 4;
constexpr int kTileRows = 8;
constexpr bool kSigned8 = true;  // 8-bit weights stay as they are

using F = float32x4_t;
using I = int32x4_t;
using B = int8x16_t;

inline F zero() { return vdupq_n_f32(0); }
inline F set(float x) { return vdupq_n_f32(x); }
inline F load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, F x) { vst1q_f32(p, x); }
inline F load(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline void store(uint16_t* p, F x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
// Four bytes in the lower half of a register.
inline uint8x8_t four_bytes(const void* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, 4);
  return vreinterpret_u8_u32(vdup_n_u32(word));
}
inline F load(const uint8_t* p) {
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(four_bytes(p)))));
}
inline F load(const int8_t* p) {
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(four_bytes(p))))));
}
inline void store(int8_t* p, I x) {
  const int16x4_t words = vmovn_s32(x);
  const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
  const uint32_t word = vget_lane_u32(vreinterpret_u32_s8(bytes), 0);
  __builtin_memcpy(p, &word, 4);
}

inline F add(F a, F b) { return vaddq_f32(a, b); }
inline F sub(F a, F b) { return vsubq_f32(a, b); }
inline F mul(F a, F b) { return vmulq_f32(a, b); }
inline F div(F a, F b) { return vdivq_f32(a, b); }
inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline F max(F a, F b) { return vmaxq_f32(a, b); }
inline F min(F a, F b) { return vminq_f32(a, b); }
inline F abs(F a) { return vabsq_f32(a); }
inline float sum(F a) { return vaddvq_f32(a); }
inline float top(F a) { return vmaxvq_f32(a); }

inline I zero_int() { return vdupq_n_s32(0); }
inline I to_int(F a) { return vcvtnq_s32_f32(a); }
inline F to_float(I a) { return vcvtq_f32_s32(a); }
inline int sum(I a) { return vaddvq_s32(a); }
// 2^n for n in -126 .. 127.
inline F power(I n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }

// Lanes of a and b in turn, from their lower or upper halves.
inline F zip_low(F a, F b) { return vzip1q_f32(a, b); }
inline F zip_high(F a, F b) { return vzip2q_f32(a, b); }

inline B bytes(const void* p) { return vld1q_s8(static_cast<const int8_t*>(p)); }
inline B low_nibbles(B x) { return vandq_s8(x, vdupq_n_s8(15)); }
inline B high_nibbles(B x) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(x), 4)); }
// Bit pair `pair` of each byte, as bits 4 and 5, over the bits of `low`.
template <int pair>
inline B with_pair(B low, B x) {
  constexpr int by = 4 - 2 * pair;
  const uint8x16_t shifted = vshlq_u8(vreinterpretq_u8_s8(x), vdupq_n_s8(by));
  return vorrq_s8(low, vreinterpretq_s8_u8(vandq_u8(shifted, vdupq_n_u8(0x30))));
}
inline B bytes8(const void* p) { return bytes(p); }

// Each lane's sum over `quads` quads of its weights w times the row's activations a. Without dot
// products, products of 4, 6 or 8 bits with int8 are at most 1,905, 8,001 or 16,256, so that 8, 4
// or 2 of them fit 16 bits.
template <int bits, int quads>
inline I dot(const B* w, const int8_t* a) {
  const auto* quad = reinterpret_cast<const Quad*>(a);
  I total = zero_int();
#ifdef __ARM_FEATURE_DOTPROD
#pragma GCC unroll 8
  for (int t = 0; t < quads; ++t)
    total = vdotq_s32(total, w[t], vreinterpretq_s8_s32(vdupq_n_s32(quad[t])));
#else
  constexpr int held = bits == 4 ? 8 : bits == 6 ? 4 : 2;
  constexpr int run = held < quads ? held : quads;
#pragma GCC unroll 4
  for (int t = 0; t < quads; t += run) {
    int16x8_t low = vdupq_n_s16(0), high = low;
#pragma GCC unroll 8
    for (int i = t; i < t + run; ++i) {
      const B x = vreinterpretq_s8_s32(vdupq_n_s32(quad[i]));
      low = vmlal_s8(low, vget_low_s8(w[i]), vget_low_s8(x));
      high = vmlal_high_s8(high, w[i], x);
    }
    total = vaddq_s32(total, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
  }
#endif
  return total;
}

}  // namespace motley::ISA
