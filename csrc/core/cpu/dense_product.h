#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace torchops {

// output[b, m, n] = bias[b, n] + sum over d of left[b, m, d] * right[b, d, n], for floating tensors of one dtype and
// any strides. bias is [batches, columns]; the columns of output are contiguous. The bits are the same for any number
// of threads and any strides of left. With few rows they depend on which dimension of right is contiguous.
void dense_product(const at::Tensor& left, const at::Tensor& right, const at::Tensor& output,
                   const std::optional<at::Tensor>& bias = std::nullopt);

}  // namespace torchops
