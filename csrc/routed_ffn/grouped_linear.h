#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <array>
#include <optional>
#include <tuple>

#include "routed_ffn/grouped_rows.h"

// grouped_linear as every device computes it. Device is grouped_rows.h's, and has check_order(op, order, offsets),
// which looks at the numbers where the device can.

namespace torchops {

using GroupedLinearGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// The arguments of _grouped_linear_backward; input is absent where no gradient takes it.
struct GroupedLinearBackward {
  const at::Tensor& grad_output;           // [M, N]
  const std::optional<at::Tensor>& input;  // [T or M, K]
  const at::Tensor& weight;                // [G, N, K]
  const at::Tensor& order;
  const at::Tensor& offsets;
  std::optional<int64_t> slots;
  std::array<bool, 3> output_mask;

  auto members() const { return std::tie(grad_output, input, weight, order, offsets, slots, output_mask); }
};

void check_grouped_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& order,
                          const at::Tensor& offsets, const std::optional<at::Tensor>& bias,
                          std::optional<int64_t> slots);
void check_grouped_linear_backward(const GroupedLinearBackward& args);

template <typename Device>
GroupedRows<Device> grouped_rows(const char* op, const at::Tensor& order, const at::Tensor& offsets,
                                 std::optional<int64_t> slots) {
  const auto o = order.contiguous(), ends = offsets.contiguous();
  Device::check_order(op, o, ends);
  return {o, ends, slots.value_or(1)};
}

template <typename Device>
at::Tensor grouped_linear_on(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& order,
                             const at::Tensor& offsets, const std::optional<at::Tensor>& bias,
                             std::optional<int64_t> slots) {
  check_grouped_linear(input, weight, order, offsets, bias, slots);
  const c10::DeviceGuard guard(input.device());
  return grouped_rows<Device>("grouped_linear", order, offsets, slots)
      .product({input, slots.has_value()}, with_a_unit_stride(weight).transpose(1, 2), bias);
}

template <typename Device>
GroupedLinearGradients grouped_linear_backward_on(const GroupedLinearBackward& args) {
  check_grouped_linear_backward(args);
  const c10::DeviceGuard guard(args.grad_output.device());
  const auto rows = grouped_rows<Device>("_grouped_linear_backward", args.order, args.offsets, args.slots);
  const OperandRows grad{args.grad_output, false};
  GroupedLinearGradients grads;
  auto& [grad_input, grad_weight, grad_bias] = grads;
  if (args.output_mask[0] && args.slots) {
    const auto dtype = args.grad_output.scalar_type();
    const auto sums =
        at::empty({rows.num_rows(), args.weight.size(2)}, args.grad_output.options().dtype(at::toOpMathType(dtype)));
    rows.multiply(grad, args.weight, std::nullopt, sums);
    grad_input = rows.slot_sums(sums, std::nullopt, std::nullopt, rows.num_rows() / *args.slots, dtype);
  } else if (args.output_mask[0]) {
    grad_input = rows.product(grad, args.weight);
  }
  if (args.output_mask[1]) {
    grad_weight = rows.weight_gradient(grad, {*args.input, args.slots.has_value()}, args.weight);
  }
  if (args.output_mask[2]) {
    grad_bias = rows.sums(grad);
  }
  return grads;
}

}  // namespace torchops
