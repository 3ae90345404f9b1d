#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace torchops {

// Uninitialized scratch memory, aligned to cache lines, which are also the longest vectors.
template <typename T>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(size_t count)
      : data_(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}))) {}

  T* data() { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace torchops
