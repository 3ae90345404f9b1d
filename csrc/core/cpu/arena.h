#pragma once

#include <cstddef>
#include <cstdint>

#ifndef TORCHOPS_LEVEL
#error "arena.h belongs in *_kernel.cpp files, which are compiled once per level"
#endif

namespace torchops::kernels::inline TORCHOPS_LEVEL {

// Hands out arrays of a block of memory one behind the other, each on its own cache lines. Without a block
// it counts the bytes that they need.
class Arena {
 public:
  explicit Arena(void* block) : block_(static_cast<char*>(block)) {}

  template <typename T>
  T* take(int64_t count) {
    constexpr int64_t line = 64;
    T* array = block_ == nullptr ? nullptr : reinterpret_cast<T*>(block_ + bytes_);
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + line - 1) / line * line;
    return array;
  }

  int64_t bytes() const { return bytes_; }

 private:
  char* block_;
  int64_t bytes_ = 0;
};

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
