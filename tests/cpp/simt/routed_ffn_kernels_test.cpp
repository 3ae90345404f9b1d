// The CUDA kernels of the routed_ffn family on the host.

#include <algorithm>
#include <vector>

#include "catch.h"
#include "core/cuda/launch.h"
#include "orders.h"
#include "routed_ffn/cuda/sort_entries.cuh"

namespace torchops::kernels::routed_ffn {

TEST_CASE("route sorts entries by block and keeps their order") {
  struct Shape {
    int64_t num_entries, num_blocks;
  };
  // A warp has a piece of 2048 entries, and a block four of them.
  for (const auto& [num_entries, num_blocks] : std::vector<Shape>{{300, 3}, {2100, 40}, {9000, 5}, {0, 2}, {70, 300}}) {
    CAPTURE(num_entries, num_blocks);
    std::vector<int64_t> index;
    for (int64_t entry = 0; entry < num_entries; ++entry) {
      index.push_back(entry * entry % 11 * 7 % (num_blocks + 2) - 1);
    }
    const auto both = simt::same_in_every_order([&] {
      std::vector<int32_t> result(static_cast<size_t>(num_entries + num_blocks + 1), -7);
      Entries entries{
          nullptr, index.data(), num_entries, num_blocks, nullptr, result.data(), result.data() + num_entries};
      std::vector<int32_t> counts(static_cast<size_t>(entries.num_pieces() * (num_blocks + 1)), 77);
      entries.counts = counts.data();
      const int64_t blocks = (entries.num_pieces() + pieces_of_block - 1) / pieces_of_block;
      constexpr int threads = pieces_of_block * device::warp_size;
      device::launch({.grid = blocks, .block = threads}, count_entries, entries);
      device::launch({1, place_threads, device::shared_size<int32_t>(device::max_warps)}, place_pieces, entries);
      device::launch({.grid = blocks, .block = threads}, order_entries, entries);
      return result;
    });
    const auto block_of = [&](int64_t entry) {
      const int64_t block = index[static_cast<size_t>(entry)];
      return block >= 0 && block < num_blocks ? block : num_blocks;
    };
    std::vector<int32_t> expected;
    for (int32_t entry = 0; entry < num_entries; ++entry) {
      expected.push_back(entry);
    }
    std::stable_sort(expected.begin(), expected.end(),
                     [&](int32_t one, int32_t other) { return block_of(one) < block_of(other); });
    for (int64_t block = 0; block <= num_blocks; ++block) {
      expected.push_back(static_cast<int32_t>(std::count_if(expected.begin(), expected.begin() + num_entries,
                                                            [&](int32_t entry) { return block_of(entry) < block; })));
    }
    CHECK(both == expected);
  }
}

}  // namespace torchops::kernels::routed_ffn
