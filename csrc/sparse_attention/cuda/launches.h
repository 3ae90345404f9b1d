#pragma once

#include <cstdint>

#include "sparse_attention/attention.h"
#include "sparse_attention/code_choice.h"
#include "sparse_attention/nearest_codeword.h"
#include "sparse_attention/quantization_loss.h"

// What the host layer has to know of the kernels, and how it starts them.

namespace torchops::kernels::sparse_attention {

// Heads whose lists are sorted: those of pair_bias, or of the lists where there is none.
template <typename T>
int64_t sorted_heads(const Attention<T>& inputs) {
  return inputs.pair_bias == nullptr ? inputs.lists.num_heads : inputs.bias_heads;
}

// Lists in ascending order, entries without keys at their ends.
struct SortedLists {
  int32_t* begins;  // [B, sorted_heads, Nq, k]: the first key of each entry
  int32_t* places;  // [B, sorted_heads, Nq, k]: where it stands in the caller's list
  int64_t num_heads;

  template <typename T>
  constexpr int64_t first_of(const Attention<T>& inputs, int64_t batch, int64_t head, int64_t list) const {
    const int64_t own = head / (inputs.sizes.num_heads / num_heads);
    return ((batch * num_heads + own) * inputs.lists.num_lists + list) * inputs.lists.num_listed;
  }
};

template <typename T>
void launch_sort_lists(const Attention<T>& inputs, const SortedLists& sorted);

template <typename T>
void launch_forward(const AttentionForward<T>& args, const SortedLists& sorted);

template <typename T>
void launch_row_delta(const RowDelta<T>& args);

// args.grad_query or grad_pair_bias is wanted.
template <typename T>
void launch_query_gradient(const AttentionBackward<T>& args, const SortedLists& sorted);

// One of args.grad_key, grad_value and grad_key_bias is wanted.
template <typename T>
void launch_key_gradient(const AttentionBackward<T>& args, const SortedLists& sorted);

template <typename T>
void launch_nearest_codeword(const NearestCodeword<T>& args);

void launch_choose_by_codes(const CodeChoice& args, int64_t batch);

template <typename T>
void launch_quantization_loss(const QuantizationLoss<T>& args);

// One of args.grad_input and grad_codewords is wanted.
template <typename T>
void launch_quantization_gradient(const QuantizationGradient<T>& args);

}  // namespace torchops::kernels::sparse_attention
