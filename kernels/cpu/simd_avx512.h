// 16 lanes: AVX-512 F, BW, DQ, VL and VNNI.
#pragma once
#include <immintrin.h>

namespace motley::ISA {

constexpr int kLanes = 16;
constexpr int kTileRows = 16;  // activation rows that share one decoding of the weights
constexpr bool kSigned8 = false;  // 8-bit weights are offset by 128 to be unsigned

using F = __m512;
using I = __m512i;
using B = __m512i;

inline F zero() { return _mm512_setzero_ps(); }
inline F set(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F load(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(uint16_t* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline F load(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline F load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void store(int8_t* p, I x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}

inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F abs(F a) { return _mm512_abs_ps(a); }
inline float sum(F a) { return _mm512_reduce_add_ps(a); }
inline float top(F a) { return _mm512_reduce_max_ps(a); }

inline I zero_int() { return _mm512_setzero_si512(); }
inline I to_int(F a) { return _mm512_cvtps_epi32(a); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline int sum(I a) { return _mm512_reduce_add_epi32(a); }
// 2^n for n in -126 .. 127.
inline F power(I n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}

// Lanes of a and b in turn, from their lower or upper halves.
inline F zip_low(F a, F b) {
  const I at = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return _mm512_permutex2var_ps(a, at, b);
}
inline F zip_high(F a, F b) {
  const I at = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return _mm512_permutex2var_ps(a, at, b);
}

inline B bytes(const void* p) { return _mm512_loadu_si512(p); }
inline B low_nibbles(B x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline B high_nibbles(B x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
// Bit pair `pair` of each byte, as bits 4 and 5, over the bits of `low`.
template <int pair>
inline B with_pair(B low, B x) {
  const B shifted = pair < 2 ? _mm512_slli_epi16(x, 4 - 2 * pair) : _mm512_srli_epi16(x, 2 * pair - 4);
  return _mm512_or_si512(low, _mm512_and_si512(shifted, _mm512_set1_epi8(0x30)));
}
inline B bytes8(const void* p) { return _mm512_xor_si512(bytes(p), _mm512_set1_epi8(-128)); }

// Each lane's sum over `quads` quads of its weights w times the row's activations a.
template <int bits, int quads>
inline I dot(const B* w, const int8_t* a) {
  I even = zero_int(), odd = zero_int();
  const auto* x = reinterpret_cast<const Quad*>(a);
#pragma GCC unroll 8
  for (int t = 0; t < quads; t += 2) {
    even = _mm512_dpbusd_epi32(even, w[t], _mm512_set1_epi32(x[t]));
    odd = _mm512_dpbusd_epi32(odd, w[t + 1], _mm512_set1_epi32(x[t + 1]));
  }
  return _mm512_add_epi32(even, odd);
}

}  // namespace motley::ISA
