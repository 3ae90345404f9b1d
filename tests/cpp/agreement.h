#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <vector>

#include "catch.h"

// Checks that an operator and its gradients to all inputs, of one floating dtype, agree with what compute_exactly makes
// of them in float64.
template <typename Compute, typename Exact>
void check_agreement(const std::vector<at::Tensor>& inputs, const Compute& compute, const Exact& compute_exactly) {
  const auto dtype = inputs[0].scalar_type();
  const auto output = compute(inputs);
  std::vector<at::Tensor> exact;
  for (const auto& input : inputs) {
    exact.push_back(input.detach().to(at::kDouble).requires_grad_());
  }
  const auto expected = compute_exactly(exact);
  const auto grad = torch::randn_like(output);
  const auto actual_grads = torch::autograd::grad({output}, inputs, {grad});
  const auto expected_grads = torch::autograd::grad({expected}, exact, {grad.to(at::kDouble)});

  const double tolerance = dtype == at::kDouble     ? 1e-12
                           : dtype == at::kFloat    ? 2e-5
                           : dtype == at::kBFloat16 ? 2e-2
                                                    : 3e-3;
  // Relative to the largest number, or to 1: with a single key in sight the gradient to its score is 0.
  const auto close = [&](const at::Tensor& one, const at::Tensor& other) {
    const auto largest = std::max(other.abs().max().item<double>(), 1.0);
    return (one.to(at::kDouble) - other).abs().max().item<double>() <= tolerance * largest;
  };
  CHECK(output.scalar_type() == dtype);
  CHECK(close(output, expected));
  for (size_t i = 0; i < inputs.size(); ++i) {
    CAPTURE(i);
    CHECK(close(actual_grads[i], expected_grads[i]));
  }
}
