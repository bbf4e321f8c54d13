// A list of operations, run by several threads in one call.
//
// An operation's parts are claimed from a counter, and a barrier waits for parts, not for threads:
// one that sleeps or is late holds nobody up unless it has claimed something. Waiting spins for a
// bounded time, then sleeps; between calls every helper sleeps.
#include <algorithm>
#include <atomic>
#include <climits>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#if defined(MOTLEY_NEON) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

using namespace motley;

namespace {

constexpr int kSpins = 4000;  // some 50 µs

struct Memory {
  float* data = nullptr;
  int64_t floats = 0;

  void grow(int64_t needed) {
    if (needed <= floats) return;
    std::free(data);
    data = static_cast<float*>(std::aligned_alloc(64, size_t(needed * 4 + 63) / 64 * 64));
    floats = needed;
  }
  ~Memory() { std::free(data); }
};

struct Progress {
  std::atomic<int> claimed{0}, done{0};
};

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

struct Pool {
  const Kernels* kernels;
  std::vector<std::thread> helpers;
  std::vector<Memory> memory;  // of each thread, the caller's first

  // The call that runs now; written by the caller while no helper is active.
  const Op* ops = nullptr;
  int count = 0;
  Step step{};
  std::unique_ptr<Progress[]> progress;
  int capacity = 0;
  std::vector<int32_t> positions;
  std::vector<int64_t> slots;
  std::vector<Tile> tiles;
  std::vector<Share> shares;
  std::unique_ptr<std::atomic<int>[]> arrived;  // of each sequence that is shared
  int64_t places = 0;  // of `memory_shared`
  Memory memory_shared;

  std::mutex mutex;
  std::condition_variable begun, left;
  bool open = false, ending = false;
  uint64_t generation = 0;
  int active = 0;

  void describe(const Batch& batch);
  void share(const Batch& batch);
  void walk(int thread);
  void work(const Op& op, Progress& progress, int rows, int units, float* memory);
  void await(Progress& progress, int units);
  void help(int thread);
};

void Pool::describe(const Batch& batch) {
  positions.resize(size_t(batch.rows));
  slots.resize(size_t(batch.rows));
  tiles.clear();
  for (int s = 0; s < batch.spans; ++s) {
    const Span& span = batch.span[s];
    const int32_t* table = batch.tables + span.table;
    for (int i = 0; i < span.count; ++i) {
      const int position = span.start + i;
      positions[size_t(span.first + i)] = position;
      slots[size_t(span.first + i)] =
          int64_t(table[position / kBlockTokens]) * kBlockTokens + position % kBlockTokens;
    }
    for (int i = 0; span.count > kFewTokens && i < span.count; i += kTileTokens)
      tiles.push_back({span.first + i, std::min(kTileTokens, span.count - i), span.start + i, table});
  }
  share(batch);
  step = {&batch,        positions.data(),   slots.data(), tiles.data(), int(tiles.size()),
          shares.data(), int(shares.size()), nullptr};
}

static int key_tiles(const Span& span) {
  return span.count > kFewTokens ? 0 : (span.start + span.count + kTileKeys - 1) / kTileKeys;
}

// Divides what sequences with few new tokens have to read: so finely that threads end together.
void Pool::share(const Batch& batch) {
  constexpr int finely = 4;  // shares of a thread
  const int threads = int(helpers.size()) + 1;
  int total = 0;
  for (int s = 0; s < batch.spans; ++s) total += key_tiles(batch.span[s]);
  const int most = threads == 1 ? INT_MAX : std::max(1, total / (finely * threads));
  arrived = std::make_unique<std::atomic<int>[]>(size_t(batch.spans));
  shares.clear();
  places = 0;
  for (int s = 0; s < batch.spans; ++s) {
    const Span& span = batch.span[s];
    const int keys = key_tiles(span), parts = (keys - 1) / most + 1;
    const Tile tile = {span.first, span.count, span.start, batch.tables + span.table};
    for (int i = 0; keys && i < parts; ++i)
      shares.push_back({tile, int(int64_t(keys) * i / parts), int(int64_t(keys) * (i + 1) / parts),
                        parts, places, parts > 1 ? &arrived[size_t(s)] : nullptr});
    if (parts > 1) places += int64_t(keys) * span.count;
  }
}

void Pool::work(const Op& op, Progress& progress, int rows, int units, float* memory) {
  const int chunk = std::max(1, units / (8 * int(helpers.size() + 1)));
  for (;;) {
    const int first = progress.claimed.fetch_add(chunk, std::memory_order_relaxed);
    if (first >= units) return;
    const int last = std::min(first + chunk, units);
    kernels->run(op, step, rows, first, last, memory);
    if (progress.done.fetch_add(last - first, std::memory_order_acq_rel) + last - first == units)
      progress.done.notify_all();
  }
}

void Pool::await(Progress& progress, int units) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (progress.done.load(std::memory_order_acquire) >= units) return;
    relax();
  }
  for (int done; (done = progress.done.load(std::memory_order_acquire)) < units;)
    progress.done.wait(done, std::memory_order_acquire);
}

void Pool::walk(int thread) {
  int rows = step.batch->rows, waited = 0;
  std::vector<int> units(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    const Op& op = ops[i];
    if (op.wait)
      for (; waited < i; ++waited) await(progress[waited], units[size_t(waited)]);
    if (op.kind == kGather) rows = step.batch->drawn;
    if (op.kind == kSpread) rows *= op.spread.routing.used;
    if (op.kind == kCombine) rows /= op.combine.routing.used;
    units[size_t(i)] = kernels->units(op, step, rows);
    work(op, progress[i], rows, units[size_t(i)], memory[size_t(thread)].data);
  }
  for (; waited < count; ++waited) await(progress[waited], units[size_t(waited)]);
}

void Pool::help(int thread) {
  uint64_t seen = 0;
  std::unique_lock lock(mutex);
  for (;;) {
    begun.wait(lock, [&] { return ending || (open && generation != seen); });
    if (ending) return;
    seen = generation;
    ++active;
    lock.unlock();
    walk(thread);
    lock.lock();
    if (--active == 0) left.notify_one();
  }
}

namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#ifdef MOTLEY_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    found.push_back(&avx512_kernels);
#endif
#ifdef MOTLEY_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    found.push_back(&avx2_kernels);
#endif
#ifdef MOTLEY_NEON
#ifdef __linux__
  const bool dot_products = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  const bool dot_products = true;  // other systems for 64-bit Arm need newer processors
#endif
  if (dot_products) found.push_back(&dotprod_kernels);
  found.push_back(&neon_kernels);
#endif
  found.push_back(&generic_kernels);
  return found;
}

}  // namespace

const char* motley_instruction_sets() {
  static const std::string names = [] {
    std::string text;
    for (const Kernels* kernels : available()) {
      if (!text.empty()) text += ' ';
      text += kernels->name;
    }
    return text;
  }();
  return names.c_str();
}

Pool* motley_pool_new(int32_t threads, const char* instruction_set) {
  for (const Kernels* kernels : available()) {
    if (std::strcmp(kernels->name, instruction_set) != 0) continue;
    auto* pool = new Pool;
    pool->kernels = kernels;
    pool->memory = std::vector<Memory>(static_cast<size_t>(threads));
    for (int i = 1; i < threads; ++i) pool->helpers.emplace_back(&Pool::help, pool, i);
    return pool;
  }
  return nullptr;
}

void motley_pool_free(Pool* pool) {
  {
    std::lock_guard lock(pool->mutex);
    pool->ending = true;
  }
  pool->begun.notify_all();
  for (std::thread& helper : pool->helpers) helper.join();
  delete pool;
}

void motley_run(Pool* pool, const Op* ops, int32_t count, const Batch* batch) {
  pool->describe(*batch);
  int64_t floats = 0, shared = 0;
  for (int i = 0; i < count; ++i) {
    floats = std::max(floats, pool->kernels->workplace(ops[i]));
    shared = std::max(shared, pool->kernels->shared(ops[i]));
  }
  for (Memory& memory : pool->memory) memory.grow(floats);
  pool->memory_shared.grow(pool->places * shared);
  pool->step.shared = pool->memory_shared.data;
  if (pool->capacity < count) {
    pool->progress = std::make_unique<Progress[]>(size_t(count));
    pool->capacity = count;
  }
  for (int i = 0; i < count; ++i) pool->progress[i].claimed = pool->progress[i].done = 0;
  pool->ops = ops;
  pool->count = count;
  if (!pool->helpers.empty()) {
    {
      std::lock_guard lock(pool->mutex);
      pool->open = true;
      ++pool->generation;
    }
    pool->begun.notify_all();
  }
  pool->walk(0);
  if (!pool->helpers.empty()) {  // a helper may still look at what is the caller's
    std::unique_lock lock(pool->mutex);
    pool->open = false;
    pool->left.wait(lock, [&] { return pool->active == 0; });
  }
}
