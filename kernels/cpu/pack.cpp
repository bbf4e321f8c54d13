// From GGUF's rows of blocks to panels, and back to float32. Block layouts are the GGUF
// specification's; the arithmetic is written so that it equals the `gguf` package's to the bit.
#include <cstring>

#include "formats.h"
#include "half.h"
#include "motley.h"

namespace motley {
namespace {

uint8_t* byte_at(uint8_t (*planes)[kPlane], int plane, int row, int column) {
  return &planes[plane][4 * row + column % 4];
}

// Puts 32 values of 4 bits of one row into its planes.
void put_low(uint8_t (*planes)[kPlane], int row, const uint8_t* values) {
  for (int column = 0; column < kGroup; ++column) {
    const int quad = column / 4;
    *byte_at(planes, quad % 4, row, column) |= uint8_t((values[column] & 15) << 4 * (quad / 4));
  }
}

uint8_t get_low(const uint8_t (*planes)[kPlane], int row, int column) {
  const int quad = column / 4;
  return planes[quad % 4][4 * row + column % 4] >> 4 * (quad / 4) & 15;
}

// Elements 0..15 are the low nibbles of 16 bytes, 16..31 the high ones.
void split_nibbles(const uint8_t* in, uint8_t* values, int bytes) {
  for (int i = 0; i < bytes; ++i) {
    values[i] = in[i] & 15;
    values[bytes + i] = in[i] >> 4;
  }
}

struct RowQ4_0 { Half d; uint8_t low[16]; };
struct RowQ4_1 { Half d, m; uint8_t low[16]; };
struct RowQ8_0 { Half d; int8_t q[32]; };
struct RowQ4_K { Half d, dmin; uint8_t scales[12], low[128]; };
struct RowQ6_K { uint8_t low[128], high[64]; int8_t scale[16]; Half d; };

void put(const RowQ4_0& in, int row, Q4_0& out) {
  uint8_t values[kGroup];
  out.d[row] = in.d;
  split_nibbles(in.low, values, 16);
  put_low(out.low, row, values);
}

void put(const RowQ4_1& in, int row, Q4_1& out) {
  uint8_t values[kGroup];
  out.d[row] = in.d;
  out.m[row] = in.m;
  split_nibbles(in.low, values, 16);
  put_low(out.low, row, values);
}

void put(const RowQ8_0& in, int row, Q8_0& out) {
  out.d[row] = in.d;
  for (int column = 0; column < kGroup; ++column) out.q[column / 4][4 * row + column % 4] = in.q[column];
}

void put(const RowQ4_K& in, int row, Q4_K& out) {
  const uint8_t* s = in.scales;
  out.d[row] = in.d;
  out.dmin[row] = in.dmin;
  for (int g = 0; g < 4; ++g) {  // 6 bits each: the last four have their top bits in the first
    out.scale[g][row] = s[g] & 63;
    out.min[g][row] = s[g + 4] & 63;
    out.scale[g + 4][row] = uint8_t((s[g + 8] & 15) | (s[g] >> 6) << 4);
    out.min[g + 4][row] = uint8_t(s[g + 8] >> 4 | (s[g + 4] >> 6) << 4);
  }
  for (int pair = 0; pair < 4; ++pair) {
    uint8_t values[2 * kGroup];
    split_nibbles(in.low + kGroup * pair, values, kGroup);
    put_low(out.low[2 * pair], row, values);
    put_low(out.low[2 * pair + 1], row, values + kGroup);
  }
}

void put(const RowQ6_K& in, int row, Q6_K& out) {
  out.d[row] = in.d;
  for (int i = 0; i < 16; ++i) out.scale[i][row] = in.scale[i];
  for (int g = 0; g < 8; ++g) {
    const int part = g / 4, turn = g % 4;  // 128 columns each: 64 bytes of low bits, 32 of high
    const uint8_t *low = in.low + 64 * part + 32 * (turn % 2), *high = in.high + 32 * part;
    uint8_t values[kGroup];
    for (int i = 0; i < kGroup; ++i) values[i] = low[i] >> 4 * (turn / 2) & 15;
    put_low(out.low[g], row, values);
    for (int i = 0; i < kGroup; ++i) {
      const int quad = i / 4, pair = high[i] >> 2 * turn & 3;
      *byte_at(out.high[g], quad % 2, row, i) |= uint8_t(pair << 2 * (quad / 2));
    }
  }
}

void get(const Q4_0& in, int row, float* out) {
  const float d = from_half(in.d[row]);
  for (int i = 0; i < kGroup; ++i) out[i] = d * float(int(get_low(in.low, row, i)) - 8);
}

void get(const Q4_1& in, int row, float* out) {
  const float d = from_half(in.d[row]), m = from_half(in.m[row]);
  for (int i = 0; i < kGroup; ++i) out[i] = d * float(get_low(in.low, row, i)) + m;
}

void get(const Q8_0& in, int row, float* out) {
  const float d = from_half(in.d[row]);
  for (int i = 0; i < kGroup; ++i) out[i] = d * float(in.q[i / 4][4 * row + i % 4]);
}

void get(const Q4_K& in, int row, float* out) {
  const float d = from_half(in.d[row]), dmin = from_half(in.dmin[row]);
  for (int g = 0; g < 8; ++g) {
    const float scale = d * float(in.scale[g][row]), min = dmin * float(in.min[g][row]);
    for (int i = 0; i < kGroup; ++i) out[kGroup * g + i] = scale * float(get_low(in.low[g], row, i)) - min;
  }
}

void get(const Q6_K& in, int row, float* out) {
  const float d = from_half(in.d[row]);
  for (int column = 0; column < kSuper; ++column) {
    const int g = column / kGroup, i = column % kGroup, quad = i / 4;
    const int high = in.high[g][quad % 2][4 * row + i % 4] >> 2 * (quad / 2) & 3;
    const float scale = d * float(in.scale[column / 16][row]);
    out[column] = scale * float((get_low(in.low[g], row, i) | high << 4) - 32);
  }
}

template <class Row_, class Block_, int kColumns_>
struct Layout {
  using Row = Row_;
  using Block = Block_;
  static constexpr int kColumns = kColumns_;
};

// Calls action with the format's layout; false if there is none.
template <class Action>
bool with_layout(int format, Action action) {
  switch (format) {
    case kQ4_0: action(Layout<RowQ4_0, Q4_0, kGroup>()); return true;
    case kQ4_1: action(Layout<RowQ4_1, Q4_1, kGroup>()); return true;
    case kQ8_0: action(Layout<RowQ8_0, Q8_0, kGroup>()); return true;
    case kQ4_K: action(Layout<RowQ4_K, Q4_K, kSuper>()); return true;
    case kQ6_K: action(Layout<RowQ6_K, Q6_K, kSuper>()); return true;
  }
  return false;
}

}  // namespace
}  // namespace motley

using namespace motley;

int64_t motley_packed_bytes(int32_t format, int32_t outputs, int32_t inputs) {
  int64_t bytes = 0;
  with_layout(format, [&](auto layout) {
    using L = decltype(layout);
    if (inputs % L::kColumns == 0)
      bytes = int64_t(outputs + kPanelRows - 1) / kPanelRows * (inputs / L::kColumns) *
              int64_t(sizeof(typename L::Block));
  });
  return bytes;
}

void motley_pack(int32_t format, int32_t outputs, int32_t inputs, const void* rows, void* packed) {
  std::memset(packed, 0, size_t(motley_packed_bytes(format, outputs, inputs)));
  with_layout(format, [&](auto layout) {
    using L = decltype(layout);
    const int blocks = inputs / L::kColumns;
    const auto* in = static_cast<const char*>(rows);
    auto* out = static_cast<typename L::Block*>(packed);
    for (int64_t row = 0; row < outputs; ++row)
      for (int b = 0; b < blocks; ++b) {
        typename L::Row block;
        std::memcpy(&block, in + (row * blocks + b) * int64_t(sizeof block), sizeof block);
        put(block, int(row % kPanelRows), out[row / kPanelRows * blocks + b]);
      }
  });
}

void motley_unpack(const Matrix* matrix, int32_t first, int32_t count, float* out) {
  with_layout(matrix->format, [&](auto layout) {
    using L = decltype(layout);
    const int blocks = matrix->inputs / L::kColumns;
    const auto* panels = static_cast<const typename L::Block*>(matrix->data);
    for (int64_t row = first; row < first + count; ++row)
      for (int b = 0; b < blocks; ++b, out += L::kColumns)
        get(panels[row / kPanelRows * blocks + b], int(row % kPanelRows), out);
  });
}
