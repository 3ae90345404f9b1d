#pragma once

#include <cstddef>

#include "engine/scheduler.h"

// The shared memory of the block that runs: arrays on the heap, each as long as it is, so that
// AddressSanitizer sees what lies outside.

namespace torchops::simt {

// The block's array with this number; the first thread to ask makes it.
void* shared_array(int number, size_t bytes, Site where);

// Fails if the address is not in such an array or not a multiple of the alignment.
void require_shared(const char* operation, const void* address, size_t alignment, Site where);

// For the scheduler, before and after a block.
void allow_shared_bytes(size_t bytes);
void free_shared_arrays();

}  // namespace torchops::simt
