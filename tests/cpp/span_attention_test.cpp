// The span_attention family from C++, without Python.

#include <torch/torch.h>

#include <cmath>

#include "agreement.h"
#include "catch.h"
#include "torchops.h"

namespace {

// Every score in float64, most of them masked: a causal window of `window` keys.
at::Tensor dense_window(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t window,
                        const at::Tensor& key_bias) {
  const auto scores = query.matmul(key.transpose(-1, -2)) / std::sqrt(static_cast<double>(query.size(-1))) +
                      key_bias.unsqueeze(1).unsqueeze(1);
  const auto positions = torch::arange(query.size(2));
  const auto distance = positions.unsqueeze(1) - positions;
  const auto hidden = distance.lt(0).logical_or(distance.ge(window));
  return scores.masked_fill(hidden, -INFINITY).softmax(-1).matmul(value);
}

}  // namespace

TEST_CASE("span_attention and its gradients agree with masked attention over a window") {
  torch::manual_seed(0);
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const auto& [length, head_dim, window] :
         {std::array<int64_t, 3>{1, 8, 1}, {63, 16, 5}, {200, 40, 70}, {130, 1, 1000}}) {
      CAPTURE(dtype, length, head_dim, window);
      const auto random = [&](at::IntArrayRef sizes) { return torch::randn(sizes, dtype).requires_grad_(); };
      const std::vector<at::Tensor> inputs{random({2, 3, length, head_dim}), random({2, 3, length, head_dim}),
                                           random({2, 3, length, 24}), random({2, length})};
      check_agreement(
          inputs,
          [&, window = window](const std::vector<at::Tensor>& of) {
            return torchops::span_attention(of[0], of[1], of[2], 1, window - 1, 0, true, std::nullopt, of[3]);
          },
          [&, window = window](const std::vector<at::Tensor>& of) {
            return dense_window(of[0], of[1], of[2], window, of[3]);
          });
    }
  }
}

TEST_CASE("span_attention_lse merges parts of the keys") {
  torch::manual_seed(1);
  const auto query = torch::randn({1, 2, 30, 16}), key = torch::randn({1, 2, 50, 16}),
             value = torch::randn({1, 2, 50, 16});
  const auto part = [&](int64_t begin, int64_t end) {
    return torchops::span_attention_lse(query, key.slice(2, begin, end), value.slice(2, begin, end));
  };
  const auto [first, first_lse] = part(0, 21);
  const auto [second, second_lse] = part(21, 50);
  const auto weight = torch::sigmoid(first_lse - second_lse).unsqueeze(-1);
  CHECK(
      torch::allclose(first * weight + second * (1 - weight), torchops::span_attention(query, key, value), 1e-4, 1e-5));
}

TEST_CASE("span_attention reports bad input as an error that says what is wrong") {
  const auto query = torch::randn({1, 4, 8, 16}), key = torch::randn({1, 3, 8, 16});
  CHECK_THROWS_AS(torchops::span_attention(query, key, key), c10::ValueError);
}
