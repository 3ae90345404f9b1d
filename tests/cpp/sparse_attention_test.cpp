// The sparse_attention family from C++, without Python.

#include <torch/torch.h>

#include <cmath>

#include "agreement.h"
#include "catch.h"
#include "torchops.h"

namespace {

// Every score in float64; a key counts as often as a list names it.
at::Tensor dense(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& indices,
                 const at::Tensor& key_bias) {
  const auto times = torch::zeros({query.size(0), query.size(1), query.size(2), key.size(2)}, at::kDouble)
                         .scatter_add(-1, indices, torch::ones(indices.sizes(), at::kDouble));
  const auto scores = query.matmul(key.transpose(-1, -2)) / std::sqrt(static_cast<double>(query.size(-1))) +
                      key_bias.unsqueeze(1).unsqueeze(1) + times.log();
  const auto positions = torch::arange(query.size(2));
  return scores.masked_fill(positions.unsqueeze(1).lt(positions), -INFINITY).softmax(-1).nan_to_num(0).matmul(value);
}

}  // namespace

TEST_CASE("topk_attention and its gradients agree with dense attention") {
  torch::manual_seed(0);
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const auto& [length, head_dim, listed] :
         {std::array<int64_t, 3>{1, 8, 1}, {63, 16, 5}, {200, 40, 70}, {130, 1, 9}}) {
      CAPTURE(dtype, length, head_dim, listed);
      const auto random = [&](at::IntArrayRef sizes) { return torch::randn(sizes, dtype).requires_grad_(); };
      const std::vector<at::Tensor> inputs{random({2, 3, length, head_dim}), random({2, 3, length, head_dim}),
                                           random({2, 3, length, 24}), random({2, length})};
      auto indices = torch::randint(length, {2, 3, length, listed}, at::kLong);
      indices.select(-1, 0).copy_(torch::arange(length));  // every query sees itself
      check_agreement(
          inputs,
          [&](const std::vector<at::Tensor>& of) {
            return torchops::topk_attention(of[0], of[1], of[2], indices, 1, 1, true, std::nullopt, of[3]);
          },
          [&](const std::vector<at::Tensor>& of) { return dense(of[0], of[1], of[2], indices, of[3]); });
    }
  }
}

TEST_CASE("topk_attention_lse merges parts of the keys") {
  torch::manual_seed(1);
  const auto query = torch::randn({1, 2, 30, 16}), key = torch::randn({1, 2, 50, 16}),
             value = torch::randn({1, 2, 50, 16});
  const auto part = [&](int64_t begin, int64_t end) {
    return torchops::topk_attention_lse(query, key, value, torch::arange(begin, end).expand({1, 1, 30, end - begin}));
  };
  const auto [first, first_lse] = part(0, 21);
  const auto [second, second_lse] = part(21, 50);
  const auto weight = torch::sigmoid(first_lse - second_lse).unsqueeze(-1);
  CHECK(
      torch::allclose(first * weight + second * (1 - weight), torchops::span_attention(query, key, value), 1e-4, 1e-5));
}

TEST_CASE("topk_scores and its gradients agree with gathered scores") {
  torch::manual_seed(2);
  for (const auto dtype : {at::kDouble, at::kFloat}) {
    CAPTURE(dtype);
    const auto random = [&](at::IntArrayRef sizes) { return torch::randn(sizes, dtype).requires_grad_(); };
    const auto indices = torch::randint(70, {2, 3, 70, 9}, at::kLong);
    check_agreement(
        {random({2, 3, 70, 20}), random({2, 3, 70, 20})},
        [&](const std::vector<at::Tensor>& of) {
          return torchops::topk_scores(of[0], of[1], indices, 1, 1, false, 0.5);
        },
        [&](const std::vector<at::Tensor>& of) {
          return 0.5 * of[0].matmul(of[1].transpose(-1, -2)).gather(-1, indices);
        });
  }
  const auto halves = torch::randn({1, 1, 4, 8}, at::kHalf);
  CHECK(torchops::topk_scores(halves, halves, torch::zeros({1, 1, 4, 2}, at::kLong)).dtype() == at::kFloat);
}

TEST_CASE("topk_attention reports bad input as an error that says what is wrong") {
  const auto query = torch::randn({1, 4, 8, 16}), key = torch::randn({1, 2, 8, 16});
  const auto indices = torch::zeros({1, 3, 8, 2}, at::kLong);
  CHECK_THROWS_AS(torchops::topk_attention(query, key, key, indices), c10::ValueError);
}

TEST_CASE("pq_encode names the nearest codeword of each part") {
  torch::manual_seed(0);
  const auto codebooks = torch::randn({3, 20, 4}, at::kDouble);
  const auto codes = torch::randint(20, {2, 7, 3}, at::kLong);
  const auto parts = torch::stack({codebooks[0].index_select(0, codes.select(-1, 0).flatten()),
                                   codebooks[1].index_select(0, codes.select(-1, 1).flatten()),
                                   codebooks[2].index_select(0, codes.select(-1, 2).flatten())},
                                  1);
  const auto encoded = torchops::pq_encode(parts.reshape({2, 7, 12}), codebooks);
  REQUIRE(encoded.dtype() == at::kByte);
  REQUIRE(encoded.to(at::kLong).equal(codes));
}

TEST_CASE("pq_topk chooses the keys that share most codes") {
  const auto query_codes = torch::tensor({1, 2, 3}, at::kByte).reshape({1, 1, 1, 3});
  const auto key_codes = torch::tensor({1, 2, 0, 0, 0, 3, 1, 0, 3, 0, 2, 0, 0, 0, 0}, at::kByte).reshape({1, 1, 5, 3});
  const auto indices = torchops::pq_topk(query_codes, key_codes, 3);
  REQUIRE(indices.equal(torch::tensor({0, 2, 3}, at::kInt).reshape({1, 1, 1, 3})));
  const auto few = torchops::pq_topk(query_codes, key_codes, 6, true, 0, 0, std::nullopt, torch::tensor({1}));
  REQUIRE(few.equal(torch::tensor({0, 1, -1, -1, -1, -1}, at::kInt).reshape({1, 1, 1, 6})));
}

TEST_CASE("score_topk chooses the keys of the largest scores") {
  torch::manual_seed(0);
  const auto query = torch::randn({2, 4, 30, 16}, at::kDouble), key = torch::randn({2, 2, 90, 16}, at::kDouble);
  const auto scores = query.matmul(key.repeat_interleave(2, 1).transpose(-1, -2));
  const auto largest = [](const at::Tensor& of) { return std::get<0>(std::get<1>(of.topk(7)).sort()).to(at::kInt); };
  CHECK(torchops::score_topk(query, key, 7).equal(largest(scores)));
  const auto weights = torch::rand({2, 4, 30}, at::kDouble);  // no zeros of ReLU among the largest
  CHECK(torchops::score_topk(query, key, 7, weights, true)
            .equal(largest((weights.unsqueeze(-1) * scores.relu()).sum(1, true))));
  const auto blocks = scores.unflatten(-1, {15, 6}).amax(-1).unflatten(2, {3, 10}).amax(3);
  CHECK(torchops::score_topk(query, key, 7, std::nullopt, false, 6, 10).equal(largest(blocks)));
  const auto equal = torch::ones({1, 1, 4, 1});
  const auto few = torchops::score_topk(equal, equal, 3, std::nullopt, false, 1, 2, true);
  CHECK(few.equal(torch::tensor({0, 1, -1, 0, 1, 2}, at::kInt).reshape({1, 1, 2, 3})));
}

TEST_CASE("pq_attention and its gradients have the bits of choice and attention") {
  torch::manual_seed(0);
  const auto random = [](at::IntArrayRef sizes) { return torch::randn(sizes).requires_grad_(); };
  const std::vector<at::Tensor> inputs{random({2, 4, 70, 16}), random({2, 2, 70, 16}), random({2, 2, 70, 24}),
                                       random({2, 70}), random({4})};
  const auto query_codes = torch::randint(4, {2, 4, 70, 5}, at::kByte),
             key_codes = torch::randint(4, {2, 2, 70, 5}, at::kByte);
  const auto [output, logsumexp] = torchops::pq_attention_lse(inputs[0], inputs[1], inputs[2], query_codes, key_codes,
                                                              9, true, 0.3, 1, 2, inputs[3], inputs[4]);
  const auto indices = torchops::pq_topk(query_codes, key_codes, 9, true, 1, 2, inputs[3]);
  const auto [expected, expected_logsumexp] = torchops::topk_attention_lse(
      inputs[0], inputs[1], inputs[2], indices, 1, 1, true, 0.3, inputs[3], std::nullopt, inputs[4]);
  CHECK(output.equal(expected));
  CHECK(logsumexp.equal(expected_logsumexp));
  CHECK(torchops::pq_attention(inputs[0], inputs[1], inputs[2], query_codes, key_codes, 9, true, 0.3, 1, 2, inputs[3],
                               inputs[4])
            .equal(expected));
  const auto gradients = torch::autograd::grad({output.sum() + logsumexp.sum()}, inputs),
             expected_gradients = torch::autograd::grad({expected.sum() + expected_logsumexp.sum()}, inputs);
  for (size_t i = 0; i < inputs.size(); ++i) {
    CAPTURE(i);
    CHECK(gradients[i].equal(expected_gradients[i]));
  }
}

TEST_CASE("pq_loss and its gradients agree with the formula") {
  torch::manual_seed(0);
  for (const auto dtype : {at::kDouble, at::kFloat}) {
    CAPTURE(dtype);
    const std::vector<at::Tensor> inputs{torch::randn({4, 9, 24}, dtype).requires_grad_(),
                                         torch::randn({3, 20, 8}, dtype).requires_grad_()};
    check_agreement(
        inputs, [](const std::vector<at::Tensor>& of) { return torchops::pq_loss(of[0], of[1]); },
        [](const std::vector<at::Tensor>& of) {
          const auto parts = of[0].reshape({36, 3, 8});
          const auto distances = (parts.unsqueeze(2) - of[1]).abs().sum(-1);
          const auto weights = distances.clamp_min(1e-5).reciprocal();
          const auto mixed = torch::einsum("rme,mes->rms", {weights / weights.sum(-1, true), of[1]});
          const auto codes = torchops::pq_encode(of[0].detach(), of[1].detach()).reshape({36, 3}).to(at::kLong);
          const auto nearest = of[1].index({torch::arange(3), codes});
          return torch::mse_loss(mixed, nearest) + torch::mse_loss(parts, nearest);
        });
  }
}
