#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

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

}  // namespace torchops
