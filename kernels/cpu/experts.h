// Mixture of experts: each row goes to a few experts of its own. Copies of the rows stand together by
// expert, so that an expert's weights are decoded once for all of its rows, and one that no row
// chose is not read. What a row gets is summed by ascending expert: its company changes no bit.
#pragma once

namespace motley::ISA {

// out[e] = scale · in · matrix[e], each sum in the same order whichever experts stand beside it.
template <int kExperts>
inline void score(const float* in, const float* matrix, int width, float scale, float* out) {
  F total[kExperts];
  for (F& x : total) x = zero();
  for (int i = 0; i < width; i += kLanes)
    for (int e = 0; e < kExperts; ++e)
      total[e] = fma(load(in + i), load(matrix + int64_t(e) * width + i), total[e]);
  for (int e = 0; e < kExperts; ++e) out[e] = scale * sum(total[e]);
}

// The highest logit that is not taken, the first of equals; one that is no number is not higher.
inline int best_expert(const float* logits, const float* taken, int experts) {
  int best = -1;
  for (int e = 0; e < experts; ++e)
    if (taken[e] == 0 && (best < 0 || logits[e] > logits[best])) best = e;
  return best;
}

// `memory` has route_floats(op).
inline void route_row(const RouteOp& op, int row, float* memory) {
  const auto [experts, used, chosen, weights, place, start] = op.routing;
  const float* in = op.in + int64_t(row) * op.width;
  const float rms = row_rms(in, nullptr, op.width), scale = 1 / std::sqrt(rms * rms + op.eps);
  float *logits = memory, *taken = memory + experts;
  int e = 0;
  for (; e + 4 <= experts; e += 4)
    score<4>(in, op.matrix + int64_t(e) * op.width, op.width, scale, logits + e);
  for (; e < experts; ++e)
    score<1>(in, op.matrix + int64_t(e) * op.width, op.width, scale, logits + e);
  std::fill(taken, taken + experts, 0.0f);
  const float highest = logits[best_expert(logits, taken, experts)];
  for (int k = 0; k < used; ++k) taken[best_expert(logits, taken, experts)] = 1;
  float total = 0;
  for (e = 0; e < experts; ++e) {
    logits[e] = std::exp(logits[e] - highest);
    if (taken[e] != 0 || !op.sum_to_one) total += logits[e];
  }
  int at = row * used;
  for (e = 0; e < experts; ++e) {
    if (taken[e] == 0) continue;
    chosen[at] = e;
    weights[at++] = logits[e] / total;
  }
}

inline int64_t route_floats(const RouteOp& op) { return 2 * int64_t(op.routing.experts); }

// Where each copy stands: counted by expert, then dealt out in the order of rows.
inline void group_rows(const GroupOp& op, int rows) {
  const auto [experts, used, chosen, weights, place, start] = op.routing;
  const int copies = rows * used;
  std::fill(start, start + experts + 1, 0);
  for (int i = 0; i < copies; ++i) ++start[chosen[i] + 1];
  for (int e = 0; e < experts; ++e) start[e + 1] += start[e];
  for (int i = 0; i < copies; ++i) place[i] = start[chosen[i]]++;
  for (int e = experts; e > 0; --e) start[e] = start[e - 1];  // dealing moved each to the next
  start[0] = 0;
}

inline void spread_row(const SpreadOp& op, int copy) {
  const int groups = op.width / kGroup;
  const Act* in = op.in + int64_t(copy / op.routing.used) * groups;
  std::copy(in, in + groups, op.out + int64_t(op.routing.place[copy]) * groups);
}

// One expert's product, of the rows that stand at its place.
inline MatmulOp expert_product(const ExpertsOp& op, int expert) {
  const Matrix& matrix = op.matrices[expert];
  const int64_t first = op.routing.start[expert];
  return {matrix, op.in + first * (matrix.inputs / kGroup), op.out + first * op.stride, op.stride, 0};
}

inline int expert_rows(const ExpertsOp& op, int expert) {
  return op.routing.start[expert + 1] - op.routing.start[expert];
}

inline int expert_units(const ExpertsOp& op) {
  int units = 0;
  for (int e = 0; e < op.routing.experts; ++e)
    units += matmul_units(expert_product(op, e), expert_rows(op, e));
  return units;
}

inline void expert_products(const ExpertsOp& op, int first, int last) {
  for (int e = 0; first < last; ++e) {
    const int rows = expert_rows(op, e);
    if (rows == 0) continue;
    const MatmulOp product = expert_product(op, e);
    const int units = matmul_units(product, rows);
    for (; first < units && first < last; ++first) matmul(product, rows, first);
    first -= units;
    last -= units;
  }
}

inline void combine_row(const CombineOp& op, int row) {
  const auto [experts, used, chosen, weights, place, start] = op.routing;
  float* out = op.out + int64_t(row) * op.width;
  for (int i = 0; i < op.width; i += kLanes) {
    F total = op.add ? load(out + i) : zero();
    for (int at = row * used; at < (row + 1) * used; ++at)
      total = fma(set(weights[at]), load(op.in + int64_t(place[at]) * op.width + i), total);
    store(out + i, total);
  }
}

}  // namespace motley::ISA
