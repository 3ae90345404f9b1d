#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>

#include "core/tensors.h"
#include "stf/cuda/launches.h"

namespace torchops {

// A product that is computed in parts, in the type that T is computed in; their sum, + bias if there is one, becomes
// the output.
template <template <typename> typename Product, typename T>
void add_up_parts(Product<T> product, const at::Tensor& output, const std::optional<at::Tensor>& bias) {
  using A = kernels::accumulate_t<T>;
  const auto parts = parts_of(product);
  const auto sums =
      at::empty({parts.count, output.numel()}, output.options().dtype(at::toOpMathType(output.scalar_type())));
  product.sums = sums.template mutable_data_ptr<A>();
  product.part_size = parts.size;
  launch_parts(product, parts.count);
  launch_add_parts(kernels::stf::cuda::AddParts<T>{sums.template const_data_ptr<A>(), parts.count, output.numel(),
                                                   static_cast<T*>(output.mutable_data_ptr()), data_or_null<T>(bias),
                                                   output.size(-1)});
}

}  // namespace torchops
