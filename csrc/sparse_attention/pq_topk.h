#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

// What pq_topk takes, and its checks.

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

void check_pq_topk(const char* op, const at::Tensor& query_codes, const at::Tensor& key_codes,
                   const PqTopkOptions& options);
at::Tensor empty_choice(const at::Tensor& query_codes, const PqTopkOptions& options);

}  // namespace torchops
