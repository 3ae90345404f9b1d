#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/cpu/aligned_buffer.h"
#include "core/cpu/dense_product_kernel.h"
#include "core/parallel.h"

namespace torchops {

// Products of dense matrices that are computed in one loop over threads. The bits of each are those it has alone.
template <typename T>
class ProductList {
 public:
  void add(kernels::core::DenseProduct<T> product) {
    if (product.num_batches == 0 || product.num_rows == 0 || product.num_columns == 0) {
      return;
    }
    if (product.depth == 0) {  // as one zero, everywhere
      static constexpr T zero{};
      product.depth = 1;
      product.left = {&zero, 0, 0, 1};
      product.right = {&zero, 0, 1, 0};
    }
    products_.push_back(product);
  }

  void run() const {
    std::vector<Share> shares;
    shares.reserve(products_.size());
    int64_t scratch_bytes = 0, work = 0;
    for (const auto& product : products_) {
      const auto units = TORCHOPS_KERNEL(core, dense_product_units<T>)(product);
      const auto product_work = product.num_batches * product.num_rows * product.num_columns * product.depth;
      shares.push_back({0, units, std::max<int64_t>(1, product_work / units)});
      scratch_bytes = std::max(scratch_bytes, TORCHOPS_KERNEL(core, dense_product_scratch_bytes<T>)(product));
      work += product_work;
    }
    // Threads get ranges of steps of about the same work, and the units that begin in them.
    constexpr int64_t most_steps = 4096;
    const int64_t step = std::max<int64_t>(1, work / most_steps);
    int64_t steps = 0;
    for (auto& share : shares) {
      share.first_step = steps;
      share.steps_of_unit = std::max<int64_t>(1, share.steps_of_unit / step);
      steps += share.units * share.steps_of_unit;
    }
    parallel_units(steps, step / 2, [&](int64_t begin, int64_t end) {
      AlignedBuffer<char> scratch(static_cast<size_t>(scratch_bytes));
      for (size_t i = 0; i < shares.size(); ++i) {
        const int64_t first = shares[i].unit_from(begin), last = shares[i].unit_from(end);
        if (first < last) {
          TORCHOPS_KERNEL(core, dense_product<T>)(products_[i], scratch.data(), first, last);
        }
      }
    });
  }

 private:
  struct Share {
    int64_t first_step;
    int64_t units;
    int64_t steps_of_unit;

    // The first unit that begins at a step or behind it.
    int64_t unit_from(int64_t step) const {
      const int64_t behind = std::max<int64_t>(0, step - first_step);
      return std::min(units, (behind + steps_of_unit - 1) / steps_of_unit);
    }
  };

  std::vector<kernels::core::DenseProduct<T>> products_;
};

}  // namespace torchops
