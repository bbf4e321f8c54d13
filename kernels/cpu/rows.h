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

constexpr int kGroupVectors = kGroup / kLanes;
constexpr float kOutlier = 4;  // times the row's root mean square: see Act

// x = steps of size d, as int8; adds d · Σ steps of each half to `half`. x becomes what is left.
inline void take_steps(F* x, float d, int8_t* steps, float* half) {
  const F inverse = set(d > 0 ? 1 / d : 0);
  int count[2] = {0, 0};
  for (int i = 0; i < kGroupVectors; ++i) {
    const I q = to_int(mul(x[i], inverse));
    store(steps + kLanes * i, q);
    count[2 * i / kGroupVectors] += sum(q);
    x[i] = fma(to_float(q), set(-d), x[i]);
  }
  for (int h = 0; h < 2; ++h) half[h] += d * float(count[h]);
}

// One group of 32 values, held in registers; `limit` is what makes a value an outlier.
inline void quantise(F* x, float limit, Act* out) {
  F largest = zero();
  for (int i = 0; i < kGroupVectors; ++i) largest = max(largest, abs(x[i]));
  const float highest = top(largest);
  out->d = highest / 127;
  out->fine = highest > limit ? out->d / 254 : 0;
  out->half[0] = out->half[1] = 0;
  take_steps(x, out->d, out->q, out->half);
  if (out->fine != 0) take_steps(x, out->fine, out->rest, out->half);
  out->sum = out->half[0] + out->half[1];
}

// Root mean square of in · weight [width].
inline float row_rms(const float* in, const float* weight, int width) {
  F squares = zero();
  for (int i = 0; i < width; i += kLanes) {
    const F x = weight ? mul(load(in + i), load(weight + i)) : load(in + i);
    squares = fma(x, x, squares);
  }
  return std::sqrt(sum(squares) / float(width));
}

// out = quantised in · scale · weight; no weight is a weight of 1.
inline void quantise_scaled(const float* in, float scale, const float* weight, int width, Act* out) {
  const float limit = kOutlier * scale * row_rms(in, weight, width);
  for (int column = 0; column < width; column += kGroup) {
    F x[kGroupVectors];
    for (int i = 0; i < kGroupVectors; ++i) {
      const int at = column + kLanes * i;
      x[i] = mul(load(in + at), set(scale));
      if (weight) x[i] = mul(x[i], load(weight + at));
    }
    quantise(x, limit, out + column / kGroup);
  }
}

inline void quantise_row(const QuantiseOp& op, int row) {
  const int64_t at = int64_t(row) * op.width;
  quantise_scaled(op.in + at, 1, nullptr, op.width, op.out + at / kGroup);
}

inline void norm_row(const NormOp& op, int row) {
  const int64_t at = int64_t(row) * op.width;
  const float rms = row_rms(op.in + at, nullptr, op.width);
  const float scale = 1 / std::sqrt(rms * rms + op.eps);
  quantise_scaled(op.in + at, scale, op.weight, op.width, op.out + at / kGroup);
}

inline void silu_row(const SiluOp& op, int row) {
  float *gate = op.gate_up + int64_t(row) * 2 * op.width, *up = gate + op.width;
  for (int i = 0; i < op.width; i += kLanes) {
    const F g = load(gate + i);
    store(gate + i, mul(div(g, add(set(1), exp(sub(zero(), g)))), load(up + i)));
  }
  quantise_scaled(gate, 1, nullptr, op.width, op.out + int64_t(row) * (op.width / kGroup));
}

inline void angles_row(const AnglesOp& op, const Step& step, int row) {
  const int half = op.head_dim / 2;
  float* out = op.out + int64_t(row) * op.head_dim;
  for (int i = 0; i < half; ++i) {
    const float angle = float(step.positions[row]) * op.frequencies[i];
    out[i] = op.magnitude * std::cos(angle);
    out[half + i] = op.magnitude * std::sin(angle);
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

// One head's values as int8, and their step behind them: see KvLayer.
inline void round_head(const float* in, int dim, int8_t* out) {
  F largest = zero();
  int i = 0;
  for (; i + kLanes <= dim; i += kLanes) largest = max(largest, abs(load(in + i)));
  float highest = top(largest);
  for (; i < dim; ++i) highest = std::fmax(highest, std::fabs(in[i]));
  const uint16_t step = to_bfloat16_above(highest / 127);
  const float inverse = highest > 0 ? 1 / from_bfloat16(step) : 0;
  for (i = 0; i + kLanes <= dim; i += kLanes)
    store(out + i, to_int(mul(load(in + i), set(inverse))));
  for (; i < dim; ++i) out[i] = int8_t(std::lrint(in[i] * inverse));
  __builtin_memcpy(out + dim, &step, sizeof step);
}

// One token's keys or values [K, E] into its slot.
inline void store_cache(int type, void* cache, int64_t slot, const float* values, const Heads& heads) {
  const int count = heads.keys * heads.dim;
  if (type == kFloat16)
    narrow(values, static_cast<uint16_t*>(cache) + slot * count, count);
  else if (type == kFloat32)
    __builtin_memcpy(static_cast<float*>(cache) + slot * count, values, sizeof(float) * count);
  else
    for (int head = 0; head < heads.keys; ++head)
      round_head(values + head * heads.dim, heads.dim,
                 static_cast<int8_t*>(cache) + (slot * heads.keys + head) * (heads.dim + kStepBytes));
}

// reference.rms_norm of one head; its dim need not be whole vectors.
inline void norm_head(float* x, const float* weight, int dim, float eps) {
  float squares = 0;
  for (int i = 0; i < dim; ++i) squares += x[i] * x[i];
  const float scale = 1 / std::sqrt(squares / float(dim) + eps);
  for (int i = 0; i < dim; ++i) x[i] = x[i] * scale * weight[i];
}

inline void rope_row(const RopeOp& op, const Step& step, int row) {
  const auto [queries, keys, dim] = op.heads;
  const int width = (queries + 2 * keys) * dim;
  float* x = op.qkv + int64_t(row) * width;
  if (op.bias)
    for (int i = 0; i < width; ++i) x[i] += op.bias[i];
  const float* angles = op.angles + int64_t(row) * dim;
  for (int head = 0; head < queries + keys; ++head) {
    const float* norm = head < queries ? op.query_norm : op.key_norm;
    if (norm) norm_head(x + head * dim, norm, dim, op.eps);
    rotate(x + head * dim, angles, dim / 2);
  }
  const int64_t slot = step.slots[row];
  store_cache(op.cache.type, op.cache.keys, slot, x + queries * dim, op.heads);
  store_cache(op.cache.type, op.cache.values, slot, x + (queries + keys) * dim, op.heads);
}

constexpr int64_t kSummed = 1 << 18;

inline void sum_part(const SumOp& op, int unit) {
  constexpr int chains = 8;  // additions that do not wait for each other
  const float* in = op.in + unit * kSummed;
  F totals[chains];
  for (F& total : totals) total = zero();
  for (int64_t i = 0; i < kSummed; i += chains * kLanes)
    for (int c = 0; c < chains; ++c) totals[c] = add(totals[c], load(in + i + c * kLanes));
  op.out[unit] = 0;
  for (const F& total : totals) op.out[unit] += sum(total);
}

}  // namespace motley::ISA
