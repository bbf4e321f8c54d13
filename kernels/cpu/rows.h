// Operations on single rows: norm, quantise, silu, rotary embeddings, storing keys and values.
#pragma once

namespace motley::ISA {

// e^x by 2^n · e^r, |r| <= ln 2 / 2, with e^r's Taylor series to r^7 (error < 1e-7 of the result).
inline F exp(F x) {
  x = max(min(x, set(88.0f)), set(-87.0f));
  const I n = to_int(mul(x, set(1.44269504f)));
  const F whole = to_float(n);
  // ln 2 in two parts, the first with few enough bits that its product is exact.
  F r = fma(whole, set(-0.693359375f), x);
  r = fma(whole, set(2.12194440e-4f), r);
  constexpr float series[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  F p = set(1.0f / 5040);
  for (float coefficient : series) p = fma(p, r, set(coefficient));
  return mul(p, power(n));
}

// One group of 32 values, held in registers, as int8.
inline void quantise(const F* x, Act* out) {
  constexpr int vectors = kGroup / kLanes;
  F largest = zero();
  for (int i = 0; i < vectors; ++i) largest = max(largest, abs(x[i]));
  const float d = top(largest) / 127;
  const F inverse = set(d > 0 ? 1 / d : 0);
  int half[2] = {0, 0};
  for (int i = 0; i < vectors; ++i) {
    const I q = to_int(mul(x[i], inverse));
    store(out->q + kLanes * i, q);
    half[2 * i / vectors] += sum(q);
  }
  out->d = d;
  out->half[0] = d * float(half[0]);
  out->half[1] = d * float(half[1]);
  out->sum = d * float(half[0] + half[1]);
}

inline void quantise_row(const QuantiseOp& op, int row) {
  const float* in = op.in + int64_t(row) * op.width;
  Act* out = op.out + int64_t(row) * (op.width / kGroup);
  for (int g = 0; g < op.width / kGroup; ++g) {
    F x[kGroup / kLanes];
    for (int i = 0; i < kGroup / kLanes; ++i) x[i] = load(in + kGroup * g + kLanes * i);
    quantise(x, out + g);
  }
}

inline void norm_row(const NormOp& op, int row) {
  const float* in = op.in + int64_t(row) * op.width;
  Act* out = op.out + int64_t(row) * (op.width / kGroup);
  F squares = zero();
  for (int i = 0; i < op.width; i += kLanes) {
    const F x = load(in + i);
    squares = fma(x, x, squares);
  }
  const F scale = set(1 / std::sqrt(sum(squares) / float(op.width) + op.eps));
  for (int g = 0; g < op.width / kGroup; ++g) {
    F x[kGroup / kLanes];
    for (int i = 0; i < kGroup / kLanes; ++i) {
      const int at = kGroup * g + kLanes * i;
      x[i] = mul(mul(load(in + at), scale), load(op.weight + at));
    }
    quantise(x, out + g);
  }
}

// Units of silu are 512 columns of a row: its exponentials are worth sharing even for one row.
constexpr int kSiluColumns = 512;

inline int silu_parts(const SiluOp& op) { return (op.width + kSiluColumns - 1) / kSiluColumns; }

inline void silu_part(const SiluOp& op, int unit) {
  const int row = unit / silu_parts(op), first = unit % silu_parts(op) * kSiluColumns;
  const int last = first + kSiluColumns < op.width ? first + kSiluColumns : op.width;
  const float *gate = op.in + int64_t(row) * 2 * op.width, *up = gate + op.width;
  Act* out = op.out + int64_t(row) * (op.width / kGroup);
  for (int column = first; column < last; column += kGroup) {
    F x[kGroup / kLanes];
    for (int i = 0; i < kGroup / kLanes; ++i) {
      const int at = column + kLanes * i;
      const F g = load(gate + at);
      x[i] = mul(div(g, add(set(1), exp(sub(zero(), g)))), load(up + at));
    }
    quantise(x, out + column / kGroup);
  }
}

inline void angles_row(const AnglesOp& op, const Step& step, int row) {
  const int half = op.head_dim / 2;
  float* out = op.out + int64_t(row) * op.head_dim;
  for (int i = 0; i < half; ++i) {
    const float angle = float(step.positions[row]) * op.frequencies[i];
    out[i] = std::cos(angle);
    out[half + i] = std::sin(angle);
  }
}

// Rotates the pairs (x[i], x[i + half]); see reference.rope.
inline void rotate(float* x, const float* angles, int half) {
  const float *cosine = angles, *sine = angles + half;
  int i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const F low = load(x + i), high = load(x + half + i), c = load(cosine + i), s = load(sine + i);
    store(x + i, sub(mul(low, c), mul(high, s)));
    store(x + half + i, add(mul(high, c), mul(low, s)));
  }
  for (; i < half; ++i) {
    const float low = x[i], high = x[half + i];
    x[i] = low * cosine[i] - high * sine[i];
    x[half + i] = high * cosine[i] + low * sine[i];
  }
}

inline void narrow(const float* in, uint16_t* out, int count) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(in + i));
  for (; i < count; ++i) out[i] = to_half(in[i]);
}

inline void store_cache(int type, void* cache, int64_t at, const float* values, int count) {
  if (type == kFloat16)
    narrow(values, static_cast<uint16_t*>(cache) + at, count);
  else
    __builtin_memcpy(static_cast<float*>(cache) + at, values, sizeof(float) * count);
}

inline void rope_row(const RopeOp& op, const Step& step, int row) {
  const auto [queries, keys, dim] = op.heads;
  float* x = op.qkv + int64_t(row) * (queries + 2 * keys) * dim;
  const float* angles = op.angles + int64_t(row) * dim;
  for (int head = 0; head < queries + keys; ++head) rotate(x + head * dim, angles, dim / 2);
  const int64_t at = step.slots[row] * keys * dim;
  store_cache(op.cache.type, op.cache.keys, at, x + queries * dim, keys * dim);
  store_cache(op.cache.type, op.cache.values, at, x + (queries + keys) * dim, keys * dim);
}

}  // namespace motley::ISA
