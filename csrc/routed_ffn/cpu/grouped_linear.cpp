#include "routed_ffn/grouped_linear.h"

#include <vector>

#include "core/library.h"
#include "routed_ffn/cpu/device.h"

namespace torchops {

void check_grouping(const char* op, const at::Tensor& order, const at::Tensor& offsets) {
  const int64_t num_rows = order.numel(), num_blocks = offsets.numel() - 1;
  const auto* const rows = order.const_data_ptr<int32_t>();
  std::vector<bool> seen(static_cast<size_t>(num_rows));
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t entry = rows[row];
    TORCH_CHECK_VALUE(entry >= 0 && entry < num_rows && !seen[static_cast<size_t>(entry)], op,
                      ": expected order to be a permutation of 0..M - 1 = ", num_rows - 1, ", got ", entry, " at ", row,
                      entry >= 0 && entry < num_rows ? " again" : "");
    seen[static_cast<size_t>(entry)] = true;
  }
  const auto* const ends = offsets.const_data_ptr<int32_t>();
  int32_t last = 0;
  for (int64_t block = 0; block <= num_blocks; ++block) {
    TORCH_CHECK_VALUE(ends[block] >= last && ends[block] <= num_rows && (block > 0 || ends[block] == 0), op,
                      ": expected offsets to ascend from 0 to M = ", num_rows, " at most, got ", ends[block], " at ",
                      block);
    last = ends[block];
  }
}

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("grouped_linear", grouped_linear_on<RoutedFfnOnCpu>);
  m.impl("_grouped_linear_backward", flattened<grouped_linear_backward_on<RoutedFfnOnCpu>>);
}

}  // namespace torchops
