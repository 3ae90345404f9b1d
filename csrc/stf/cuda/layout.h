#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

// How products with the sparse factor are laid out on CUDA.

namespace torchops {

// Up to here a product's time is that of reading the factor, and kernels gather what its nonzeros name.
inline constexpr int64_t few_tokens = 16;

// From there to here tiles of a packed factor of a 16-bit type become dense in shared memory, for matrix units. With
// more tokens, in other types, and where there are indices, which do not tell where a tile begins, the whole factor is
// written out, which is as large as the factor with its indices where a third to a half of it is nonzero, and torch
// multiplies.
inline constexpr int64_t some_tokens = 128;

// Calls body(std::integral_constant<int, tokens>{}) with the number of tokens that a block takes.
template <typename Body>
void for_token_tile(int64_t num_tokens, const Body& body) {
  if (num_tokens <= 1) {
    body(std::integral_constant<int, 1>{});
  } else if (num_tokens <= 4) {
    body(std::integral_constant<int, 4>{});
  } else {
    body(std::integral_constant<int, 8>{});
  }
}

// Threads of a block of kernels that have a thread per element.
inline constexpr unsigned threads_of_elements = 256;

constexpr int64_t divide_up(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

// How `count` rows (or groups of rows), in multiples of `unit`, are cut into parts such that there are enough blocks
// for a GPU, if each part has blocks_of_part of them. Depends on shapes alone, and so do the bits of the result.
struct Parts {
  int64_t size, count;

  Parts(int64_t to_cut, int64_t unit, int64_t blocks_of_part) {
    constexpr int64_t enough_blocks = 512;
    const int64_t wanted = divide_up(enough_blocks, std::max<int64_t>(blocks_of_part, 1));
    size = std::max(divide_up(divide_up(to_cut, wanted), unit) * unit, unit);
    count = std::max<int64_t>(divide_up(to_cut, size), 1);
  }
};

}  // namespace torchops
