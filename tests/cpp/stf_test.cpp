// The stf family from C++, without Python.

#include <torch/torch.h>

#include <array>

#include "catch.h"
#include "torchops.h"

namespace {

// The matrix [rows, cols] that the factors stand for, entry by entry.
at::Tensor dense(const at::Tensor& basis, const at::Tensor& values, const at::Tensor& indices) {
  const auto code = torch::zeros({values.size(0), values.size(1), basis.size(1)}, values.options())
                        .scatter_add(2, indices.to(at::kLong), values);
  return torch::einsum("rbk,bkc->rbc", {code, basis}).flatten(1);
}

double tolerance_of(at::ScalarType dtype) {
  return dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 5e-6 : dtype == at::kBFloat16 ? 2e-2 : 3e-3;
}

bool close(const at::Tensor& actual, const at::Tensor& expected, double tolerance) {
  if (actual.sizes() != expected.sizes()) {
    return false;
  }
  const auto largest = expected.numel() == 0 ? 1.0 : std::max(expected.abs().max().item<double>(), 1e-3);
  return actual.numel() == 0 || (actual.to(at::kDouble) - expected).abs().max().item<double>() <= tolerance * largest;
}

}  // namespace

TEST_CASE("stf_linear, its gradients and the packed form agree with the weight multiplied out") {
  torch::manual_seed(0);
  // Tokens, blocks, K, cols, rows, nnz: few tokens, tiles of tokens, more than a part of the rows.
  for (const auto& [tokens, blocks, basis_size, cols, rows, nnz] : std::array<std::array<int64_t, 6>, 6>{{
           {1, 1, 40, 24, 50, 20},
           {3, 2, 7, 10, 17, 3},
           {8, 1, 130, 30, 33, 65},
           {50, 2, 12, 14, 300, 5},
           {130, 1, 300, 20, 20, 100},
           {0, 1, 4, 6, 7, 2},
       }}) {
    for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
      for (const bool transpose : {false, true}) {
        CAPTURE(tokens, blocks, basis_size, cols, rows, nnz, dtype, transpose);
        const auto random = [&](at::IntArrayRef sizes) { return torch::randn(sizes, dtype); };
        const auto [values, indices] = torchops::stf_select(random({rows, blocks, basis_size}), nnz);
        const std::vector<at::Tensor> inputs{random({tokens, transpose ? rows : cols}).requires_grad_(),
                                             random({blocks, basis_size, cols / blocks}).requires_grad_(),
                                             values.detach().requires_grad_(),
                                             random({transpose ? cols : rows}).requires_grad_()};
        const auto output = torchops::stf_linear(inputs[0], inputs[1], inputs[2], indices, inputs[3], transpose);
        std::vector<at::Tensor> exact;
        for (const auto& input : inputs) {
          exact.push_back(input.detach().to(at::kDouble).requires_grad_());
        }
        const auto weight = dense(exact[1], exact[2], indices);
        const auto expected = torch::linear(exact[0], transpose ? weight.t() : weight, exact[3]);
        const auto grad = torch::randn_like(output);
        const auto actual_grads = torch::autograd::grad({output}, inputs, {grad});
        const auto expected_grads = torch::autograd::grad({expected}, exact, {grad.to(at::kDouble)});
        CHECK(output.scalar_type() == dtype);
        CHECK(close(output, expected, tolerance_of(dtype)));
        for (size_t i = 0; i < inputs.size(); ++i) {
          CAPTURE(i);
          CHECK(close(actual_grads[i], expected_grads[i], tolerance_of(dtype)));
        }
        const at::NoGradGuard no_grad;
        const auto [packed_values, mask] = torchops::stf_pack(values, indices, basis_size);
        const auto packed =
            torchops::stf_linear_packed(inputs[0], inputs[1], packed_values, mask, rows, inputs[3], transpose);
        CHECK(close(packed, expected, tolerance_of(dtype)));
      }
    }
  }
}

TEST_CASE("stf_linear_straight_through computes with what stf_select keeps and trains all of the latent") {
  torch::manual_seed(1);
  const auto input = torch::randn({5, 12}), basis = torch::randn({2, 6, 6});
  const auto latent = torch::randn({20, 2, 6}).requires_grad_();
  const auto output = torchops::stf_linear_straight_through(input, basis, latent, 2);
  const auto [values, indices] = torchops::stf_select(latent.detach(), 2);
  CHECK(torch::equal(output, torchops::stf_linear(input, basis, values, indices)));
  const auto grad = torch::autograd::grad({output.sum()}, {latent})[0];
  CHECK(grad.count_nonzero().item<int64_t>() == latent.numel());
}

TEST_CASE("stf_factorize finds factors of a matrix that has some, and stf_project stays with them") {
  torch::manual_seed(2);
  const auto [values, indices] = torchops::stf_select(torch::randn({200, 1, 12}), 2);
  const auto weight = dense(torch::randn({1, 12, 16}), values, indices);
  const auto [basis, found_values, found_indices] = torchops::stf_factorize(weight, 12, 2);
  const auto error = (weight - dense(basis, found_values, found_indices)).norm() / weight.norm();
  CHECK(error.item<double>() < 0.05);
  const auto [projected, refined] = torchops::stf_project(weight, basis, 2);
  CHECK(((weight - projected).norm() / weight.norm()).item<double>() < 0.1);
}

TEST_CASE("stf operators report bad input as errors that say what is wrong") {
  const auto input = torch::randn({3, 6}), basis = torch::randn({1, 4, 6}), values = torch::randn({5, 1, 2});
  const auto too_large = torch::full({5, 1, 2}, 4, at::kByte);
  CHECK_THROWS_AS(torchops::stf_linear(input, basis, values, too_large), c10::ValueError);
  CHECK_THROWS_AS(torchops::stf_pack(values, too_large, 4), c10::ValueError);
  CHECK_THROWS_AS(torchops::stf_select(values, 3), c10::ValueError);
}
