#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <optional>
#include <tuple>

#include "core/tensors.h"
#include "sparse_attention/code_choice.h"

// What pq_topk does on every device.

namespace torchops {

// The arguments behind query_codes and key_codes.
struct PqTopkOptions {
  const c10::SymInt& k;
  const std::optional<at::Tensor>& key_bias;     // [B, Lk]
  const std::optional<at::Tensor>& query_start;  // [B]
  const std::optional<at::Tensor>& key_start;    // [B]
  bool is_causal;
  const c10::SymInt& sink_keys;
  const c10::SymInt& local_keys;

  auto members() const { return std::tie(k, key_bias, query_start, key_start, is_causal, sink_keys, local_keys); }
};

void check_pq_topk(const at::Tensor& query_codes, const at::Tensor& key_codes, const PqTopkOptions& options);
at::Tensor empty_choice(const at::Tensor& query_codes, const PqTopkOptions& options);

// What a device's kernel reads codes from.
struct CodeLayout {
  at::Tensor query_codes;  // [B, Hq, Lq, num_subspaces]
  at::Tensor key_codes;    // contiguous
  int64_t num_subspaces;
  int64_t key_stride;
};

// lay_out(query_codes, key_codes) is a CodeLayout, and launch(args, batch) starts the kernel.
template <typename LayOut, typename Launch>
at::Tensor pq_topk_on_device(const at::Tensor& query_codes, const at::Tensor& key_codes, const PqTopkOptions& options,
                             const LayOut& lay_out, const Launch& launch) {
  check_pq_topk(query_codes, key_codes, options);
  const auto indices = empty_choice(query_codes, options);
  if (indices.numel() == 0) {
    return indices;
  }
  const CodeLayout layout = lay_out(query_codes, key_codes);
  const auto query_start = contiguous_or_undefined(options.query_start, at::kLong),
             key_start = contiguous_or_undefined(options.key_start, at::kLong);
  at::Tensor seen;
  if (options.key_bias) {
    seen = at::zeros({query_codes.size(0), layout.key_stride}, query_codes.options());
    seen.narrow(1, 0, key_codes.size(2))
        .masked_fill_(options.key_bias->ne(-std::numeric_limits<double>::infinity()), 255);
  }
  launch(
      kernels::sparse_attention::CodeChoice{
          heads<uint8_t>(layout.query_codes), layout.key_codes.const_data_ptr<uint8_t>(), data_or_null<uint8_t>(seen),
          data_or_null<int64_t>(query_start), data_or_null<int64_t>(key_start), indices.mutable_data_ptr<int32_t>(),
          query_codes.size(1), key_codes.size(1), query_codes.size(2), key_codes.size(2), layout.key_stride,
          layout.num_subspaces, indices.size(3), options.sink_keys.expect_int(), options.local_keys.expect_int(),
          options.is_causal},
      query_codes.size(0));
  return indices;
}

}  // namespace torchops
