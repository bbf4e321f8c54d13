// 4 lanes in plain C++, for processors that no other file is for.
#pragma once
#include <cmath>

namespace motley::ISA {

constexpr int kLanes = 4;
constexpr int kTileRows = 4;
constexpr bool kSigned8 = true;

typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
struct B { int8_t v[16]; };

inline F zero() { return F{}; }
inline F set(float x) { return F{x, x, x, x}; }
template <class T>
inline F load(const T* p) {
  return F{float(p[0]), float(p[1]), float(p[2]), float(p[3])};
}
inline F load(const uint16_t* p) {
  return F{from_half(p[0]), from_half(p[1]), from_half(p[2]), from_half(p[3])};
}
inline void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }
inline void store(uint16_t* p, F x) {
  for (int i = 0; i < 4; ++i) p[i] = to_half(x[i]);
}
inline void store(int8_t* p, I x) {
  for (int i = 0; i < 4; ++i) p[i] = int8_t(x[i]);
}

inline F add(F a, F b) { return a + b; }
inline F sub(F a, F b) { return a - b; }
inline F mul(F a, F b) { return a * b; }
inline F div(F a, F b) { return a / b; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }
inline F abs(F a) { return max(a, -a); }
inline float sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline float top(F a) {
  const float x = a[0] > a[2] ? a[0] : a[2], y = a[1] > a[3] ? a[1] : a[3];
  return x > y ? x : y;
}

inline I zero_int() { return I{}; }
inline I to_int(F a) {
  return I{int(lrintf(a[0])), int(lrintf(a[1])), int(lrintf(a[2])), int(lrintf(a[3]))};
}
inline F to_float(I a) { return __builtin_convertvector(a, F); }
inline int sum(I a) { return a[0] + a[1] + a[2] + a[3]; }
// 2^n for n in -126 .. 127.
inline F power(I n) { return (F)((n + 127) << 23); }

// Lanes of a and b in turn, from their lower or upper halves.
inline F zip_low(F a, F b) { return F{a[0], b[0], a[1], b[1]}; }
inline F zip_high(F a, F b) { return F{a[2], b[2], a[3], b[3]}; }

inline B bytes(const void* p) {
  B x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline B low_nibbles(B x) {
  for (int8_t& v : x.v) v &= 15;
  return x;
}
inline B high_nibbles(B x) {
  for (int8_t& v : x.v) v = int8_t(uint8_t(v) >> 4);
  return x;
}
// Bit pair `pair` of each byte, as bits 4 and 5, over the bits of `low`.
template <int pair>
inline B with_pair(B low, B x) {
  for (int i = 0; i < 16; ++i) low.v[i] |= int8_t(((uint8_t(x.v[i]) >> 2 * pair) & 3) << 4);
  return low;
}
inline B bytes8(const void* p) { return bytes(p); }

// Each lane's sum over `quads` quads of its weights w times the row's activations a.
template <int bits, int quads>
inline I dot(const B* w, const int8_t* a) {
  I total = zero_int();
  for (int t = 0; t < quads; ++t)
    for (int lane = 0; lane < 4; ++lane)
      for (int i = 0; i < 4; ++i) total[lane] += w[t].v[4 * lane + i] * a[4 * t + i];
  return total;
}

}  // namespace motley::ISA
