#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "sparse_attention/cuda/launches.h"

namespace torchops {

// Sorted lists on a CUDA device, kept alive for as long as kernels use them.
class ListMemory {
 public:
  // `options` are those of int32 on the device.
  template <typename T>
  ListMemory(const kernels::sparse_attention::Attention<T>& inputs, const at::TensorOptions& options)
      : numbers_(at::empty({2, inputs.sizes.batch, kernels::sparse_attention::sorted_heads(inputs),
                            inputs.lists.num_lists, inputs.lists.num_listed},
                           options)) {}

  template <typename T>
  kernels::sparse_attention::SortedLists sort(const kernels::sparse_attention::Attention<T>& inputs) const {
    auto* const numbers = numbers_.mutable_data_ptr<int32_t>();
    const auto sorted = kernels::sparse_attention::all_lists(inputs, numbers, numbers + numbers_.numel() / 2);
    kernels::sparse_attention::launch_sort_lists(inputs, sorted);
    return sorted;
  }

 private:
  at::Tensor numbers_;
};

}  // namespace torchops
