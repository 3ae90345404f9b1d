#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "core/tensors.h"
#include "sparse_attention/code_choice.h"
#include "sparse_attention/pq_topk.h"

namespace torchops {

// What a device's kernel reads codes from.
struct CodeLayout {
  at::Tensor query_codes;  // [B, Hq, Lq, num_subspaces]
  at::Tensor key_codes;    // contiguous
  int64_t num_subspaces;
  int64_t key_stride;
};

// The tensors of a choice as kernels read them, kept alive for as long as their arguments are used.
class CodeTensors {
 public:
  // lay_out(query_codes, key_codes) is a CodeLayout.
  template <typename LayOut>
  CodeTensors(const at::Tensor& query_codes, const at::Tensor& key_codes, const PqTopkOptions& options,
              const LayOut& lay_out)
      : layout_(lay_out(query_codes, key_codes)),
        query_start_(contiguous_or_undefined(options.query_start, at::kLong)),
        key_start_(contiguous_or_undefined(options.key_start, at::kLong)),
        num_kv_heads_(key_codes.size(1)),
        num_keys_(key_codes.size(2)),
        sink_keys_(options.sink_keys.expect_int()),
        local_keys_(options.local_keys.expect_int()),
        is_causal_(options.is_causal) {
    if (options.key_bias) {
      seen_ = at::zeros({query_codes.size(0), layout_.key_stride}, query_codes.options());
      seen_.narrow(1, 0, num_keys_).masked_fill_(options.key_bias->ne(-std::numeric_limits<double>::infinity()), 255);
    }
  }

  kernels::sparse_attention::CodeChoice arguments(int64_t num_chosen) const {
    const at::Tensor& query_codes = layout_.query_codes;
    return {heads<uint8_t>(query_codes),
            layout_.key_codes.const_data_ptr<uint8_t>(),
            data_or_null<uint8_t>(seen_),
            data_or_null<int64_t>(query_start_),
            data_or_null<int64_t>(key_start_),
            query_codes.size(1),
            num_kv_heads_,
            query_codes.size(2),
            num_keys_,
            layout_.key_stride,
            layout_.num_subspaces,
            num_chosen,
            sink_keys_,
            local_keys_,
            is_causal_};
  }

 private:
  CodeLayout layout_;
  at::Tensor query_start_, key_start_, seen_;
  int64_t num_kv_heads_, num_keys_, sink_keys_, local_keys_;
  bool is_causal_;
};

}  // namespace torchops
