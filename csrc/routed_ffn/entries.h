#pragma once

#include <cstdint>

namespace torchops::kernels::routed_ffn {

// Entries of an index are sorted by block in pieces, each of which counts its own first: their places follow from the
// counts of the pieces before. Entries that name no block are a block of their own, the last.
struct Entries {
  const int32_t* narrow;  // one of the two is null
  const int64_t* wide;
  int64_t num_entries;
  int64_t num_blocks;
  int32_t* counts;   // [pieces, num_blocks + 1]: scratch
  int32_t* order;    // [num_entries]
  int32_t* offsets;  // [num_blocks + 1]

  static constexpr int64_t of_piece = 2048;

  constexpr int64_t num_pieces() const { return num_entries < of_piece ? 1 : (num_entries + of_piece - 1) / of_piece; }
  constexpr int64_t begin_of(int64_t piece) const { return piece * of_piece; }
  constexpr int64_t end_of(int64_t piece) const {
    return num_entries - begin_of(piece) < of_piece ? num_entries : begin_of(piece) + of_piece;
  }
  constexpr int32_t* counts_of(int64_t piece) const { return counts + piece * (num_blocks + 1); }

  constexpr int64_t block_of(int64_t entry) const {
    const int64_t block = wide == nullptr ? int64_t{narrow[entry]} : wide[entry];
    return block >= 0 && block < num_blocks ? block : num_blocks;
  }
};

// Of rows in the order of their blocks: tokens[i] = order[i] / num_slots, places[order[i]] = i.
struct Placing {
  const int32_t* order;  // [num_rows]
  int64_t num_rows;
  int64_t num_slots;
  int32_t* tokens;  // [num_rows]
  int32_t* places;  // [num_rows]
};

}  // namespace torchops::kernels::routed_ffn
