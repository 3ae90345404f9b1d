#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "core/tensors.h"
#include "routed_ffn/entries.h"
#include "routed_ffn/grouped_product.h"
#include "routed_ffn/slots.h"

// Rows that are sorted by block, and their products, for the host layers of every device.
//
// Device is a device: its functions take what kernels take.
//   run(GroupedProduct<T>), run(GroupedGradient<T>), run(Activate<T>), run(ActivateBackward<T>), run(SlotSums<T>),
//   run(SlotDots<T>), run(Placing), sort(Entries)

namespace torchops {

// [M, K] as rows; the row of a token for each choice of it, or the sorted rows themselves.
struct OperandRows {
  at::Tensor rows;
  bool are_tokens;
};

template <typename Device>
class GroupedRows {
 public:
  GroupedRows(at::Tensor order, at::Tensor offsets, int64_t num_slots)
      : order_(std::move(order)),
        offsets_(std::move(offsets)),
        tokens_(at::empty_like(order_)),
        places_(at::empty_like(order_)),
        num_slots_(num_slots) {
    Device::run(kernels::routed_ffn::Placing{order_.const_data_ptr<int32_t>(), order_.numel(),
                                             std::max<int64_t>(num_slots, 1), tokens_.mutable_data_ptr<int32_t>(),
                                             places_.mutable_data_ptr<int32_t>()});
  }

  // The same rows as one block, for a matrix that all blocks share.
  GroupedRows as_one_block() const {
    auto copy = *this;
    copy.offsets_ = offsets_.slice(0, 0, offsets_.size(0), offsets_.size(0) - 1).contiguous();
    return copy;
  }

  int64_t num_rows() const { return order_.numel(); }
  int64_t num_blocks() const { return offsets_.numel() - 1; }
  const int32_t* order() const { return order_.const_data_ptr<int32_t>(); }
  kernels::routed_ffn::Groups groups() const { return {offsets_.const_data_ptr<int32_t>(), num_blocks(), num_rows()}; }

  // A column of numbers by entry of the index, [T k], in the order of the rows: [M, 1].
  at::Tensor sorted(const at::Tensor& of_entries) const { return of_entries.index_select(0, order_).unsqueeze(1); }

  // The row of its token for each row: [T, C] -> [M, C]
  at::Tensor of_tokens(const at::Tensor& tokens) const { return tokens.index_select(0, tokens_); }

  // output [M, N] = bias + left right, of left's dtype or, for sums that are not rounded, of its accumulation dtype;
  // right is [G, K, N], with a unit stride or a copy's, bias [G, N].
  void multiply(const OperandRows& left, const at::Tensor& right, const std::optional<at::Tensor>& bias,
                const at::Tensor& output, bool adds = false) const {
    for_dtype(left.rows.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      const auto rows = with_contiguous_rows(left.rows);
      const auto matrices = with_a_unit_stride(right);
      const auto biases = bias ? with_contiguous_rows(*bias) : at::Tensor();
      const bool is_wide = output.scalar_type() != left.rows.scalar_type();
      Device::run(kernels::routed_ffn::GroupedProduct<T>{
          groups(), output.size(1), left.rows.size(1), sorted_rows<T>(rows, left.are_tokens),
          static_cast<const T*>(matrices.const_data_ptr()), matrices.stride(0), matrices.stride(1), matrices.stride(2),
          data_or_null<T>(biases), biases.defined() ? biases.stride(0) : 0,
          is_wide ? nullptr : static_cast<T*>(output.mutable_data_ptr()),
          is_wide ? static_cast<kernels::accumulate_t<T>*>(output.mutable_data_ptr()) : nullptr, output.stride(0),
          adds});
    });
  }

  at::Tensor product(const OperandRows& left, const at::Tensor& right,
                     const std::optional<at::Tensor>& bias = std::nullopt) const {
    const auto output = at::empty({num_rows(), right.size(2)}, left.rows.options());
    multiply(left, right, bias, output);
    return output;
  }

  // For each block the sum over its rows of left's row times right's, [G, A, B]: with the memory layout of `weight`
  // where that has no gaps.
  at::Tensor weight_gradient(const OperandRows& left, const OperandRows& right, const at::Tensor& weight) const {
    const auto output = at::empty_like(weight);
    if (output.stride(2) == 1 || output.size(2) == 1) {
      accumulate(left, right, output);
    } else if (output.stride(1) == 1) {
      accumulate(right, left, output.transpose(1, 2));
    } else {
      const auto contiguous = at::empty(output.sizes(), output.options());
      accumulate(left, right, contiguous);
      output.copy_(contiguous);
    }
    return output;
  }

  // For each block the sum of its rows, times scale [M, 1] if given: [G, N]
  at::Tensor sums(const OperandRows& rows, const std::optional<at::Tensor>& scale = std::nullopt) const {
    const auto ones = scale ? scale->to(rows.rows.dtype()) : at::ones({num_rows(), 1}, rows.rows.options());
    const auto output = at::empty({num_blocks(), 1, rows.rows.size(1)}, rows.rows.options());
    accumulate({ones, false}, rows, output);
    return output.squeeze(1);
  }

  // [M, C], of the accumulation dtype -> [T, C], each token's slots added up, times gate [T, k] if given.
  at::Tensor slot_sums(const at::Tensor& rows, const std::optional<at::Tensor>& gate,
                       const std::optional<at::Tensor>& bias, int64_t num_tokens, at::ScalarType dtype) const {
    const auto output = at::empty({num_tokens, rows.size(1)}, rows.options().dtype(dtype));
    for_dtype(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      using A = kernels::accumulate_t<T>;
      const auto biases = bias ? bias->contiguous() : at::Tensor();
      Device::run(kernels::routed_ffn::SlotSums<T>{
          groups(), output.size(0), num_slots_, output.size(1), static_cast<const A*>(rows.const_data_ptr()),
          places_.const_data_ptr<int32_t>(), data_or_null<A>(gate), data_or_null<T>(biases),
          static_cast<T*>(output.mutable_data_ptr())});
    });
    return output;
  }

  // dots [T k] += the products of rows [M, C], of the accumulation dtype, with their tokens' [T, C].
  void add_dots(const at::Tensor& rows, const at::Tensor& tokens, const at::Tensor& dots) const {
    for_dtype(tokens.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      using A = kernels::accumulate_t<T>;
      const auto of_tokens = with_contiguous_rows(tokens);
      Device::run(kernels::routed_ffn::SlotDots<T>{groups(), rows.size(1), static_cast<const A*>(rows.const_data_ptr()),
                                                   sorted_rows<T>(of_tokens, true), order(),
                                                   static_cast<A*>(dots.mutable_data_ptr())});
    });
  }

 private:
  at::Tensor order_;    // int32 [M]: of row i, its entry in index
  at::Tensor offsets_;  // int32 [G + 1]
  at::Tensor tokens_;   // int32 [M]: of row i
  at::Tensor places_;   // int32 [M]: of an entry, its row
  int64_t num_slots_;

  template <typename T>
  kernels::routed_ffn::SortedRows<T> sorted_rows(const at::Tensor& rows, bool are_tokens) const {
    return {static_cast<const T*>(rows.const_data_ptr()), rows.stride(0),
            are_tokens ? tokens_.const_data_ptr<int32_t>() : nullptr};
  }

  // Rows of one number that lie side by side could be one row, which is not what is gathered.
  OperandRows without_single_column(const OperandRows& operand) const {
    return operand.are_tokens && operand.rows.size(1) == 1
               ? OperandRows{of_tokens(operand.rows), false}
               : OperandRows{with_contiguous_rows(operand.rows), operand.are_tokens};
  }

  void accumulate(const OperandRows& left, const OperandRows& right, const at::Tensor& output) const {
    for_dtype(output.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      const auto [l, gathers_left] = without_single_column(left);
      const auto r = with_contiguous_rows(right.rows);
      Device::run(kernels::routed_ffn::GroupedGradient<T>{
          groups(), output.size(1), output.size(2), sorted_rows<T>(l, gathers_left),
          sorted_rows<T>(r, right.are_tokens), static_cast<T*>(output.mutable_data_ptr()), output.stride(0),
          output.stride(1)});
    });
  }
};

}  // namespace torchops
