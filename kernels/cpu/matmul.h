// Quantised matrix × rows of quantised activations. Weights are decoded once for a tile of rows.
// An output is the same whatever rows stand beside its own and whichever thread makes it: its sum
// goes over the groups in order.
#pragma once

namespace motley::ISA {

// One group of 32 columns for the lanes of one part of a panel: weight = scale · q + min, where
// scales and mins are one for the group or one for each half of it.
template <int kHalves>
struct Weights {
  B q[kQuads];
  F scale[kHalves], min[kHalves];
};

inline void unpack_nibbles(const uint8_t (*planes)[kPlane], int part, B* q) {
  for (int v = 0; v < 4; ++v) {
    const B both = bytes(planes[v] + 4 * kLanes * part);
    q[v] = low_nibbles(both);
    q[v + 4] = high_nibbles(both);
  }
}

struct DecodeQ4_0 {
  using Block = Q4_0;
  static constexpr int kBits = 4, kHalves = 1, kGroups = 1;
  static constexpr bool kMin = true;
  static Weights<1> group(const Block& b, int, int part) {
    Weights<1> w;
    unpack_nibbles(b.low, part, w.q);
    w.scale[0] = load(b.d + kLanes * part);
    w.min[0] = mul(w.scale[0], set(-8));
    return w;
  }
};

struct DecodeQ4_1 {
  using Block = Q4_1;
  static constexpr int kBits = 4, kHalves = 1, kGroups = 1;
  static constexpr bool kMin = true;
  static Weights<1> group(const Block& b, int, int part) {
    Weights<1> w;
    unpack_nibbles(b.low, part, w.q);
    w.scale[0] = load(b.d + kLanes * part);
    w.min[0] = load(b.m + kLanes * part);
    return w;
  }
};

struct DecodeQ8_0 {
  using Block = Q8_0;
  static constexpr int kBits = 8, kHalves = 1, kGroups = 1;
  static constexpr bool kMin = !kSigned8;
  static Weights<1> group(const Block& b, int, int part) {
    Weights<1> w;
    for (int t = 0; t < kQuads; ++t) w.q[t] = bytes8(b.q[t] + 4 * kLanes * part);
    w.scale[0] = load(b.d + kLanes * part);
    w.min[0] = mul(w.scale[0], set(-128));
    return w;
  }
};

struct DecodeQ4_K {
  using Block = Q4_K;
  static constexpr int kBits = 4, kHalves = 1, kGroups = 8;
  static constexpr bool kMin = true;
  static Weights<1> group(const Block& b, int g, int part) {
    Weights<1> w;
    const int lane = kLanes * part;
    unpack_nibbles(b.low[g], part, w.q);
    w.scale[0] = mul(load(b.d + lane), load(b.scale[g] + lane));
    w.min[0] = mul(mul(load(b.dmin + lane), load(b.min[g] + lane)), set(-1));
    return w;
  }
};

struct DecodeQ6_K {
  using Block = Q6_K;
  static constexpr int kBits = 6, kHalves = 2, kGroups = 8;
  static constexpr bool kMin = true;
  static Weights<2> group(const Block& b, int g, int part) {
    Weights<2> w;
    const int lane = kLanes * part;
    unpack_nibbles(b.low[g], part, w.q);
    const B even = bytes(b.high[g][0] + 4 * lane), odd = bytes(b.high[g][1] + 4 * lane);
    w.q[0] = with_pair<0>(w.q[0], even);
    w.q[1] = with_pair<0>(w.q[1], odd);
    w.q[2] = with_pair<1>(w.q[2], even);
    w.q[3] = with_pair<1>(w.q[3], odd);
    w.q[4] = with_pair<2>(w.q[4], even);
    w.q[5] = with_pair<2>(w.q[5], odd);
    w.q[6] = with_pair<3>(w.q[6], even);
    w.q[7] = with_pair<3>(w.q[7], odd);
    for (int h = 0; h < 2; ++h) {
      w.scale[h] = mul(load(b.d + lane), load(b.scale[2 * g + h] + lane));
      w.min[h] = mul(w.scale[h], set(-32));
    }
    return w;
  }
};

template <class Decode>
inline F scaled_dot(const Weights<Decode::kHalves>& w, const int8_t* x, float scale, F total) {
  constexpr int halves = Decode::kHalves, quads = kQuads / halves;
#pragma GCC unroll 2
  for (int h = 0; h < halves; ++h) {
    const F products = to_float(dot<Decode::kBits, quads>(w.q + quads * h, x + 4 * quads * h));
    total = fma(mul(products, w.scale[h]), set(scale), total);
  }
  return total;
}

template <class Decode>
inline F accumulate(const Weights<Decode::kHalves>& w, const Act& a, F total) {
  total = scaled_dot<Decode>(w, a.q, a.d, total);
  if (__builtin_expect(a.fine != 0, 0)) total = scaled_dot<Decode>(w, a.rest, a.fine, total);
  if constexpr (Decode::kMin && Decode::kHalves == 1) total = fma(w.min[0], set(a.sum), total);
  if constexpr (Decode::kMin && Decode::kHalves == 2) {
    total = fma(w.min[0], set(a.half[0]), total);
    total = fma(w.min[1], set(a.half[1]), total);
  }
  return total;
}

// Bytes between the weights that are asked for and those in use. Processors guess less far, and
// stop at the end of a page: 4 to 16 rows then wait for memory that is not busy.
constexpr int kAhead = 8192;

template <class Decode>
inline void fetch_ahead(const typename Decode::Block* panel, int group) {
  constexpr int size = sizeof(typename Decode::Block) / Decode::kGroups;
  const char* ahead = reinterpret_cast<const char*>(panel) + int64_t(group) * size + kAhead;
  for (int i = 0; i < size; i += 64) __builtin_prefetch(ahead + i);
}

// out [kRows][16] = rows of activations, `groups` groups each, times one panel.
template <class Decode, int kRows>
void multiply_panel(const typename Decode::Block* panel, const Act* in, int groups,
                    float (*out)[kPanelRows]) {
  for (int part = 0; part < kPanelRows / kLanes; ++part) {
    F total[kRows];
    for (F& x : total) x = zero();
    for (int g = 0; g < groups; ++g) {
      if (part == 0) fetch_ahead<Decode>(panel, g);
      const auto w = Decode::group(panel[g / Decode::kGroups], g % Decode::kGroups, part);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) total[r] = accumulate<Decode>(w, in[r * groups + g], total[r]);
    }
    for (int r = 0; r < kRows; ++r) store(out[r] + kLanes * part, total[r]);
  }
}

template <class Decode, int kRows>
void multiply_tiles(const MatmulOp& op, int panel, int& row, int last) {
  const int groups = op.matrix.inputs / kGroup;
  const auto* weights = static_cast<const typename Decode::Block*>(op.matrix.data) +
                        int64_t(panel) * (groups / Decode::kGroups);
  const int first = panel * kPanelRows;
  const int width = op.matrix.outputs - first < kPanelRows ? op.matrix.outputs - first : kPanelRows;
  for (; row + kRows <= last; row += kRows) {
    float tile[kRows][kPanelRows];
    multiply_panel<Decode, kRows>(weights, op.in + int64_t(row) * groups, groups, tile);
    for (int r = 0; r < kRows; ++r) {
      float* out = op.out + int64_t(row + r) * op.stride + first;
      for (int i = 0; i < width; ++i) out[i] = op.add ? out[i] + tile[r][i] : tile[r][i];
    }
  }
}

template <class Decode>
void multiply_rows(const MatmulOp& op, int panel, int row, int last) {
  if constexpr (kTileRows >= 16) multiply_tiles<Decode, 16>(op, panel, row, last);
  if constexpr (kTileRows >= 8) multiply_tiles<Decode, 8>(op, panel, row, last);
  multiply_tiles<Decode, 4>(op, panel, row, last);
  multiply_tiles<Decode, 2>(op, panel, row, last);
  multiply_tiles<Decode, 1>(op, panel, row, last);
}

constexpr int kRowsAtOnce = 64;  // their activations stay in the second cache while panels pass

inline int matmul_panels(const MatmulOp& op) {
  return (op.matrix.outputs + kPanelRows - 1) / kPanelRows;
}

inline int matmul_units(const MatmulOp& op, int rows) {
  return matmul_panels(op) * ((rows + kRowsAtOnce - 1) / kRowsAtOnce);
}

inline void matmul(const MatmulOp& op, int rows, int unit) {
  const int panel = unit % matmul_panels(op), row = unit / matmul_panels(op) * kRowsAtOnce;
  const int last = row + kRowsAtOnce < rows ? row + kRowsAtOnce : rows;
  switch (op.matrix.format) {
    case kQ4_0: return multiply_rows<DecodeQ4_0>(op, panel, row, last);
    case kQ4_1: return multiply_rows<DecodeQ4_1>(op, panel, row, last);
    case kQ8_0: return multiply_rows<DecodeQ8_0>(op, panel, row, last);
    case kQ4_K: return multiply_rows<DecodeQ4_K>(op, panel, row, last);
    case kQ6_K: return multiply_rows<DecodeQ6_K>(op, panel, row, last);
  }
}

}  // namespace motley::ISA
