// Causal attention over a paged cache, for any mixture of prompts and single tokens.
//
// Keys pass in tiles of 64 positions, counted from the sequence's start. Each tile gives every query
// a softmax of its own, and these are merged in the order of the tiles (the partial softmax of
// Dao et al., 2023): a token's result does not depend on the tokens computed beside it nor on who
// computed which tile, so a prompt may be cut anywhere and decoding equals prefilling, bit for bit.
//
// A prompt's unit is one kv head: what registers and caches hold serves many queries. Where few
// tokens are new all is bound by the cache's bytes, so a unit reads them in the order they lie in:
// all kv heads, and a share of the tiles where there are too few sequences for the threads.
#pragma once
#include "attention_work.h"
#include "attention_cache.h"

namespace motley::ISA {

// out [kRows][kVectors · lanes] (+)= left [kRows][depth] · columns of right [depth][…, dim], rows
// `…_stride` apart.
template <int kRows, class T>
inline void product(const float* left, int left_stride, const T* right, int right_stride, int dim,
                    int column, int depth, bool add_to, float* out, int out_stride) {
  F total[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      total[r][v] = add_to ? load(out + r * out_stride + kLanes * v) : zero();
  for (int k = 0; k < depth; ++k) {
    const auto row = Stored<T>::in(right + k * right_stride, dim);
    F x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = row.vector(column + kLanes * v);
    for (int r = 0; r < kRows; ++r) {
      const F factor = set(left[r * left_stride + k]);
      for (int v = 0; v < kVectors; ++v) total[r][v] = fma(factor, x[v], total[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + kLanes * v, total[r][v]);
}

// The same for any number of rows and for columns in whole inner loops.
template <int kRows = kQueryRows, class T>
inline void products(const float* left, int left_stride, const T* right, int right_stride,
                     int depth, bool add_to, float* out, int out_stride, int rows, int columns) {
  int r = 0;
  for (; r + kRows <= rows; r += kRows)
    for (int c = 0; c < columns; c += kVectors * kLanes)
      product<kRows>(left + r * left_stride, left_stride, right, right_stride, columns, c, depth,
                     add_to, out + r * out_stride + c, out_stride);
  if constexpr (kRows > 1)
    if (r < rows)
      products<kRows - 1>(left + r * left_stride, left_stride, right, right_stride, depth, add_to,
                          out + r * out_stride, out_stride, rows - r, columns);
}

// Turns one row of scores into weights, of which those in [low, high) count; others become 0.
inline void soften(const Workplace& w, const Partial& tile, int row, int low, int high) {
  float* scores = w.scores + row * kKeys;
  const auto blank = [&](float value) {
    for (int i = 0; i < low; ++i) scores[i] = value;
    for (int i = high; i < kKeys; ++i) scores[i] = value;
  };
  blank(-INFINITY);
  F highest = load(scores), total = zero();
  for (int i = kLanes; i < kKeys; i += kLanes) highest = max(highest, load(scores + i));
  const float now = top(highest);
  for (int i = 0; i < kKeys; i += kLanes) store(scores + i, exp(sub(load(scores + i), set(now))));
  blank(0);  // our exp never gives 0
  for (int i = 0; i < kKeys; i += kLanes) total = add(total, load(scores + i));
  tile.total[row] = sum(total);
  tile.top[row] = now;
}

inline void clear(const Partial& p, int heads, int rows, int width) {
  __builtin_memset(p.out, 0, sizeof(float) * heads * rows * width);
  for (int r = 0; r < heads * padded(rows); ++r) p.top[r] = -FLT_MAX, p.total[r] = 0;
}

// all = all and `more`, whose keys come after. A row that saw no key in `more` stays as it is.
inline void merge(const Workplace& w, const Partial& all, const Partial& more, int rows) {
  for (int r = 0; r < rows; r += kLanes) {
    const F before = load(all.top + r), added = load(more.top + r), now = max(before, added);
    const F keep = exp(sub(before, now)), take = exp(sub(added, now));
    store(w.keep + r, keep);
    store(w.take + r, take);
    store(all.total + r, fma(load(more.total + r), take, mul(load(all.total + r), keep)));
    store(all.top + r, now);
  }
  for (int r = 0; r < rows; ++r) {
    const F keep = set(w.keep[r]), take = set(w.take[r]);
    float* out = all.out + int64_t(r) * w.width;
    const float* in = more.out + int64_t(r) * w.width;
    for (int e = 0; e < w.width; e += kLanes)
      store(out + e, fma(load(in + e), take, mul(load(out + e), keep)));
  }
}

inline void take_queries(const AttentionOp& op, const Tile& tile, int head, float* rows, int width) {
  const auto [queries, keys, dim] = op.heads;
  const int group = queries / keys;
  const float scale = 1 / std::sqrt(float(dim));
  for (int t = 0; t < tile.count; ++t)
    for (int g = 0; g < group; ++g) {
      const float* q = op.qkv + (int64_t(tile.first + t) * (queries + 2 * keys) + head * group + g) * dim;
      float* row = rows + int64_t(t * group + g) * width;
      for (int e = 0; e < dim; ++e) row[e] = q[e] * scale;
      for (int e = dim; e < width; ++e) row[e] = 0;
    }
}

inline void give_out(const AttentionOp& op, const Tile& tile, int head, const Partial& all, int width) {
  const int group = op.heads.queries / op.heads.keys, dim = op.heads.dim;
  for (int t = 0; t < tile.count; ++t)
    for (int g = 0; g < group; ++g) {
      const int row = t * group + g;
      float* out = op.out + (int64_t(tile.first + t) * op.heads.queries + head * group + g) * dim;
      const float scale = 1 / all.total[row];
      for (int e = 0; e < dim; ++e) out[e] = all.out[int64_t(row) * width + e] * scale;
    }
}

// out [rows][W] = weights in w.scores · the tile's values.
template <class T>
inline void mix_values(const T* values, const Heads& heads, const int32_t* table, int head,
                       int first, int count, const Workplace& w, int rows, float* out) {
  if (w.width != heads.dim || rows > kMixedRows) {
    stage_values(values, heads, table, head, first, count, w);
    products(w.scores, kKeys, w.values, w.width, count, false, out, w.width, rows, w.width);
    return;
  }
  for (int i = 0; i < count; i += kBlockTokens)
    products(w.scores + i, kKeys, place(values, heads, table, head, first + i),
             heads.keys * Stored<T>::size(heads.dim), least(count - i, kBlockTokens), i > 0, out,
             w.width, rows, w.width);
}

// One tile of keys, its first at position `first`, for the queries of one kv head.
template <class T>
inline void attend_tile(const AttentionOp& op, const Tile& tile, int head, int first,
                        const float* queries, const Workplace& w, const Partial& out) {
  const auto *keys = static_cast<const T*>(op.cache.keys), *values = static_cast<const T*>(op.cache.values);
  const int group = op.heads.queries / op.heads.keys, rows = tile.count * group;
  const int left = tile.start + tile.count - first, count = least(left, kKeys);
  stage_keys(keys, values, op.heads, tile.table, head, first, count, left - kKeys, w);
  const int whole = kVectors * kLanes, columns = (count + whole - 1) / whole * whole;
  products(queries, w.width, w.keys, kKeys, op.heads.dim, false, w.scores, kKeys, rows, columns);
  for (int r = 0; r < rows; ++r) {
    const int newest = tile.start + r / group - first;  // the row's own position in this tile
    const int low = op.window ? least(most(newest + 1 - op.window, 0), kKeys) : 0;
    soften(w, out, r, low, least(most(newest + 1, 0), count));
  }
  mix_values(values, op.heads, tile.table, head, first, count, w, rows, out.out);
}

// The first tile of keys that any of these tokens sees.
inline int first_seen(const AttentionOp& op, const Tile& tile) {
  return op.window && tile.start >= op.window ? (tile.start + 1 - op.window) / kKeys : 0;
}

// A prompt's tokens and one kv head.
template <class T>
inline void attend_prompt(const AttentionOp& op, const Tile& tile, int head, float* memory) {
  const int rows = tile.count * (op.heads.queries / op.heads.keys);
  const Workplace w = lay_out(memory, 1, rows, op.heads.dim);
  __builtin_memset(w.values, 0, sizeof(float) * w.width * kKeys);
  take_queries(op, tile, head, w.queries, w.width);
  clear(w.all, 1, rows, w.width);
  for (int key = first_seen(op, tile); key * kKeys < tile.start + tile.count; ++key) {
    attend_tile<T>(op, tile, head, key * kKeys, w.queries, w, w.tile);
    merge(w, w.all, w.tile, rows);
  }
  give_out(op, tile, head, w.all, w.width);
}

// Few tokens, all kv heads, and some of the tiles of keys. Where others have the rest, whoever is
// the last merges what all have left in `step.shared`.
template <class T>
inline void attend_share(const AttentionOp& op, const Step& step, const Share& share, float* memory) {
  const Tile& tile = share.tile;
  const int keys = op.heads.keys, rows = tile.count * (op.heads.queries / keys);
  const Workplace w = lay_out(memory, keys, rows, op.heads.dim);
  const int seen = first_seen(op, tile);
  const int64_t left = attention_shared(op);  // of one token
  const auto left_by = [&](int key) {
    float* at = step.shared + (share.left + int64_t(key) * tile.count) * left;
    return lay_out_partial(at, keys, rows, w.width);
  };
  __builtin_memset(w.values, 0, sizeof(float) * w.width * kKeys);
  for (int head = 0; head < keys; ++head)
    take_queries(op, tile, head, w.queries + int64_t(head) * rows * w.width, w.width);
  clear(w.all, keys, rows, w.width);
  for (int key = most(share.first, seen); key < share.last; ++key)
    for (int head = 0; head < keys; ++head) {
      const Partial out = share.arrived ? of_head(left_by(key), head, rows, w.width) : w.tile;
      attend_tile<T>(op, tile, head, key * kKeys, w.queries + int64_t(head) * rows * w.width, w, out);
      if (!share.arrived) merge(w, of_head(w.all, head, rows, w.width), out, rows);
    }
  if (share.arrived) {
    if (share.arrived->fetch_add(1, std::memory_order_acq_rel) + 1 < share.parts) return;
    share.arrived->store(0, std::memory_order_relaxed);  // for the next layer
    for (int key = seen; key * kKeys < tile.start + tile.count; ++key)
      for (int head = 0; head < keys; ++head)
        merge(w, of_head(w.all, head, rows, w.width), of_head(left_by(key), head, rows, w.width), rows);
  }
  for (int head = 0; head < keys; ++head)
    give_out(op, tile, head, of_head(w.all, head, rows, w.width), w.width);
}

template <class T>
inline void attend(const AttentionOp& op, const Step& step, int unit, float* memory) {
  if (unit < step.share_count) return attend_share<T>(op, step, step.shares[unit], memory);
  unit -= step.share_count;
  // The last tiles see the most: they go first, so that the threads end together.
  const Tile& tile = step.tiles[step.tile_count - 1 - unit / op.heads.keys];
  attend_prompt<T>(op, tile, unit % op.heads.keys, memory);
}

inline void attention(const AttentionOp& op, const Step& step, int unit, float* memory) {
  if (op.cache.type == kFloat16)
    attend<uint16_t>(op, step, unit, memory);
  else if (op.cache.type == kInt8)
    attend<int8_t>(op, step, unit, memory);
  else
    attend<float>(op, step, unit, memory);
}

}  // namespace motley::ISA
