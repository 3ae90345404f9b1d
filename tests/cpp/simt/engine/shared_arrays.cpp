#include "engine/shared_arrays.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "engine/race_checker.h"

namespace torchops::simt {
namespace {

struct SharedArray {
  void* memory;
  size_t bytes;
};

constexpr int capacity = 64;
SharedArray arrays[capacity];
int num_arrays;
size_t allowed_bytes;
size_t taken_bytes;

}  // namespace

void* shared_array(int number, size_t bytes, Site where) {
  if (number < num_arrays) {
    if (arrays[number].bytes != bytes) {
      fail("threads disagree on shared array " + std::to_string(number) + ": " + std::to_string(bytes) + " and " +
               std::to_string(arrays[number].bytes) + " bytes",
           where);
    }
    return arrays[number].memory;
  }
  taken_bytes += (bytes + 15) / 16 * 16;
  if (taken_bytes > allowed_bytes) {
    fail("the kernel takes " + std::to_string(taken_bytes) + " bytes of shared memory, the launch has " +
             std::to_string(allowed_bytes),
         where);
  }
  if (number == capacity) {
    fail("a block has more shared arrays than the engine holds", where);
  }
  const race_checker::IgnoreScope ignore;
  void* memory = std::malloc(bytes);
  std::memset(memory, 0xff, bytes);  // as floating-point numbers: NaN
  arrays[num_arrays++] = {memory, bytes};
  return memory;
}

void require_shared(const char* operation, const void* address, size_t alignment, Site where) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    fail(std::string(operation) + ": the address is not a multiple of " + std::to_string(alignment) + " bytes", where);
  }
  for (int number = 0; number < num_arrays; ++number) {
    const auto* first = static_cast<const char*>(arrays[number].memory);
    if (address >= first && address < first + arrays[number].bytes) {
      return;
    }
  }
  fail(std::string(operation) + ": the address is not in shared memory", where);
}

void allow_shared_bytes(size_t bytes) {
  allowed_bytes = bytes;
  taken_bytes = 0;
}

void free_shared_arrays() {
  const race_checker::IgnoreScope ignore;
  for (int number = 0; number < num_arrays; ++number) {
    std::free(arrays[number].memory);
  }
  num_arrays = 0;
}

}  // namespace torchops::simt
