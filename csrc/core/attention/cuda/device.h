#pragma once

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "core/attention/attention.h"
#include "core/attention/cuda/launches.h"

namespace torchops {

// A CUDA device, for core/attention/attending.h.
class CudaAttention {
 public:
  explicit CudaAttention(at::Device device) : device_(device), guard_(device) {}

  template <typename A>
  void sink_gradient(const kernels::attention::SinkGradient<A>& args) const {
    kernels::attention::launch_sink_gradient(args);
  }

  at::Tensor sum_of_shares(const at::Tensor& shares, const kernels::attention::Sizes& sizes) const {
    auto sum = at::empty({sizes.batch, sizes.num_keys}, shares.options());
    const auto launch = [&](auto zero) {
      using A = decltype(zero);
      kernels::attention::launch_key_bias_gradient(shares.const_data_ptr<A>(), sum.mutable_data_ptr<A>(), sizes);
    };
    shares.scalar_type() == at::kDouble ? launch(0.0) : launch(0.0F);
    return sum;
  }

 protected:
  template <typename A>
  at::TensorOptions options() const {
    return at::TensorOptions().device(device_).dtype(c10::CppTypeToScalarType<A>::value);
  }

 private:
  at::Device device_;
  c10::DeviceGuard guard_;
};

}  // namespace torchops
