#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>

#include "core/cuda/launch.h"
#include "core/tensors.h"
#include "stf/cuda/add_parts.cuh"
#include "stf/cuda/layout.h"

namespace torchops {

// A product that is computed in parts: fill(sums [parts, numel of output]) computes them, in the type that T is
// computed in, and their sum, + bias if there is one, becomes the output.
template <typename T, typename Fill>
void add_up_parts(const at::Tensor& output, int64_t num_parts, const std::optional<at::Tensor>& bias,
                  const Fill& fill) {
  const auto sums =
      at::empty({num_parts, output.numel()}, output.options().dtype(at::toOpMathType(output.scalar_type())));
  fill(sums.template mutable_data_ptr<kernels::accumulate_t<T>>());
  device::launch({divide_up(output.numel(), threads_of_elements), threads_of_elements},
                 kernels::stf::cuda::add_parts<T>,
                 kernels::stf::cuda::AddParts<T>{sums.template const_data_ptr<kernels::accumulate_t<T>>(), num_parts,
                                                 output.numel(), static_cast<T*>(output.mutable_data_ptr()),
                                                 data_or_null<T>(bias), output.size(-1)});
}

}  // namespace torchops
