// What an instruction set's build of the kernels offers to the pool.
#pragma once
#include <atomic>
#include <cstdint>

#include "motley.h"

namespace motley {

constexpr int kStepBytes = 2;    // behind the int8 values of one token of one kv head
constexpr int kTileTokens = 16;  // tokens of one sequence that attention takes together
constexpr int kFewTokens = 4;    // as many or fewer new ones are bound by reading the cache
constexpr int kTileKeys = 64;    // positions whose keys attention takes together

// Neighbouring tokens of one sequence: rows [first, first + count), at positions from `start` on.
struct Tile {
  int32_t first, count, start;
  const int32_t* table;
};

// The work of few tokens over tiles of keys [first, last) of their sequence. Where `parts` of them
// have a sequence between them, they count themselves in `arrived`, and leave what tile of keys k
// gave to each token in place `left` + k · tokens of what is shared.
struct Share {
  Tile tile;
  int first, last, parts;
  int64_t left;
  std::atomic<int>* arrived;  // null: one has it all
};

// A batch as the kernels want it.
struct Step {
  const Batch* batch;
  const int32_t* positions;  // [rows]
  const int64_t* slots;      // [rows]
  const Tile* tiles;  // of prompts
  int tile_count;
  const Share* shares;  // of sequences with few new tokens
  int share_count;
  float* shared;
};

struct Kernels {
  const char* name;
  // How many parts an operation on `rows` rows has; they may run in any order, on any threads.
  int (*units)(const Op&, const Step&, int rows);
  // Does parts first .. last. `memory` has `workplace(op)` floats.
  void (*run)(const Op&, const Step&, int rows, int first, int last, float* memory);
  int64_t (*workplace)(const Op&);
  int64_t (*shared)(const Op&);  // floats of one place of `Step::shared`
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
