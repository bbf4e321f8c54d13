// Runs the same operations with two instruction sets and prints how far their results differ:
// one line each, the largest difference over the largest value. For processors that are not here,
// under an emulator that has no Python.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "motley.h"

namespace {

std::mt19937 generator(7);

std::vector<float> numbers(size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (float& value : x) value = normal(generator);
  for (size_t i = 40; i < count; i += 577) x[i] *= 40;  // outliers
  return x;
}

std::vector<uint8_t> random_blocks(int outputs, int inputs, int columns, int bytes, int half, bool two) {
  std::vector<uint8_t> blocks(size_t(outputs) * inputs / columns * bytes);
  for (uint8_t& byte : blocks) byte = uint8_t(generator());
  for (size_t at = 0; at < blocks.size(); at += bytes)  // small half-precision scales
    for (int i = 0; i <= two; ++i) blocks[at + half + 2 * i + 1] = 0x20 | (generator() & 3);
  return blocks;
}

struct Results {
  std::vector<const char*> names;
  std::vector<std::vector<float>> values;
};

void keep(Results& all, const char* name, std::vector<float> values) {
  all.names.push_back(name);
  all.values.push_back(std::move(values));
}

void run(Pool* pool, std::vector<Op> ops, int rows, int start) {
  const std::vector<int32_t> tokens(size_t(rows), 1), table = {2, 0, 4, 1, 5, 3, 6};
  const Span span = {0, rows, start, 0};
  const Batch batch = {rows, 1, 0, tokens.data(), &span, table.data(), nullptr};
  motley_run(pool, ops.data(), int(ops.size()), &batch);
}

Op make(OpKind kind) {
  Op op{};
  op.kind = kind;
  op.wait = 1;
  return op;
}

std::vector<float> as_floats(const std::vector<Act>& acts) {
  std::vector<float> x;
  for (const Act& a : acts) {
    for (int i = 0; i < kGroup; ++i)
      x.push_back(a.d * float(a.q[i]) + (a.fine > 0 ? a.fine * float(a.rest[i]) : 0));
    x.insert(x.end(), {a.sum, a.half[0], a.half[1]});
  }
  return x;
}

void products(Pool* pool, Results& all) {
  struct { const char* name; Format format; int columns, bytes, half; bool two; } formats[] = {
      {"Q4_0", kQ4_0, 32, 18, 0, false},   {"Q4_1", kQ4_1, 32, 20, 0, true},
      {"Q8_0", kQ8_0, 32, 34, 0, false},   {"Q4_K", kQ4_K, 256, 144, 0, true},
      {"Q6_K", kQ6_K, 256, 210, 208, false}};
  constexpr int rows = 23, outputs = 70, inputs = 512;
  for (const auto& f : formats) {
    const auto blocks = random_blocks(outputs, inputs, f.columns, f.bytes, f.half, f.two);
    std::vector<uint8_t> packed(size_t(motley_packed_bytes(f.format, outputs, inputs)));
    motley_pack(f.format, outputs, inputs, blocks.data(), packed.data());
    const auto x = numbers(size_t(rows) * inputs);
    std::vector<Act> acts(size_t(rows) * inputs / kGroup);
    std::vector<float> out(size_t(rows) * outputs, NAN);
    Op quantise = make(kQuantise), matmul = make(kMatmul);
    quantise.quantise = {x.data(), acts.data(), inputs};
    matmul.matmul = {{f.format, outputs, inputs, packed.data()}, acts.data(), out.data(), outputs, 0};
    run(pool, {quantise, matmul}, rows, 0);
    keep(all, f.name, out);
  }
}

void row_operations(Pool* pool, Results& all) {
  constexpr int rows = 3, width = 192;
  const auto x = numbers(rows * width), weight = numbers(width);
  auto gate_up = numbers(2 * rows * width);
  std::vector<Act> normed(rows * width / kGroup), gated(rows * width / kGroup);
  Op norm = make(kNorm), silu = make(kSilu);
  norm.norm = {x.data(), weight.data(), normed.data(), width, 1e-5f};
  silu.silu = {gate_up.data(), gated.data(), width};
  run(pool, {norm, silu}, rows, 0);
  keep(all, "norm", as_floats(normed));
  keep(all, "silu", as_floats(gated));
}

void attention(Pool* pool, Results& all, KvType type, int dim) {
  constexpr int rows = 37, start = 70;
  const Heads heads = {6, 2, dim};
  const auto width = size_t(10 * dim);
  auto qkv = numbers(rows * width);
  const auto frequencies = numbers(size_t(dim / 2));
  std::vector<float> angles(size_t(rows * dim)), out(size_t(rows * 6 * dim), NAN);
  std::vector<char> keys(7 * kBlockTokens * 2 * size_t(dim) * 4), values(keys.size());
  const KvLayer cache = {type, keys.data(), values.data()};
  Op angle = make(kAngles), rope = make(kRope), attend = make(kAttention);
  angle.angles = {frequencies.data(), angles.data(), dim, 1};
  rope.rope = {qkv.data(), angles.data(), nullptr, nullptr, nullptr, 0, heads, cache};
  attend.attention = {qkv.data(), out.data(), heads, cache, 0};
  run(pool, {angle, rope, attend}, rows, start);
  constexpr const char* kNames[] = {"attention float32", "attention float16", "attention int8"};
  keep(all, kNames[type], out);
}

void experts(Pool* pool, Results& all) {
  constexpr int rows = 9, width = 96, count = 5, used = 2;
  const auto in = numbers(rows * width), ones = std::vector<float>(width, 1), router = numbers(count * width);
  std::vector<std::vector<uint8_t>> packed;
  std::vector<Matrix> matrices;
  for (int e = 0; e < count; ++e) {
    const auto blocks = random_blocks(width, width, 32, 34, 0, false);
    packed.emplace_back(size_t(motley_packed_bytes(kQ8_0, width, width)));
    motley_pack(kQ8_0, width, width, blocks.data(), packed.back().data());
    matrices.push_back({kQ8_0, width, width, packed.back().data()});
  }
  std::vector<int32_t> chosen(rows * used), place(rows * used), start(count + 1);
  std::vector<float> weights(rows * used), products(rows * used * width, NAN), out(rows * width, NAN);
  std::vector<Act> acts(rows * width / kGroup), copies(used * acts.size());
  const Routing routing = {count, used, chosen.data(), weights.data(), place.data(), start.data()};
  Op quantise = make(kQuantise), route = make(kRoute), group = make(kGroupRows);
  Op spread = make(kSpread), product = make(kExperts), combine = make(kCombine);
  quantise.quantise = {in.data(), acts.data(), width};
  route.route = {in.data(), router.data(), routing, width, 1e-5f, 1};
  group.group = {routing};
  spread.spread = {acts.data(), copies.data(), routing, width};
  product.experts = {matrices.data(), copies.data(), products.data(), routing, width};
  combine.combine = {products.data(), out.data(), routing, width, 0};
  run(pool, {quantise, route, group, spread, product, combine}, rows, 0);
  keep(all, "experts", out);
}

Results results(const char* set) {
  generator.seed(7);
  Results all;
  Pool* pool = motley_pool_new(2, set);
  if (!pool) return all;
  products(pool, all);
  row_operations(pool, all);
  attention(pool, all, kFloat32, 64);
  attention(pool, all, kFloat16, 20);
  experts(pool, all);
  attention(pool, all, kInt8, 36);
  motley_pool_free(pool);
  return all;
}

}  // namespace

int main(int count, char** names) {
  if (count != 3) return 2;
  const Results one = results(names[1]), other = results(names[2]);
  if (one.names.empty() || one.names.size() != other.names.size()) {
    std::fprintf(stderr, "built in and runnable here: %s\n", motley_instruction_sets());
    return 1;
  }
  for (size_t i = 0; i < one.names.size(); ++i) {
    float difference = 0, largest = 0;
    for (size_t j = 0; j < one.values[i].size(); ++j) {
      const float apart = std::fabs(one.values[i][j] - other.values[i][j]);
      difference = std::isnan(apart) ? INFINITY : std::fmax(difference, apart);
      largest = std::fmax(largest, std::fabs(one.values[i][j]));
    }
    std::printf("%s\t%g\n", one.names[i], difference / largest);
  }
}
