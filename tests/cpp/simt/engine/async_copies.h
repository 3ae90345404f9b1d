#pragma once

#include <cstdint>

#include "engine/scheduler.h"

// cp.async: a copy takes place somewhen between its start and the wait for its group. Here it does
// either at once or at the wait, by the toss of a coin, so that a wait too few or too weak shows.

namespace torchops::simt {

struct AsyncCopy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
};

// In the header, to be compiled with the checkers that the kernel is compiled with.
inline void carry_out(const AsyncCopy& copy) {
  auto* to = static_cast<uint32_t*>(copy.to);
  const auto* from = static_cast<const uint32_t*>(copy.from);
  for (int word = 0; word < copy.bytes / 4; ++word) {
    to[word] = copy.valid ? from[word] : 0;
  }
}

// The queue of the thread that runs.
void defer(const AsyncCopy& copy, Site where);
void close_group();
// Takes out the oldest copy, if its group is closed and not among the newest `pending` ones.
bool take_due(int pending, AsyncCopy* copy);
// Takes out the oldest copy of all.
bool take_any(AsyncCopy* copy);

void forget_copies(int thread);

}  // namespace torchops::simt
