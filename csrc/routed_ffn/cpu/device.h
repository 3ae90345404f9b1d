#pragma once

#include <ATen/core/Tensor.h>

#include "core/cpu/product_list.h"
#include "routed_ffn/cpu/activation_kernel.h"
#include "routed_ffn/cpu/slots_kernel.h"
#include "routed_ffn/entries.h"
#include "routed_ffn/grouped_product.h"

// What grouped_rows.h asks of a device, on the CPU: products are lists of dense ones, one for each group.

namespace torchops {

void sort_entries(const kernels::routed_ffn::Entries& entries);

// A ValueError unless order is a permutation, and offsets ascend from 0 to its length at most.
void check_grouping(const char* op, const at::Tensor& order, const at::Tensor& offsets);

struct RoutedFfnOnCpu {
  static void sort(const kernels::routed_ffn::Entries& entries) { sort_entries(entries); }
  static void check_order(const char* op, const at::Tensor& order, const at::Tensor& offsets) {
    check_grouping(op, order, offsets);
  }

  static void run(const kernels::routed_ffn::Placing& args) {
    for (int64_t row = 0; row < args.num_rows; ++row) {
      args.tokens[row] = static_cast<int32_t>(args.order[row] / args.num_slots);
      args.places[args.order[row]] = static_cast<int32_t>(row);
    }
  }

  template <typename T>
  static void run(const kernels::routed_ffn::GroupedProduct<T>& args) {
    ProductList<T> products;
    for (int64_t group = 0; group < args.groups.count; ++group) {
      const int64_t first = args.groups.offsets[group];
      products.add({1,
                    args.groups.offsets[group + 1] - first,
                    args.num_columns,
                    args.depth,
                    rows_from(args.left, first),
                    {args.right + group * args.right_group_stride, 0, args.depth_stride, args.column_stride},
                    args.bias == nullptr ? nullptr : args.bias + group * args.bias_stride,
                    0,
                    args.output == nullptr ? nullptr : args.output + first * args.output_stride,
                    0,
                    args.output_stride,
                    args.wide_output == nullptr ? nullptr : args.wide_output + first * args.output_stride,
                    args.adds});
    }
    products.run();
    for (int64_t row = args.groups.offsets[args.groups.count]; row < args.groups.num_rows && !args.adds; ++row) {
      if (args.output != nullptr) {
        std::fill_n(args.output + row * args.output_stride, args.num_columns, T{});
      } else {
        std::fill_n(args.wide_output + row * args.output_stride, args.num_columns, kernels::accumulate_t<T>{});
      }
    }
  }

  template <typename T>
  static void run(const kernels::routed_ffn::GroupedGradient<T>& args) {
    ProductList<T> products;
    for (int64_t group = 0; group < args.groups.count; ++group) {
      const int64_t first = args.groups.offsets[group];
      auto left = rows_from(args.left, first);
      std::swap(left.row_stride, left.column_stride);
      products.add({1, args.num_rows, args.num_columns, args.groups.offsets[group + 1] - first, left,
                    rows_from(args.right, first), nullptr, 0, args.output + group * args.output_group_stride, 0,
                    args.output_row_stride});
    }
    products.run();
  }

  template <typename T>
  static void run(const kernels::routed_ffn::Activate<T>& args) {
    // Rounded preactivations are an output: no row of them stays unwritten.
    const int64_t rows =
        args.wide_preactivation == nullptr ? args.groups.offsets[args.groups.count] : args.groups.num_rows;
    parallel_units(rows, 8 * args.size,
                   [&](int64_t begin, int64_t end) { TORCHOPS_KERNEL(routed_ffn, activate<T>)(args, begin, end); });
  }
  template <typename T>
  static void run(const kernels::routed_ffn::ActivateBackward<T>& args) {
    for_rows(args.groups, 16 * args.size,
             [&](int64_t begin, int64_t end) { TORCHOPS_KERNEL(routed_ffn, activate_backward<T>)(args, begin, end); });
  }
  template <typename T>
  static void run(const kernels::routed_ffn::SlotSums<T>& args) {
    parallel_units(args.num_tokens, args.size * (args.num_slots + 1),
                   [&](int64_t begin, int64_t end) { TORCHOPS_KERNEL(routed_ffn, slot_sums<T>)(args, begin, end); });
  }
  template <typename T>
  static void run(const kernels::routed_ffn::SlotDots<T>& args) {
    for_rows(args.groups, args.size,
             [&](int64_t begin, int64_t end) { TORCHOPS_KERNEL(routed_ffn, slot_dots<T>)(args, begin, end); });
  }

 private:
  template <typename T>
  static kernels::core::Matrices<T> rows_from(const kernels::routed_ffn::SortedRows<T>& rows, int64_t first) {
    return rows.lines == nullptr ? kernels::core::Matrices<T>{rows.data + first * rows.stride, 0, rows.stride, 1}
                                 : kernels::core::Matrices<T>{rows.data, 0, rows.stride, 1, rows.lines + first};
  }

  template <typename Body>
  static void for_rows(const kernels::routed_ffn::Groups& groups, int64_t cost, const Body& body) {
    parallel_units(groups.offsets[groups.count], cost, body);
  }
};

}  // namespace torchops
