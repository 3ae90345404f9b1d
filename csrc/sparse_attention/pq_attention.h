#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "sparse_attention/attending.h"
#include "sparse_attention/code_tensors.h"
#include "sparse_attention/pq_topk.h"

// pq_attention as every device computes it: topk_attention over lists that pq_topk would make. Device is one of
// attending.h's and has lay_out(query_codes, key_codes), a CodeLayout.

namespace torchops {

// How many keys the codes of queries and keys choose.
struct CodesOfKeys {
  const at::Tensor& query_codes;  // [B, Hq, Lq, M]
  const at::Tensor& key_codes;    // [B, Hkv, Lk, M]
  const c10::SymInt& k;

  auto members() const { return std::tie(query_codes, key_codes, k); }
};

// The arguments behind query, key, value and the codes.
struct PqAttentionOptions : AttentionSides {
  bool is_causal;
  std::optional<double> scale;
  const c10::SymInt& sink_keys;
  const c10::SymInt& local_keys;

  const AttentionSides& sides() const { return *this; }
  auto members() const { return std::tie(sides(), is_causal, scale, sink_keys, local_keys); }
  PqTopkOptions of_choice(const c10::SymInt& k) const {
    return {k, key_bias, query_start, key_start, is_causal, sink_keys, local_keys};
  }
};

// Of query, key, value, key_bias and sink.
using PqAttentionMask = AttentionMask<5>;

// The arguments of _pq_attention_backward.
struct PqAttentionBackward : AttentionGradients {
  const std::optional<at::Tensor>& query_codes;
  const std::optional<at::Tensor>& key_codes;
  const c10::SymInt& k;
  PqAttentionOptions options;
  PqAttentionMask mask;

  const AttentionGradients& gradients() const { return *this; }
  auto members() const { return std::tie(gradients(), query_codes, key_codes, k, options, mask); }
};

// Gradients to query, key, value, key_bias and sink, undefined where nobody asks for them.
using PqAttentionGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// value may be undefined: the backward does not always need it.
void check_pq_attention(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const CodesOfKeys& codes, const PqAttentionOptions& options);
void check_pq_attention_backward(const PqAttentionBackward& args);

class PqAttentionTensors : public AttentionTensors {
 public:
  template <typename LayOut>
  PqAttentionTensors(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t value_dim,
                     const CodesOfKeys& codes, const PqAttentionOptions& options, const LayOut& lay_out)
      : AttentionTensors(query, key, value, value_dim, options, options.scale),
        codes_(codes.query_codes, codes.key_codes, options.of_choice(codes.k), lay_out),
        choice_(codes_.arguments(std::min(codes.k.expect_int(), key.size(2)))) {}

  // They point to this object.
  template <typename T>
  kernels::sparse_attention::Attention<T> arguments() const {
    return {inputs<T>(),
            {{}, {}, choice_.num_heads, choice_.num_queries, choice_.num_chosen, &choice_},
            /*pair_bias=*/nullptr,
            /*bias_heads=*/1,
            {/*block_size=*/1, /*query_block=*/1, choice_.is_causal}};
  }

 private:
  CodeTensors codes_;
  kernels::sparse_attention::CodeChoice choice_;
};

template <typename Device>
at::Tensor attend(const Device& device, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const CodesOfKeys& codes, const PqAttentionOptions& options, const at::Tensor& logsumexp,
                  const at::Tensor& normalizer) {
  auto output = empty_with_layout_of(query, value.sym_size(3));
  if (output.numel() > 0) {
    attend(device, PqAttentionTensors(query, key, value, value.size(3), codes, options, Device::lay_out), output,
           logsumexp, normalizer);
  }
  return output;
}

template <typename Device>
at::Tensor pq_attention_on(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const CodesOfKeys& codes, const PqAttentionOptions& options) {
  check_pq_attention("pq_attention", query, key, value, codes, options);
  return attend(Device(query.device()), query, key, value, codes, options, {}, {});
}

template <typename Device>
std::tuple<at::Tensor, at::Tensor> pq_attention_lse_on(const at::Tensor& query, const at::Tensor& key,
                                                       const at::Tensor& value, const CodesOfKeys& codes,
                                                       const PqAttentionOptions& options) {
  check_pq_attention("pq_attention_lse", query, key, value, codes, options);
  const Device device(query.device());
  auto logsumexp = empty_logsumexp(query);
  auto output = attend(device, query, key, value, codes, options, logsumexp, {});
  return {output, logsumexp};
}

template <typename Device>
std::tuple<at::Tensor, at::Tensor, at::Tensor> pq_attention_forward_on(const at::Tensor& query, const at::Tensor& key,
                                                                       const at::Tensor& value,
                                                                       const CodesOfKeys& codes,
                                                                       const PqAttentionOptions& options) {
  check_pq_attention("_pq_attention_forward", query, key, value, codes, options);
  const Device device(query.device());
  auto logsumexp = empty_logsumexp(query), normalizer = empty_normalizer(query);
  auto output = attend(device, query, key, value, codes, options, logsumexp, normalizer);
  return {output, logsumexp, normalizer};
}

template <typename Device>
PqAttentionGradients pq_attention_backward_on(const PqAttentionBackward& args) {
  check_pq_attention_backward(args);
  const auto [query, key, value, key_bias, sink] = args.mask.wanted;
  const auto [grad_query, grad_key, grad_value, grad_key_bias, grad_sink, no_pair_bias] = gradients_over_lists(
      Device(args.normalizer.device()), args, args.options, std::nullopt,
      TopkMask{{{query, key, value, key_bias, sink, false}}}, [&](const at::Tensor& of_value) {
        return PqAttentionTensors(*args.query, *args.key, of_value, args.value_dim(),
                                  {*args.query_codes, *args.key_codes, args.k}, args.options, Device::lay_out);
      });
  return {grad_query, grad_key, grad_value, grad_key_bias, grad_sink};
}

}  // namespace torchops
