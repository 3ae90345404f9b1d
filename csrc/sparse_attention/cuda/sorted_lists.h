#pragma once

#include <ATen/ops/empty.h>

#include "sparse_attention/arguments.h"
#include "sparse_attention/cuda/launches.cuh"

namespace torchops {

// The memory of SortedLists, and the launch that fills it.
class SortedListsOnDevice {
 public:
  template <typename T>
  explicit SortedListsOnDevice(const kernels::sparse_attention::Attention<T>& inputs,
                               const at::TensorOptions& options) {
    num_heads_ = inputs.pair_bias == nullptr ? inputs.lists.num_heads : inputs.bias_heads;
    both_ = at::empty({2, inputs.sizes.batch, num_heads_, inputs.lists.num_lists, inputs.lists.num_listed},
                      options.dtype(at::kInt));
    kernels::sparse_attention::launch_sort_lists<T>(inputs, lists());
  }

  kernels::sparse_attention::SortedLists lists() const {
    auto* const data = both_.mutable_data_ptr<int32_t>();
    return {data, data + both_.numel() / 2, num_heads_};
  }

 private:
  at::Tensor both_;
  int64_t num_heads_;
};

}  // namespace torchops
