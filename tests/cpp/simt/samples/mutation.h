#pragma once

namespace torchops::kernels::samples {

// Mistakes that can be built into the sample kernels, to see that the checkers find them.
enum class Mutation {
  none,
  no_barrier,         // between writing and reading shared memory
  no_refill_barrier,  // between reading shared memory and writing it again
  no_syncwarp,
  divergent_barrier,  // in a branch that not all threads take
  early_return,       // before a barrier
  partial_shuffle,    // in a branch that not all lanes take
  no_predicate,       // reads behind the end of a matrix
  shared_overrun,     // writes behind the end of a shared array
  no_wait,            // for asynchronous copies
  weak_wait,          // for all but the group that is needed
  no_atomic,          // +=, in several blocks
  harmless_race,      // threads that write the same value to the same place
  misaligned,         // a vector access to an address that is not a multiple of its size
};

}  // namespace torchops::kernels::samples
