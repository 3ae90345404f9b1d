#pragma once

#include "core/attention/cpu/rows.h"
#include "core/cpu/arena.h"
#include "core/cpu/elements.h"

// The tiles that the CPU's kernels cut queries and keys into.

namespace torchops::kernels::inline TORCHOPS_LEVEL {

inline constexpr int64_t query_tile = 64;
// About as many keys, whole panels and whole tiles of registers: 64, or 72 where panels have 6, 12 or 24.
template <typename E>
inline constexpr int64_t key_tile = 64 % panel_columns<sum_t<E>> == 0 ? 64 : 72;
static_assert(key_tile<float> % panel_columns<float> == 0 && key_tile<double> % panel_columns<double> == 0);
static_assert(query_tile % tile_rows == 0 && key_tile<float> % tile_rows == 0 && key_tile<double> % tile_rows == 0);

// Columns of a right operand: whole vectors.
template <typename E>
constexpr int64_t columns_of(int64_t size) {
  return round_up(size, vector_bytes / static_cast<int64_t>(sizeof(E)));
}

// The keys that each row of a tile sees; none for rows behind the last. Both ends of a range rise with the row; rows of
// another head begin anew.
struct TileRanges {
  attention::Range keys[query_tile] = {};

  // Whether every query sees all keys of [begin, end).
  bool all_visible(int64_t begin, int64_t end, int64_t num_rows) const {
    return keys[num_rows - 1].begin <= begin && end <= keys[0].end;
  }

  // Leaves the numbers of what a query sees, in vectors from key `first` on, and makes the others `other`.
  template <typename A, int vectors>
  void hide(int64_t row, int64_t first, vec<A> (&numbers)[vectors], A other) const {
    using Lane = typename lane_index<sizeof(A)>::type;
    constexpr int64_t lane_count = vector_bytes / static_cast<int64_t>(sizeof(A));
    const vec<A> hidden = broadcast(other);
    for (int v = 0; v < vectors; ++v) {
      const int64_t begin = attention::clamp(keys[row].begin - first - v * lane_count, 0, lane_count);
      const int64_t end = attention::clamp(keys[row].end - first - v * lane_count, 0, lane_count);
      const vec<Lane> lane = lane_numbers<Lane>();
      numbers[v] = (lane >= static_cast<Lane>(begin)) & (lane < static_cast<Lane>(end)) ? numbers[v] : hidden;
    }
  }
};

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
