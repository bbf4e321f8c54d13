// 8 lanes: AVX2, FMA and F16C.
#pragma once
#include <immintrin.h>

namespace motley::ISA {

constexpr int kLanes = 8;
constexpr int kTileRows = 4;
constexpr bool kSigned8 = true;  // 8-bit weights stay as they are

using F = __m256;
using I = __m256i;
using B = __m256i;

inline F zero() { return _mm256_setzero_ps(); }
inline F set(float x) { return _mm256_set1_ps(x); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline F load(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(uint16_t* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline F load(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline F load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline void store(int8_t* p, I x) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline float sum(F a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float top(F a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

inline I zero_int() { return _mm256_setzero_si256(); }
inline I to_int(F a) { return _mm256_cvtps_epi32(a); }
inline F to_float(I a) { return _mm256_cvtepi32_ps(a); }
inline int sum(I a) {
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
// 2^n for n in -126 .. 127.
inline F power(I n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

// Lanes of a and b in turn, from their lower or upper halves.
inline F zip_low(F a, F b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}
inline F zip_high(F a, F b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}

inline B bytes(const void* p) { return _mm256_loadu_si256(static_cast<const B*>(p)); }
inline B low_nibbles(B x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline B high_nibbles(B x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }
// Bit pair `pair` of each byte, as bits 4 and 5, over the bits of `low`.
template <int pair>
inline B with_pair(B low, B x) {
  const B shifted = pair < 2 ? _mm256_slli_epi16(x, 4 - 2 * pair) : _mm256_srli_epi16(x, 2 * pair - 4);
  return _mm256_or_si256(low, _mm256_and_si256(shifted, _mm256_set1_epi8(0x30)));
}
inline B bytes8(const void* p) { return bytes(p); }

// Each lane's sum over `quads` quads of its weights w times the row's activations a. A pair of
// products of 4, 6 or 8 bits with int8 is at most 3,810, 16,002 or 32,512, so that 8, 2 or 1 of
// them fit 16 bits.
template <int bits, int quads>
inline I dot(const B* w, const int8_t* a) {
  constexpr int held = bits == 4 ? 8 : bits == 6 ? 2 : 1;
  constexpr int run = held < quads ? held : quads;
  const B ones = _mm256_set1_epi16(1);
  const auto* quad = reinterpret_cast<const Quad*>(a);
  I total = zero_int();
#pragma GCC unroll 8
  for (int t = 0; t < quads; t += run) {
    B pairs = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = t; i < t + run; ++i) {
      const B x = _mm256_set1_epi32(quad[i]);
      const B product = bits == 8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(w[i]), _mm256_sign_epi8(x, w[i]))
                                  : _mm256_maddubs_epi16(w[i], x);
      pairs = _mm256_add_epi16(pairs, product);
    }
    total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, ones));
  }
  return total;
}

}  // namespace motley::ISA
