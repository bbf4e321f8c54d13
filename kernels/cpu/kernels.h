// What an instruction set's build of the kernels offers to the pool.
#pragma once
#include <cstdint>

#include "motley.h"

namespace motley {

constexpr int kStepBytes = 2;    // behind the int8 values of one token of one kv head
constexpr int kTileTokens = 16;  // tokens of one sequence that attention takes together

// Neighbouring tokens of one sequence: rows [first, first + count), at positions from `start` on.
struct Tile {
  int32_t first, count, start;
  const int32_t* table;
};

// A batch as the kernels want it.
struct Step {
  const Batch* batch;
  const int32_t* positions;  // [rows]
  const int64_t* slots;      // [rows]
  const Tile* tiles;
  int tile_count;
};

struct Kernels {
  const char* name;
  // How many parts an operation on `rows` rows has; they may run in any order, on any threads.
  int (*units)(const Op&, const Step&, int rows);
  // Does parts first .. last. `memory` has `workplace(op)` floats.
  void (*run)(const Op&, const Step&, int rows, int first, int last, float* memory);
  int64_t (*workplace)(const Op&);
};

#ifdef MOTLEY_AVX512
extern const Kernels avx512_kernels;
#endif
#ifdef MOTLEY_AVX2
extern const Kernels avx2_kernels;
#endif
#ifdef MOTLEY_NEON
extern const Kernels neon_kernels, dotprod_kernels;
#endif
extern const Kernels generic_kernels;

}  // namespace motley
