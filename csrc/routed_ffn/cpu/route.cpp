#include "routed_ffn/route.h"

#include <algorithm>
#include <utility>

#include "core/library.h"
#include "core/parallel.h"
#include "routed_ffn/cpu/device.h"

namespace torchops {
namespace {

// Counts become the places of each piece's first entry of each block.
void place(const kernels::routed_ffn::Entries& entries) {
  int32_t placed = 0;
  for (int64_t block = 0; block <= entries.num_blocks; ++block) {
    entries.offsets[block] = placed;
    for (int64_t piece = 0; piece < entries.num_pieces(); ++piece) {
      int32_t& count = entries.counts_of(piece)[block];
      placed += std::exchange(count, placed);
    }
  }
}

std::tuple<at::Tensor, at::Tensor> route_cpu(const at::Tensor& index, int64_t num_blocks) {
  return route_by(index, num_blocks, sort_entries);
}

}  // namespace

void sort_entries(const kernels::routed_ffn::Entries& entries) {
  const auto for_each_piece = [&](const auto& body) {
    parallel_units(entries.num_pieces(), 2 * entries.of_piece, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        for (int64_t entry = entries.begin_of(piece); entry < entries.end_of(piece); ++entry) {
          body(entry, entries.counts_of(piece)[entries.block_of(entry)]);
        }
      }
    });
  };
  std::fill_n(entries.counts, entries.num_pieces() * (entries.num_blocks + 1), 0);
  for_each_piece([](int64_t, int32_t& count) { ++count; });
  place(entries);
  for_each_piece([&](int64_t entry, int32_t& next) { entries.order[next++] = static_cast<int32_t>(entry); });
}

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("route", route_cpu);
}

}  // namespace torchops
