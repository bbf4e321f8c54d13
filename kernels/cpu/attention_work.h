// The memory in which attention works: its layout and its size.
#pragma once

namespace motley::ISA {

constexpr int kKeys = kTileKeys;
constexpr int kVectors = 4;                             // of keys or of a value, in one inner loop
constexpr int kQueryRows = kLanes == 16 ? 4 : kLanes == 8 ? 2 : 1;  // what registers hold beside
constexpr int kMixedRows = 2 * kQueryRows;  // more of them, and widening values once pays

inline int least(int a, int b) { return a < b ? a : b; }
inline int most(int a, int b) { return a > b ? a : b; }

// Softmax of some queries over some keys, not yet divided by its total, for some kv heads.
struct Partial {
  float *out;          // [heads][rows][W]
  float *top, *total;  // [heads][rows, padded]: greatest score; sum of e^(score - top)
};

// What a thread works in. W is head_dim rounded up to whole inner loops; what is beyond stays 0.
struct Workplace {
  float *keys;     // [W][64]: transposed, so that a lane is a key
  float *values;   // [64][W]
  float *queries;  // [heads][rows][W], scaled
  float *scores;   // [rows][64]
  float *keep, *take;  // [rows, padded]: factors of a merger
  Partial tile;    // of one head
  Partial all;     // of the tiles so far
  int width;
};

inline int attention_width(int dim) {
  const int whole = kVectors * kLanes;
  return (dim + whole - 1) / whole * whole;
}

inline int padded(int rows) { return (rows + 15) / 16 * 16; }

inline float* take_floats(float*& memory, int64_t count) {
  float* taken = memory;
  memory += (count + 15) / 16 * 16;
  return taken;
}

inline Partial lay_out_partial(float*& memory, int heads, int rows, int width) {
  Partial p;
  p.out = take_floats(memory, int64_t(heads) * rows * width);
  p.top = take_floats(memory, heads * padded(rows));
  p.total = take_floats(memory, heads * padded(rows));
  return p;
}

inline int64_t partial_floats(int heads, int rows, int width) {
  return heads * (int64_t(rows) * width + 2 * padded(rows));
}

inline Partial of_head(const Partial& heads, int head, int rows, int width) {
  const int at = head * padded(rows);
  return {heads.out + int64_t(head) * rows * width, heads.top + at, heads.total + at};
}

inline Workplace lay_out(float* memory, int heads, int rows, int dim) {
  Workplace w;
  w.width = attention_width(dim);
  w.keys = take_floats(memory, int64_t(w.width) * kKeys);
  w.values = take_floats(memory, int64_t(w.width) * kKeys);
  w.queries = take_floats(memory, int64_t(w.width) * heads * rows);
  w.scores = take_floats(memory, int64_t(kKeys) * rows);
  w.keep = take_floats(memory, rows);
  w.take = take_floats(memory, rows);
  w.tile = lay_out_partial(memory, 1, rows, w.width);
  w.all = lay_out_partial(memory, heads, rows, w.width);
  return w;
}

inline int64_t workplace_floats(const Heads& counts, int heads, int tokens) {
  const int rows = tokens * (counts.queries / counts.keys), width = attention_width(counts.dim);
  return width * (2 * kKeys + int64_t(heads) * rows) + kKeys * rows + 2 * padded(rows) +
         partial_floats(1, rows, width) + partial_floats(heads, rows, width);
}

inline int64_t attention_floats(const AttentionOp& op) {
  const int64_t prompt = workplace_floats(op.heads, 1, kTileTokens);
  const int64_t few = workplace_floats(op.heads, op.heads.keys, kFewTokens);
  return prompt > few ? prompt : few;
}

// What one token leaves behind for one tile of keys.
inline int64_t attention_shared(const AttentionOp& op) {
  const auto [queries, keys, dim] = op.heads;
  return partial_floats(keys, queries / keys, attention_width(dim));
}

}  // namespace motley::ISA
