// The C interface of the CPU kernels: operations on buffers, and a pool of threads that runs a list
// of them in one call. Nothing here knows a model; the caller writes the list.
//
// Shapes: T rows (tokens) of a step, K kv heads, H query heads, E head dim. All pointers stay the
// caller's. `Act` rows are activations quantised to int8 in groups of 32 columns.
#pragma once
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

enum { kGroup = 32, kBlockTokens = 16 };

// Weight formats, numbered as GGUF numbers them.
enum Format : int32_t { kQ4_0 = 2, kQ4_1 = 3, kQ8_0 = 8, kQ4_K = 12, kQ6_K = 14 };

enum KvType : int32_t { kFloat32 = 0, kFloat16 = 1, kInt8 = 2 };

// 32 columns of one activation row: x ≈ d · q + fine · rest, rounded to nearest even, d = max|x| / 127.
// A group that holds an outlier, max|x| > 4 · rms of the row, is coarse for its other columns; it
// alone has fine = d / 254, and 0 elsewhere means that `rest` is not there.
struct Act {
  int8_t q[kGroup];
  float d, fine;
  float sum;      // Σ x as quantised: what a weight's constant part is multiplied by
  float half[2];  // the same over columns 0..15 and 16..31
  int8_t rest[kGroup];
};

// A matrix [outputs, inputs] as `motley_pack` lays it out.
struct Matrix {
  int32_t format, outputs, inputs;
  const void* data;
};

// A layer's cache: keys and values are [blocks, 16, K, E] each. Where they are int8, 2 bytes follow
// each E: the step d (bfloat16) of x ≈ d · q, d = max|x| / 127 rounded up.
struct KvLayer {
  int32_t type;
  void *keys, *values;
};

struct Heads {
  int32_t queries, keys, dim;
};

// out [T, width] = the matrix's rows named by the step's tokens.
struct EmbedOp { Matrix table; float* out; };
// out [T, E] = magnitude · cosines, then sines, of position · frequencies [E / 2].
struct AnglesOp { const float* frequencies; float* out; int32_t head_dim; float magnitude; };
// out [T, width] = quantised x / sqrt(mean(x²) + eps) · weight.
struct NormOp { const float *in, *weight; Act* out; int32_t width; float eps; };
// out [T, width] = quantised in.
struct QuantiseOp { const float* in; Act* out; int32_t width; };
// gate_up [T, 2 · width]; out [T, width] = quantised silu(gate) · up, which takes gate's place.
struct SiluOp { float* gate_up; Act* out; int32_t width; };
// out[t, 0..outputs) = in · matrixᵀ, or += where `add`; rows of out are `stride` apart.
struct MatmulOp { Matrix matrix; const Act* in; float* out; int32_t stride, add; };
// qkv [T, (H + 2K)·E]: add a bias, normalise each query and key head, rotate them, all in place,
// then store keys and values in the cache. A model without bias or norms has null there.
struct RopeOp {
  float* qkv;
  const float *angles, *bias, *query_norm, *key_norm;
  float eps;
  Heads heads;
  KvLayer cache;
};
// out [T, H·E] = causal attention of the queries in qkv over their sequences' cache, of which each
// sees the newest `window` tokens; 0 for all.
struct AttentionOp { const float* qkv; float* out; Heads heads; KvLayer cache; int32_t window; };
// out [n, width] = the drawn rows of in; the operations that follow work on n rows.
struct GatherOp { const float* in; float* out; int32_t width; };

// Which experts the T rows of a step go to. Copies of the rows are grouped by expert: those of expert
// e are rows start[e] .. start[e + 1]. Each operation on experts of a layer has the same arrays, and
// every layer its own: a thread that is late still counts parts of one when another has its turn.
struct Routing {
  int32_t experts, used;
  int32_t* chosen;  // [T, used] ascending
  float* weights;   // [T, used]
  int32_t* place;   // [T, used] the rows of the copies
  int32_t* start;   // [experts + 1]
};
// The `used` largest of softmax(in / sqrt(mean(in²) + eps) · matrixᵀ), over their sum if
// `sum_to_one`; matrix [experts, width], with the norm's weights multiplied into it.
struct RouteOp {
  const float *in, *matrix;
  Routing routing;
  int32_t width;
  float eps;
  int32_t sum_to_one;
};
// Places and starts of what was chosen.
struct GroupOp { Routing routing; };
// out [T · used, width] = the copies of in; the operations that follow work on T · used rows.
struct SpreadOp { const Act* in; Act* out; Routing routing; int32_t width; };
// Rows of `out`, `stride` apart = in · the matrix of their expert, transposed; matrices [experts].
struct ExpertsOp { const Matrix* matrices; const Act* in; float* out; Routing routing; int32_t stride; };
// out [T, width] = weighted sums of each row's copies, by ascending expert, or += where `add`; the
// operations that follow work on T rows.
struct CombineOp { const float* in; float* out; Routing routing; int32_t width, add; };

// out [count / 2^18] = sums of 2^18 floats of `in` each: reads memory as fast as it can be read.
struct SumOp { const float* in; float* out; int64_t count; };

// All before it is done: the mark takes this value, and if its descriptor is not -1 a byte goes there.
struct Mark { int32_t value, descriptor; };
struct MarkOp { Mark* mark; int32_t value; };

enum OpKind : int32_t {
  kEmbed, kAngles, kNorm, kQuantise, kSilu, kMatmul, kRope, kAttention, kGather, kSum, kMark,
  kRoute, kGroupRows, kSpread, kExperts, kCombine
};

struct Op {
  int32_t kind;
  int32_t wait;  // whether all that came before must be done before the next one begins
  union {
    EmbedOp embed; AnglesOp angles; NormOp norm; QuantiseOp quantise; SiluOp silu;
    MatmulOp matmul; RopeOp rope; AttentionOp attention; GatherOp gather;
    SumOp sum; MarkOp mark;
    RouteOp route; GroupOp group; SpreadOp spread; ExpertsOp experts; CombineOp combine;
  };
};

// Rows [first, first + count) are one sequence's tokens from position `start` on; the numbers of
// its blocks begin at tables[table].
struct Span { int32_t first, count, start, table; };

struct Batch {
  int32_t rows, spans, drawn;
  const int32_t* tokens;  // [rows]
  const Span* span;       // [spans]
  const int32_t* tables;
  const int32_t* drawn_rows;  // [drawn]
};

struct Pool;

// Names of the instruction sets that are built in and that this machine has, best first, separated
// by spaces.
const char* motley_instruction_sets();

// A pool of `threads` threads, the caller's own included; null if the set's name is unknown here.
Pool* motley_pool_new(int32_t threads, const char* instruction_set);
void motley_pool_free(Pool*);

// Runs the operations in order; returns when all are done. One call at a time per pool.
void motley_run(Pool*, const Op* ops, int32_t count, const Batch* batch);

// Bytes of a packed matrix; 0 if the format is unknown or `inputs` is not whole blocks of it.
int64_t motley_packed_bytes(int32_t format, int32_t outputs, int32_t inputs);
// GGUF rows of blocks -> panels of 16 rows (see formats.h).
void motley_pack(int32_t format, int32_t outputs, int32_t inputs, const void* rows, void* packed);
// Rows first .. first + count of a packed matrix as float32 [count, inputs].
void motley_unpack(const Matrix* matrix, int32_t first, int32_t count, float* out);

// KV [planes, tokens, channels], keys in even planes, as bytes: codec 8 or 4, of so many bits (for 4
// a few more or less, as `fineness` of keys and of values says). Bytes written, or -1: no room.
int64_t motley_kv_encode(int32_t codec, const float* in, int32_t planes, int32_t tokens,
                         int32_t channels, const float* fineness, void* out, int64_t room);
// And back: 0 if the bytes are not of that shape.
int32_t motley_kv_decode(int32_t codec, const void* in, int64_t size, int32_t planes,
                         int32_t tokens, int32_t channels, float* out);
}
#pragma GCC visibility pop
