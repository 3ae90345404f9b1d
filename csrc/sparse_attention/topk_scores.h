#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "sparse_attention/arguments.h"
#include "sparse_attention/scores.h"

// What topk_scores does on every device. Device is made of the tensors' device and has
//   scores(Scores<T>)
//   gradients(ScoreGradients<T>), one of which is wanted

namespace torchops {

// The arguments behind query, key and indices.
struct ScoreOptions {
  const std::optional<at::Tensor>& query_start;  // [B]
  const std::optional<at::Tensor>& key_start;    // [B]
  const c10::SymInt& block_size;
  const c10::SymInt& query_block;
  bool is_causal;
  std::optional<double> scale;

  auto members() const { return std::tie(query_start, key_start, block_size, query_block, is_causal, scale); }
};

// The arguments of _topk_scores_backward. A gradient to queries is made of keys and the other way round: what is not
// needed may be absent, so that keys' sizes are told by themselves.
struct ScoresBackward {
  const at::Tensor& grad;  // [B, Hq, Lq, k block_size]
  const std::optional<at::Tensor>& query;
  const std::optional<at::Tensor>& key;
  const at::Tensor& indices;
  ScoreOptions options;
  const c10::SymInt& group_size;  // Hq / Hkv, which processes that divide the heads have in common
  const c10::SymInt& num_keys;
  std::array<bool, 2> output_mask;

  auto members() const { return std::tie(grad, query, key, indices, options, group_size, num_keys, output_mask); }
};

using ScoresGradients = std::tuple<at::Tensor, at::Tensor>;

void check_topk_scores(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& indices,
                       const ScoreOptions& options);
at::Tensor empty_scores(const at::Tensor& query, const at::Tensor& indices, const ScoreOptions& options);
// Checks, and memory for the gradients that are wanted.
ScoresGradients empty_score_gradients(const ScoresBackward& args);

// Inputs that passed the check, as kernels read them.
class ListedScores : public TopkTensors {
 public:
  ListedScores(const at::Tensor& query, const at::Tensor& key, const at::Tensor& indices, const ScoreOptions& options);
};

template <typename Device>
at::Tensor topk_scores_on(const at::Tensor& query, const at::Tensor& key, const at::Tensor& indices,
                          const ScoreOptions& options) {
  check_topk_scores("topk_scores", query, key, indices, options);
  const Device device(query.device());
  auto scores = empty_scores(query, indices, options);
  if (scores.numel() > 0) {
    const ListedScores tensors(query, key, indices, options);
    for_dtype(query.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      device.scores(kernels::sparse_attention::Scores<T>{tensors.arguments<T>(),
                                                         mutable_heads<kernels::accumulate_t<T>>(scores)});
    });
  }
  return scores;
}

template <typename Device>
ScoresGradients topk_scores_backward_on(const ScoresBackward& args) {
  auto [grad_query, grad_key] = empty_score_gradients(args);
  if (!grad_query.defined() && !grad_key.defined()) {
    return {};
  }
  const Device device(args.grad.device());
  const auto grad = with_contiguous_rows(args.grad);
  // What is absent has the sizes of its gradient.
  const ListedScores tensors(args.query ? *args.query : grad_query, args.key ? *args.key : grad_key, args.indices,
                             args.options);
  const std::array gradients{grad_query, grad_key};
  for_dtype(gradients[grad_query.defined() ? 0 : 1].scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    device.gradients(
        kernels::sparse_attention::ScoreGradients<T>{tensors.arguments<T>(), heads<kernels::accumulate_t<T>>(grad),
                                                     mutable_heads<T>(gradients[0]), mutable_heads<T>(gradients[1])});
  });
  return {grad_query, grad_key};
}

}  // namespace torchops
