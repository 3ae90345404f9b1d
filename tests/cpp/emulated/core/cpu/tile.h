#pragma once

#include <cstdint>

#include "core/cpu/intrinsics.h"

// csrc/core/cpu/tile.h on arrays.

#define TILE_FUNCTION inline

namespace torchops::kernels::inline TORCHOPS_LEVEL {

class Tiles {
 public:
  // What neither a load nor a zero wrote is NaN.
  Tiles() { __builtin_memset(tiles_, 0xff, sizeof(tiles_)); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int tile>
  void zero() {
    __builtin_memset(tiles_[tile], 0, sizeof(tiles_[tile]));
  }
  template <int tile>
  void load(const void* from, int64_t stride) {
    for (int row = 0; row < 16; ++row) {
      __builtin_memcpy(tiles_[tile][row], static_cast<const char*>(from) + row * stride, 64);
    }
  }
  template <int tile>
  void store(void* to, int64_t stride) {
    for (int row = 0; row < 16; ++row) {
      __builtin_memcpy(static_cast<char*>(to) + row * stride, tiles_[tile][row], 64);
    }
  }
  template <int sums, int left, int right>
  void multiply_add() {
    static_assert(sums != left && sums != right && left != right, "an illegal instruction");
    // [pair][column]: the numbers of the right operand as floats.
    Sixteen even[16], odd[16];
    for (int pair = 0; pair < 16; ++pair) {
      spread(tiles_[right][pair], &even[pair], &odd[pair]);
    }
    for (int row = 0; row < 16; ++row) {
      Sixteen left_even, left_odd, sum_even = {}, sum_odd = {}, total;
      spread(tiles_[left][row], &left_even, &left_odd);
      for (int pair = 0; pair < 16; ++pair) {
        sum_even = flush(sum_even + left_even[pair] * even[pair]);
        sum_odd = flush(sum_odd + left_odd[pair] * odd[pair]);
      }
      __builtin_memcpy(&total, tiles_[sums][row], sizeof(total));
      total = flush(flush(total) + flush(sum_even + sum_odd));
      __builtin_memcpy(tiles_[sums][row], &total, sizeof(total));
    }
  }

 private:
  typedef float Sixteen __attribute__((vector_size(64)));
  typedef uint32_t Words __attribute__((vector_size(64)));

  static Sixteen flush(Sixteen numbers) {
    Words bits;
    __builtin_memcpy(&bits, &numbers, sizeof(bits));
    bits = (bits & 0x7f800000) == 0 ? bits & 0x80000000 : bits;
    __builtin_memcpy(&numbers, &bits, sizeof(bits));
    return numbers;
  }
  // The first and the second numbers of 16 pairs.
  static void spread(const unsigned char* row, Sixteen* first, Sixteen* second) {
    Words pairs;
    __builtin_memcpy(&pairs, row, sizeof(pairs));
    const Words low = pairs << 16, high = pairs & 0xffff0000;
    __builtin_memcpy(first, &low, sizeof(low));
    __builtin_memcpy(second, &high, sizeof(high));
    *first = flush(*first);
    *second = flush(*second);
  }

  unsigned char tiles_[8][16][64];
};

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
