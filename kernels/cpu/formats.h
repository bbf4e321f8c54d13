// How weights lie in memory. A panel is 16 rows of a matrix, and a vector lane is a row: each lane
// of an integer dot product takes 4 neighbouring columns (a quad) of its own row, so no sum ever
// crosses lanes. Within a group of 32 columns, byte 4·r + i of quad t is column 4·t + i of row r.
//
// Bits are those of GGUF, interleaved over 16 rows. Only Q4_K grows, by 3 %: its 6-bit scales
// become bytes. Low bits: byte plane v of 4 holds quad v in its low nibble and quad v + 4 in its
// high one. Two more bits (Q6_K): plane j of 2 holds quads j, j + 2, j + 4, j + 6 from the bottom.
#pragma once
#include <cstdint>

namespace motley {

constexpr int kPanelRows = 16;
constexpr int kQuads = 8;  // in a group
constexpr int kPlane = 4 * kPanelRows;  // bytes of a quad over all rows
constexpr int kSuper = 256;  // columns of a K-quant block

using Half = uint16_t;
// Four int8 activations, read as one number so that the compiler spreads them from memory.
typedef int32_t Quad __attribute__((may_alias, aligned(1)));

struct Q4_0 {
  Half d[kPanelRows];
  uint8_t low[4][kPlane];
};
struct Q4_1 {
  Half d[kPanelRows], m[kPanelRows];
  uint8_t low[4][kPlane];
};
struct Q8_0 {
  Half d[kPanelRows];
  int8_t q[kQuads][kPlane];
};
struct Q4_K {
  Half d[kPanelRows], dmin[kPanelRows];
  uint8_t scale[8][kPanelRows], min[8][kPanelRows];
  uint8_t low[8][4][kPlane];
};
struct Q6_K {
  Half d[kPanelRows];
  int8_t scale[16][kPanelRows];  // one for 16 columns
  uint8_t low[8][4][kPlane];
  uint8_t high[8][2][kPlane];
};

}  // namespace motley
