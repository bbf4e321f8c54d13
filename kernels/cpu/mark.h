// Saying how far the list of operations has come, while it runs (kernels/mark.py).
#pragma once
#include <unistd.h>

#include "motley.h"

namespace motley {

inline void mark(const MarkOp& op) {
  __atomic_store_n(&op.mark->value, op.value, __ATOMIC_RELEASE);
  const int descriptor = __atomic_load_n(&op.mark->descriptor, __ATOMIC_ACQUIRE);
  if (descriptor < 0) return;
  const char byte = 0;
  [[maybe_unused]] const auto written = write(descriptor, &byte, 1);  // full: its reader is awake
}

}  // namespace motley
