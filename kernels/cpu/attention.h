// Causal attention over a paged cache, for any mixture of prompts and single tokens.
//
// A unit is one kv head and a tile of neighbouring tokens of one sequence with all the query heads
// that share it. Keys pass in tiles of 64 positions, counted from the sequence's start, with the
// online softmax of Milakov & Gimelshein (2018): a token's result does not depend on the tokens
// computed beside it, so a prompt may be cut anywhere and decoding equals prefilling, bit for bit.
#pragma once

namespace motley::ISA {

constexpr int kKeys = 64;
constexpr int kVectors = 4;                             // of keys or of a value, in one inner loop
constexpr int kQueryRows = kLanes == 16 ? 4 : kLanes == 8 ? 2 : 1;  // what registers hold beside

inline int least(int a, int b) { return a < b ? a : b; }
inline int most(int a, int b) { return a > b ? a : b; }

// What a thread works in. W is head_dim rounded up to whole inner loops; what is beyond stays 0.
struct Workplace {
  float *keys;     // [W][64]: transposed, so that a lane is a key
  float *values;   // [64][W]
  float *queries;  // [rows][W], scaled
  float *scores;   // [rows][64]
  float *out;      // [rows][W]
  float *top, *total, *shrink;  // [rows]: the softmax's running maximum and sum
  int width;
};

inline int attention_width(int dim) {
  const int whole = kVectors * kLanes;
  return (dim + whole - 1) / whole * whole;
}

inline Workplace lay_out(float* memory, int rows, int dim) {
  Workplace w;
  w.width = attention_width(dim);
  const auto take = [&](int64_t count) {
    float* p = memory;
    memory += (count + 15) / 16 * 16;
    return p;
  };
  w.keys = take(int64_t(w.width) * kKeys);
  w.values = take(int64_t(w.width) * kKeys);
  w.queries = take(int64_t(w.width) * rows);
  w.scores = take(int64_t(kKeys) * rows);
  w.out = take(int64_t(w.width) * rows);
  w.top = take(rows);
  w.total = take(rows);
  w.shrink = take(rows);
  return w;
}

inline int64_t attention_floats(const AttentionOp& op) {
  const int64_t rows = kTileTokens * (op.heads.queries / op.heads.keys);
  return attention_width(op.heads.dim) * (2 * kKeys + 2 * rows) + rows * (kKeys + 3) + 8 * 16;
}

// Row by row of interleaving, log2(lanes) times: the classic shuffle network for a transpose.
inline void transpose(F* x) {
  F y[kLanes];
  for (int step = 1; step < kLanes; step *= 2) {
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = zip_low(x[i], x[i + kLanes / 2]);
      y[2 * i + 1] = zip_high(x[i], x[i + kLanes / 2]);
    }
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}

inline float widen(float x) { return x; }
inline float widen(uint16_t x) { return from_half(x); }

// One token's numbers of one kv head, as they lie in the cache.
template <class T>
struct Stored {
  const T* at;
  static int size(int dim) { return dim; }
  static Stored in(const T* at, int) { return {at}; }
  F vector(int e) const { return load(at + e); }
  float one(int e) const { return widen(at[e]); }
};

template <>
struct Stored<int8_t> {
  const int8_t* at;
  float step;
  static int size(int dim) { return dim + kStepBytes; }
  static Stored in(const int8_t* at, int dim) {
    uint16_t bits;
    __builtin_memcpy(&bits, at + dim, sizeof bits);
    return {at, from_bfloat16(bits)};
  }
  F vector(int e) const { return mul(load(at + e), set(step)); }
  float one(int e) const { return float(at[e]) * step; }
};

// Where token `position` of one kv head begins in a layer's keys or values.
template <class T>
inline const T* place(const T* cache, const Heads& heads, const int32_t* table, int head, int position) {
  const int64_t slot = int64_t(table[position / kBlockTokens]) * kBlockTokens + position % kBlockTokens;
  return cache + (slot * heads.keys + head) * Stored<T>::size(heads.dim);
}

// Ask for tokens [first, last) of one kv head: they lie too far apart for the processor to guess.
template <class T>
inline void fetch(const T* cache, const Heads& heads, const int32_t* table, int head, int first,
                  int last) {
  for (int i = first; i < last; ++i) {
    const T* row = place(cache, heads, table, head, i);
    const int size = Stored<T>::size(heads.dim);
    for (int e = 0; e < size; e += 64 / int(sizeof(T))) __builtin_prefetch(row + e);
  }
}

// Bring `count` tokens from `first` on of one kv head; what lies beyond `count` becomes 0.
template <class T>
inline void stage(const T* keys, const T* values, const Heads& heads, const int32_t* table, int head,
           int first, int count, const Workplace& w) {
  const int even = heads.dim / kLanes * kLanes;
  for (int i = 0; i < count; i += kLanes) {
    Stored<T> row[kLanes];
    const int present = least(count - i, kLanes);
    for (int r = 0; r < present; ++r)
      row[r] = Stored<T>::in(place(keys, heads, table, head, first + i + r), heads.dim);
    for (int e = 0; e < even; e += kLanes) {
      F x[kLanes];
      for (int r = 0; r < kLanes; ++r) x[r] = r < present ? row[r].vector(e) : zero();
      transpose(x);
      for (int r = 0; r < kLanes; ++r) store(w.keys + (e + r) * kKeys + i, x[r]);
    }
    for (int e = even; e < heads.dim; ++e)
      for (int r = 0; r < kLanes; ++r) w.keys[e * kKeys + i + r] = r < present ? row[r].one(e) : 0;
  }
  for (int i = 0; i < count; ++i) {
    const auto row = Stored<T>::in(place(values, heads, table, head, first + i), heads.dim);
    for (int e = 0; e < even; e += kLanes) store(w.values + i * w.width + e, row.vector(e));
    for (int e = even; e < heads.dim; ++e) w.values[i * w.width + e] = row.one(e);
  }
}

// out [kRows][kVectors · lanes] (+)= left [kRows][depth] · right [depth][…], rows `…_stride` apart.
template <int kRows>
inline void product(const float* left, int left_stride, const float* right, int right_stride,
                    int depth, bool add_to, float* out, int out_stride) {
  F total[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      total[r][v] = add_to ? load(out + r * out_stride + kLanes * v) : zero();
  for (int k = 0; k < depth; ++k) {
    F x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load(right + k * right_stride + kLanes * v);
    for (int r = 0; r < kRows; ++r) {
      const F factor = set(left[r * left_stride + k]);
      for (int v = 0; v < kVectors; ++v) total[r][v] = fma(factor, x[v], total[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + kLanes * v, total[r][v]);
}

// The same for any number of rows and for columns in whole inner loops.
template <int kRows = kQueryRows>
inline void products(const float* left, int left_stride, const float* right, int right_stride,
                     int depth, bool add_to, float* out, int out_stride, int rows, int columns) {
  int r = 0;
  for (; r + kRows <= rows; r += kRows)
    for (int c = 0; c < columns; c += kVectors * kLanes)
      product<kRows>(left + r * left_stride, left_stride, right + c, right_stride, depth, add_to,
                     out + r * out_stride + c, out_stride);
  if constexpr (kRows > 1)
    if (r < rows)
      products<kRows - 1>(left + r * left_stride, left_stride, right, right_stride, depth, add_to,
                          out + r * out_stride, out_stride, rows - r, columns);
}

// Turns one row of scores into weights, of which those in [low, high) count; shrinks what came
// before. Others become 0.
inline void soften(const Workplace& w, int row, int low, int high) {
  float* scores = w.scores + row * kKeys;
  const auto blank = [&](float value) {
    for (int i = 0; i < low; ++i) scores[i] = value;
    for (int i = high; i < kKeys; ++i) scores[i] = value;
  };
  blank(-INFINITY);
  F highest = load(scores), total = zero();
  for (int i = kLanes; i < kKeys; i += kLanes) highest = max(highest, load(scores + i));
  const float before = w.top[row], now = std::fmax(before, top(highest));
  for (int i = 0; i < kKeys; i += kLanes) store(scores + i, exp(sub(load(scores + i), set(now))));
  blank(0);  // our exp never gives 0
  for (int i = 0; i < kKeys; i += kLanes) total = add(total, load(scores + i));
  if (now != before) {
    const float shrink = std::exp(before - now);
    float* out = w.out + int64_t(row) * w.width;
    for (int e = 0; e < w.width; e += kLanes) store(out + e, mul(load(out + e), set(shrink)));
    w.total[row] *= shrink;
  }
  w.total[row] += sum(total);
  w.top[row] = now;
}

inline void take_queries(const AttentionOp& op, const Tile& tile, int head, const Workplace& w) {
  const auto [queries, keys, dim] = op.heads;
  const int group = queries / keys;
  const float scale = 1 / std::sqrt(float(dim));
  for (int t = 0; t < tile.count; ++t)
    for (int g = 0; g < group; ++g) {
      const float* q = op.qkv + (int64_t(tile.first + t) * (queries + 2 * keys) + head * group + g) * dim;
      float* row = w.queries + int64_t(t * group + g) * w.width;
      for (int e = 0; e < dim; ++e) row[e] = q[e] * scale;
    }
  const int rows = tile.count * group;
  __builtin_memset(w.out, 0, sizeof(float) * rows * w.width);
  for (int r = 0; r < rows; ++r) w.top[r] = -INFINITY, w.total[r] = 0;
}

inline void give_out(const AttentionOp& op, const Tile& tile, int head, const Workplace& w) {
  const int group = op.heads.queries / op.heads.keys, dim = op.heads.dim;
  for (int t = 0; t < tile.count; ++t)
    for (int g = 0; g < group; ++g) {
      const int row = t * group + g;
      float* out = op.out + (int64_t(tile.first + t) * op.heads.queries + head * group + g) * dim;
      const float scale = 1 / w.total[row];
      for (int e = 0; e < dim; ++e) out[e] = w.out[int64_t(row) * w.width + e] * scale;
    }
}

template <class T>
inline void attend(const AttentionOp& op, const Tile& tile, int head, float* memory) {
  const auto *keys = static_cast<const T*>(op.cache.keys), *values = static_cast<const T*>(op.cache.values);
  const int group = op.heads.queries / op.heads.keys, rows = tile.count * group;
  const int end = tile.start + tile.count;
  const Workplace w = lay_out(memory, kTileTokens * group, op.heads.dim);
  __builtin_memset(w.values, 0, sizeof(float) * w.width * kKeys);
  take_queries(op, tile, head, w);
  const int unseen = op.window && tile.start >= op.window ? tile.start + 1 - op.window : 0;
  for (int first = unseen / kKeys * kKeys; first < end; first += kKeys) {
    const int count = least(end - first, kKeys), next = first + kKeys;
    fetch(keys, op.heads, tile.table, head, next, least(end, next + kKeys));
    fetch(values, op.heads, tile.table, head, next, least(end, next + kKeys));
    stage(keys, values, op.heads, tile.table, head, first, count, w);
    const int whole = kVectors * kLanes, columns = (count + whole - 1) / whole * whole;
    products(w.queries, w.width, w.keys, kKeys, op.heads.dim, false, w.scores, kKeys, rows, columns);
    for (int r = 0; r < rows; ++r) {
      const int newest = tile.start + r / group - first;  // the row's own position in this tile
      const int low = op.window ? least(most(newest + 1 - op.window, 0), kKeys) : 0;
      soften(w, r, low, least(most(newest + 1, 0), count));
    }
    products(w.scores, kKeys, w.values, w.width, count, true, w.out, w.width, rows, w.width);
  }
  give_out(op, tile, head, w);
}

inline void attention(const AttentionOp& op, const Step& step, int unit, float* memory) {
  // The last tiles see the most: they go first, so that the threads end together.
  const Tile& tile = step.tiles[step.tile_count - 1 - unit / op.heads.keys];
  const int head = unit % op.heads.keys;
  if (op.cache.type == kFloat16)
    attend<uint16_t>(op, tile, head, memory);
  else if (op.cache.type == kInt8)
    attend<int8_t>(op, tile, head, memory);
  else
    attend<float>(op, tile, head, memory);
}

}  // namespace motley::ISA
