#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "sparse_attention/arguments.h"
#include "sparse_attention/score_choice.h"

// score_topk as every device computes it, its arguments and checks.

namespace torchops {

// The arguments behind query and key.
struct ScoreTopkOptions {
  const c10::SymInt& k;
  const std::optional<at::Tensor>& weights;      // [B, Hq, Lq]
  const std::optional<at::Tensor>& key_bias;     // [B, Lk]
  const std::optional<at::Tensor>& query_start;  // [B]
  const std::optional<at::Tensor>& key_start;    // [B]
  bool relu;
  const c10::SymInt& block_size;
  const c10::SymInt& query_block;
  bool is_causal;

  auto members() const {
    return std::tie(k, weights, key_bias, query_start, key_start, relu, block_size, query_block, is_causal);
  }
  AttentionSides sides() const {
    static const std::optional<at::Tensor> no_sink;
    return {key_bias, no_sink, query_start, key_start};
  }
};

void check_score_topk(const at::Tensor& query, const at::Tensor& key, const ScoreTopkOptions& options);
at::Tensor empty_score_choice(const at::Tensor& query, const ScoreTopkOptions& options);

class ScoreTensors : public AttentionTensors {
 public:
  ScoreTensors(const at::Tensor& query, const at::Tensor& key, const ScoreTopkOptions& options)
      : AttentionTensors(query, key, at::Tensor(), 0, options.sides(), /*scale=*/1),
        weights_(contiguous_or_undefined(options.weights, accumulated())),
        relu_(options.relu),
        rule_(rule_of(options.block_size, options.query_block, options.is_causal, query.size(2))),
        num_chosen_(options.k.expect_int()) {}

  template <typename T>
  kernels::sparse_attention::ScoreChoice<T> arguments() const {
    return {inputs<T>(), data_or_null<kernels::accumulate_t<T>>(weights_), relu_, rule_, num_chosen_};
  }

 private:
  at::Tensor weights_;
  bool relu_;
  kernels::sparse_attention::ListRule rule_;
  int64_t num_chosen_;
};

// choose(ScoreChoice<T>, indices) fills lists, of which there are some.
template <typename Choose>
at::Tensor score_topk_on_device(const at::Tensor& query, const at::Tensor& key, const ScoreTopkOptions& options,
                                const Choose& choose) {
  check_score_topk(query, key, options);
  auto indices = empty_score_choice(query, options);
  if (indices.numel() > 0) {
    const ScoreTensors tensors(query, key, options);
    for_dtype(query.scalar_type(),
              [&]<typename T>(type_tag<T>) { choose(tensors.arguments<T>(), indices.mutable_data_ptr<int32_t>()); });
  }
  return indices;
}

}  // namespace torchops
