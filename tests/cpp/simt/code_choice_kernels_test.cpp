// The CUDA kernel that chooses keys by codes on the host, next to the CPU kernel of the lowest level.

#include <algorithm>
#include <string>
#include <vector>

#include "catch.h"
#include "core/cpu/aligned_buffer.h"
#include "core/cuda/launch.h"
#include "numbers.h"
#include "orders.h"
#include "sparse_attention/cpu/code_choice_kernel.h"
#include "sparse_attention/cuda/choose_by_codes.cuh"

namespace torchops::kernels::sparse_attention {
namespace {

struct ChoiceShape {
  std::string name;
  int64_t num_queries, num_keys, num_subspaces, num_chosen, sink_keys, local_keys;
  bool is_causal, has_sides;
};
// Rows of the batch: 2; heads of queries and of keys: 2 and 1.
const std::vector<ChoiceShape> choices = {
    {"more than a block of keys", 3, 150, 8, 20, 0, 0, false, false},
    {"keys on both sides of a query", 20, 20, 1, 4, 0, 0, false, false},
    {"causal, with forced and hidden keys", 20, 20, 5, 6, 2, 3, true, true},
    {"fewer keys than are wanted", 4, 6, 4, 9, 0, 0, true, true},
    {"no codes", 2, 70, 0, 7, 1, 2, false, true},
    {"no keys", 2, 0, 3, 4, 0, 0, false, false},
};

}  // namespace

TEST_CASE("choose_by_codes") {
  constexpr int64_t batch = 2, num_heads = 2, num_kv_heads = 1;
  for (const auto& [name, num_queries, num_keys, num_subspaces, num_chosen, sink_keys, local_keys, is_causal,
                    has_sides] : choices) {
    CAPTURE(name);
    const auto codes_of = [](int64_t count, uint32_t seed) {
      std::vector<uint8_t> codes;
      for (const float number : simt::whole_numbers(static_cast<size_t>(count), seed)) {
        codes.push_back(static_cast<uint8_t>(static_cast<int>(number) & 3));
      }
      return codes;
    };
    const int64_t in_words = (num_subspaces + 3) / 4 * 4;
    const int64_t words = (num_keys + keys_of_word - 1) / keys_of_word * keys_of_word;
    const auto query_codes = codes_of(batch * num_heads * num_queries * in_words, 1);
    const auto key_codes = codes_of(batch * num_keys * num_subspaces, 2);
    // By key with codes that no query has behind the last one; by subspace, where further keys agree with everybody.
    std::vector<uint8_t> by_key, by_subspace(static_cast<size_t>(batch * num_subspaces * words));
    std::vector<uint8_t> seen, seen_in_words(static_cast<size_t>(batch * words), 0);
    for (int64_t row = 0; row < batch * num_keys; ++row) {
      const int64_t b = row / num_keys, key = row % num_keys;
      for (int64_t m = 0; m < in_words; ++m) {
        by_key.push_back(m < num_subspaces ? key_codes[row * num_subspaces + m] : 255);
        if (m < num_subspaces) {
          by_subspace[(b * num_subspaces + m) * words + key] = by_key.back();
        }
      }
      seen.push_back(row % 5 == 2 ? 0 : 255);
      seen_in_words[b * words + key] = seen.back();
    }
    const std::vector<int64_t> query_start = {num_keys - num_queries, 2}, key_start = {0, -3};
    std::vector<int32_t> indices;
    const auto arguments = [&](const std::vector<uint8_t>& codes, const std::vector<uint8_t>& visible, int64_t stride,
                               int64_t subspaces) {
      indices.assign(static_cast<size_t>(batch * num_heads * num_queries * num_chosen), -7);
      return CodeChoice{{query_codes.data(), num_heads * num_queries * in_words, num_queries * in_words, in_words},
                        codes.data(),
                        has_sides ? visible.data() : nullptr,
                        has_sides ? query_start.data() : nullptr,
                        has_sides ? key_start.data() : nullptr,
                        num_heads,
                        num_kv_heads,
                        num_queries,
                        num_keys,
                        stride,
                        subspaces,
                        num_chosen,
                        sink_keys,
                        local_keys,
                        is_causal};
    };
    const auto on_cpu = arguments(by_subspace, seen_in_words, words, num_subspaces);
    AlignedBuffer<char> scratch(static_cast<size_t>(baseline::choose_by_codes_scratch_bytes(on_cpu)));
    baseline::choose_by_codes(on_cpu, indices.data(), scratch.data(), 0,
                              batch * num_heads * ((num_queries + queries_of_choice - 1) / queries_of_choice));
    const auto expected = indices;
    const auto choose = [&](const QueryTile& tile, int32_t behind) {
      const auto args = arguments(by_key, seen, num_keys, in_words);
      indices.resize(static_cast<size_t>(batch * tile.num_heads * tile.num_queries * num_chosen));
      device::launch({batch * tile.num_heads * tile.num_queries, choice_threads, device::BlockMemory::bytes},
                     choose_by_codes, args, tile, indices.data(), behind);
      return indices;
    };
    REQUIRE(simt::same_in_every_order([&] { return choose({0, num_heads, 0, num_queries}, -1); }) == expected);
    // The second head's queries behind the first one.
    const QueryTile tile{1, 1, 1, num_queries - 1};
    const auto of_tile = choose(tile, no_key);
    std::vector<int32_t> expected_of_tile;
    for (int64_t b = 0; b < batch; ++b) {
      const auto lists = expected.begin() + (b * num_heads + 1) * num_queries * num_chosen;
      expected_of_tile.insert(expected_of_tile.end(), lists + num_chosen, lists + num_queries * num_chosen);
    }
    std::replace(expected_of_tile.begin(), expected_of_tile.end(), -1, no_key);
    REQUIRE(of_tile == expected_of_tile);
  }
}

}  // namespace torchops::kernels::sparse_attention
