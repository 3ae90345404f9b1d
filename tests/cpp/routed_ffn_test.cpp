// The routed_ffn family from C++, without Python.

#include <torch/torch.h>

#include "catch.h"
#include "torchops.h"

TEST_CASE("route from C++") {
  const auto index = torch::tensor({{2, 0}, {0, 1}, {2, -1}}, at::kLong);
  const auto [order, offsets] = torchops::route(index, 3);
  CHECK(at::equal(order, torch::tensor({1, 2, 3, 0, 4, 5}, at::kInt)));
  CHECK(at::equal(offsets, torch::tensor({0, 2, 3, 5}, at::kInt)));
}

TEST_CASE("grouped_linear from C++") {
  torch::manual_seed(0);
  const auto tokens = torch::randn({3, 5}, at::kDouble).requires_grad_(), weight = torch::randn({3, 4, 5}, at::kDouble),
             bias = torch::randn({3, 4}, at::kDouble);
  const auto [order, offsets] = torchops::route(torch::tensor({{2, 0}, {0, 1}, {2, -1}}, at::kLong), 3);
  const auto rows = torchops::grouped_linear(tokens, weight, order, offsets, bias, 2);
  CHECK(torch::allclose(rows[0], torch::mv(weight[0], tokens[0]) + bias[0]));
  CHECK(torch::allclose(rows[4], torch::mv(weight[2], tokens[2]) + bias[2]));
  CHECK(torch::equal(rows[5], torch::zeros({4}, at::kDouble)));
  rows.sum().backward();
  CHECK(torch::allclose(tokens.grad()[1], weight[0].sum(0) + weight[1].sum(0)));
}

TEST_CASE("routed_ffn from C++: all blocks are the dense layer") {
  torch::manual_seed(0);
  const auto x = torch::randn({7, 6}, at::kDouble), w1 = torch::randn({8, 6}, at::kDouble).requires_grad_(),
             w2 = torch::randn({6, 8}, at::kDouble);
  const auto index = torch::arange(2, at::kLong).expand({7, 2});
  const auto output = torchops::routed_ffn(x, index, std::nullopt, w1.view({2, 4, 6}),
                                           w2.view({6, 2, 4}).permute({1, 0, 2}), {}, {}, {}, {}, {}, {}, {}, "silu");
  const auto expected = torch::nn::functional::linear(torch::silu(torch::nn::functional::linear(x, w1)), w2);
  CHECK(torch::allclose(output, expected));
  const auto grad = torch::randn_like(output);
  CHECK(torch::allclose(torch::autograd::grad({output}, {w1}, {grad})[0],
                        torch::autograd::grad({expected}, {w1}, {grad})[0]));
}

TEST_CASE("routed_ffn from C++ refuses what is wrong") {
  const auto x = torch::randn({7, 6}), w1 = torch::randn({2, 4, 6}), w2 = torch::randn({2, 6, 4});
  const auto index = torch::zeros({7, 1}, at::kLong);
  CHECK_THROWS_AS(torchops::routed_ffn(x, index, {}, w1, w2, {}, {}, {}, {}, {}, {}, {}, "tanh"), c10::ValueError);
}
