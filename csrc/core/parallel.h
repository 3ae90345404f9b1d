#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "core/cpu/aligned_buffer.h"

namespace torchops {

#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
#error "compile with -fopenmp: at::parallel_for is silently serial without it"
#endif

// Calls work(begin, end) for ranges that cover units 0..count-1, on torch's thread pool.
// Units must be independent of each other and each must write its own part of the output in an order
// of its own: then results have the same bits for any number of threads. cost is a unit's rough
// number of bytes moved or operations done; little work stays on the calling thread.
template <typename Work>
void parallel_units(int64_t count, int64_t cost, const Work& work) {
  constexpr int64_t worth_a_thread = 32768;
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, cost));
  at::parallel_for(0, count, grain, work);
}

// The same for units that need memory of their own: work(scratch, begin, end).
template <typename Work>
void parallel_tiles(int64_t count, int64_t cost, int64_t scratch_bytes, const Work& work) {
  parallel_units(count, cost, [&](int64_t begin, int64_t end) {
    AlignedBuffer<char> scratch(static_cast<size_t>(scratch_bytes));
    work(scratch.data(), begin, end);
  });
}

}  // namespace torchops
