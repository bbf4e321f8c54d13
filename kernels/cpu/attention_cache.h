// Reading a paged cache of keys and values, whatever type its numbers have.
#pragma once

namespace motley::ISA {

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

// Ask for part of what one kv head needs of the blocks that come next: lines in the order they lie
// in, and a few at a time, for processors drop what comes at once.
template <class T>
inline void fetch(const T* cache) {
  for (int i = 0; i < kLanes * kLanes; i += 64 / int(sizeof(T))) __builtin_prefetch(cache + i);
}

// Bring a tile's keys, `count` from position `first` on, of one kv head; lanes beyond are garbage of
// the same block. Meanwhile a like share of the next tile's blocks is fetched, of which there are
// `next` tokens.
template <class T>
inline void stage_keys(const T* keys, const T* values, const Heads& heads, const int32_t* table,
                       int head, int first, int count, int next, const Workplace& w) {
  const int even = heads.dim / kLanes * kLanes;
  const int size = Stored<T>::size(heads.dim), stride = heads.keys * size;
  for (int i = 0; i < count; i += kLanes) {
    const T* begin = place(keys, heads, table, head, first + i);
    Stored<T> row[kLanes];
    for (int r = 0; r < kLanes; ++r) row[r] = Stored<T>::in(begin + r * stride, heads.dim);
    const int within = i % kBlockTokens, following = i < next ? first + kKeys + i - within : 0;
    const int share = (head * kBlockTokens + within) * size;
    const T* next_keys = place(keys, heads, table, 0, following) + share;
    const T* next_values = place(values, heads, table, 0, following) + share;
    for (int e = 0; e < even; e += kLanes) {
      F x[kLanes];
      for (int r = 0; r < kLanes; ++r) x[r] = row[r].vector(e);
      transpose(x);
      for (int r = 0; r < kLanes; ++r) store(w.keys + (e + r) * kKeys + i, x[r]);
      if (i >= next) continue;
      fetch(next_keys + e * kLanes);
      fetch(next_values + e * kLanes);
    }
    for (int e = even; e < heads.dim; ++e)
      for (int r = 0; r < kLanes; ++r) w.keys[e * kKeys + i + r] = row[r].one(e);
  }
}

template <class T>
inline void stage_values(const T* values, const Heads& heads, const int32_t* table, int head,
                         int first, int count, const Workplace& w) {
  const int even = heads.dim / kLanes * kLanes;
  for (int i = 0; i < count; ++i) {
    const auto row = Stored<T>::in(place(values, heads, table, head, first + i), heads.dim);
    for (int e = 0; e < even; e += kLanes) store(w.values + i * w.width + e, row.vector(e));
    for (int e = even; e < heads.dim; ++e) w.values[i * w.width + e] = row.one(e);
  }
}

}  // namespace motley::ISA
