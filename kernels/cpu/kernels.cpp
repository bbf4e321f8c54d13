// Built once for each instruction set, with its name as ISA: everything below is then in a
// namespace of its own, so that no other build's code can take its place when linking.
#include "kernels.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "formats.h"
#include "half.h"
#include "mark.h"
#define MOTLEY_TEXT_(x) #x
#define MOTLEY_TEXT(x) MOTLEY_TEXT_(x)
#define MOTLEY_JOIN_(a, b) a##b
#define MOTLEY_JOIN(a, b) MOTLEY_JOIN_(a, b)
#include MOTLEY_TEXT(MOTLEY_JOIN(simd_, ISA).h)
#include "matmul.h"
#include "rows.h"
#include "attention.h"
#include "embed.h"
#include "experts.h"

namespace motley::ISA {
namespace {

int units(const Op& op, const Step& step, int rows) {
  switch (op.kind) {
    case kMatmul: return matmul_units(op.matmul, rows);
    case kAttention: return step.share_count + step.tile_count * op.attention.heads.keys;
    case kSum: return int(op.sum.count / kSummed);
    case kMark: return 1;
    case kGroupRows: return 1;
    case kExperts: return expert_units(op.experts);
    default: return rows;
  }
}

void run(const Op& op, const Step& step, int rows, int first, int last, float* memory) {
  if (op.kind == kExperts) return expert_products(op.experts, first, last);
  for (int unit = first; unit < last; ++unit) switch (op.kind) {
      case kEmbed: embed_row(op.embed, step, unit); break;
      case kAngles: angles_row(op.angles, step, unit); break;
      case kNorm: norm_row(op.norm, unit); break;
      case kQuantise: quantise_row(op.quantise, unit); break;
      case kSilu: silu_row(op.silu, unit); break;
      case kMatmul: matmul(op.matmul, rows, unit); break;
      case kRope: rope_row(op.rope, step, unit); break;
      case kAttention: attention(op.attention, step, unit, memory); break;
      case kGather: gather_row(op.gather, step, unit); break;
      case kSum: sum_part(op.sum, unit); break;
      case kMark: mark(op.mark); break;
      case kRoute: route_row(op.route, unit, memory); break;
      case kGroupRows: group_rows(op.group, rows); break;
      case kSpread: spread_row(op.spread, unit); break;
      case kCombine: combine_row(op.combine, unit); break;
    }
}

int64_t workplace(const Op& op) {
  if (op.kind == kRoute) return route_floats(op.route);
  return op.kind == kAttention ? attention_floats(op.attention) : 0;
}

int64_t shared(const Op& op) { return op.kind == kAttention ? attention_shared(op.attention) : 0; }

}  // namespace
}  // namespace motley::ISA

namespace motley {
extern const Kernels MOTLEY_JOIN(ISA, _kernels) = {MOTLEY_TEXT(ISA), ISA::units, ISA::run,
                                                   ISA::workplace, ISA::shared};
}
