#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <limits>

namespace torchops {

// The lowest position of an index out of range that a thread has come across.
class WrongIndex {
 public:
  void found(int64_t position) {
    auto lowest = lowest_.load();
    while (position >= 0 && position < lowest && !lowest_.compare_exchange_weak(lowest, position)) {
    }
  }

  bool any() const { return lowest_.load() != none; }

  void check(const char* op, const at::Tensor& indices, int64_t basis_size) const {
    if (!any()) {
      return;
    }
    const auto position = lowest_.load();
    const auto row_size = indices.size(1) * indices.size(2);
    TORCH_CHECK_VALUE(false, op, ": expected indices in 0..", basis_size - 1, ", got ",
                      indices.flatten()[position].item<int64_t>(), " at [", position / row_size, ", ",
                      position % row_size / indices.size(2), ", ", position % indices.size(2), "]");
  }

 private:
  static constexpr int64_t none = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> lowest_{none};
};

}  // namespace torchops
