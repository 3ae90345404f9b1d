#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cstdint>
#include <tuple>

#include "core/attention/arguments.h"

// What the host layers of every attention do alike, on every device. Device has
//   row_delta(RowDelta<T>), summed up as its backward sums up products with values
//   sink_gradient(SinkGradient<A>)
//   sum_of_shares(shares [B, Hkv, Lk], sizes) -> [B, Lk]

namespace torchops {

// Tensors::arguments<T>() are the family's inputs, as Device::forward(Forward) takes them with an output that is not
// empty.
template <typename Device, typename Tensors>
void attend(const Device& device, const Tensors& inputs, const at::Tensor& output, const at::Tensor& logsumexp,
            const at::Tensor& normalizer) {
  for_dtype(output.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    using Inputs = decltype(inputs.template arguments<T>());
    device.forward(kernels::attention::Forward<Inputs, T>{inputs.template arguments<T>(), mutable_heads<T>(output),
                                                          mutable_data_or_null<A>(logsumexp),
                                                          normalizers<A>(normalizer)});
  });
}

// [B, Hq, Lq], undefined where no gradient takes it.
template <typename Device>
at::Tensor delta_of_rows(const Device& device, const AttentionGradients& args, bool wanted) {
  if (!wanted) {
    return {};
  }
  const auto grad_logsumexp = args.grad_logsumexp ? args.grad_logsumexp->contiguous() : at::Tensor();
  const auto rows = args.normalizer.sizes().slice(0, 3);
  if (!args.grad_output) {
    return grad_logsumexp.defined() ? grad_logsumexp.neg() : at::zeros(rows, args.normalizer.options());
  }
  const auto grad = with_contiguous_rows(*args.grad_output), output = with_contiguous_rows(*args.output);
  auto delta = at::empty(rows, args.normalizer.options());
  for_dtype(grad.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    device.row_delta(kernels::attention::RowDelta<T>{heads<T>(grad), heads<T>(output), data_or_null<A>(grad_logsumexp),
                                                     delta.mutable_data_ptr<A>(), args.row_sizes()});
  });
  return delta;
}

// As kernels read it: contiguous, and aligned to two numbers, which rows of a wider tensor need not be.
inline at::Tensor aligned_normalizer(const at::Tensor& normalizer) {
  const auto result = normalizer.contiguous();
  const auto alignment = 2 * static_cast<uintptr_t>(result.element_size());
  return reinterpret_cast<uintptr_t>(result.const_data_ptr()) % alignment == 0 ? result : result.clone();
}

// In the sink's dtype.
template <typename Device>
at::Tensor gradient_to_sink(const Device& device, const AttentionGradients& args, const at::Tensor& of,
                            const at::Tensor& delta) {
  const auto normalizer = aligned_normalizer(args.normalizer);
  const auto sink = of.to(normalizer.scalar_type()).contiguous();
  auto gradient = at::empty(sink.sizes(), sink.options());
  const auto compute = [&](auto zero) {
    using A = decltype(zero);
    device.sink_gradient(kernels::attention::SinkGradient<A>{sink.const_data_ptr<A>(), normalizers<A>(normalizer),
                                                             delta.const_data_ptr<A>(), gradient.mutable_data_ptr<A>(),
                                                             args.row_sizes()});
  };
  normalizer.scalar_type() == at::kDouble ? compute(0.0) : compute(0.0F);
  return gradient.to(of.scalar_type());
}

// What the kernels of a backward read beside the inputs and write, kept alive for as long as their arguments are used.
class BackwardTensors {
 public:
  template <size_t count>
  BackwardTensors(const AttentionGradients& args, const AttentionMask<count>& mask, const at::Tensor& delta,
                  const kernels::attention::Sizes& sizes)
      : grad_output_(args.grad_output ? with_contiguous_rows(*args.grad_output) : at::Tensor()),
        normalizer_(aligned_normalizer(args.normalizer)),
        delta_(mask.scores() ? delta : at::Tensor()),
        key_bias_shares_(mask.key_bias()
                             ? at::empty({sizes.batch, sizes.num_kv_heads, sizes.num_keys}, normalizer_.options())
                             : at::Tensor()) {}

  // Of the accumulation dtype, like sums of gradients to side inputs, which are rounded to their own at last.
  at::TensorOptions options() const { return normalizer_.options(); }
  const at::Tensor& key_bias_shares() const { return key_bias_shares_; }

  template <typename T, typename Inputs>
  kernels::attention::Backward<Inputs, T> arguments(const Inputs& inputs, const at::Tensor& grad_query,
                                                    const at::Tensor& grad_key, const at::Tensor& grad_value) const {
    using A = kernels::accumulate_t<T>;
    return {inputs,
            heads<T>(grad_output_),
            normalizers<A>(normalizer_),
            data_or_null<A>(delta_),
            mutable_heads<T>(grad_query),
            mutable_heads<T>(grad_key),
            mutable_heads<T>(grad_value),
            mutable_data_or_null<A>(key_bias_shares_)};
  }

 private:
  at::Tensor grad_output_, normalizer_, delta_, key_bias_shares_;
};

}  // namespace torchops
