#pragma once

#include "core/cpu/dense_product_kernel.h"
#include "core/cpu/dense_product_packing.h"

// How products of blocks cut their work, and what they make of sums.

namespace torchops::kernels::core::TORCHOPS_LEVEL {

// Count in pieces that are multiples of `unit` and of about the same size.
struct Pieces {
  int64_t size;
  int64_t count;

  Pieces(int64_t total, int64_t most, int64_t unit) {
    const int64_t wanted = divide_up(total, most);
    size = round_up(divide_up(total, wanted), unit);
    count = divide_up(total, size);
  }
};

// Writes `count` sums, plus the bias, to the output from [row, column] on.
template <typename T>
inline __attribute__((always_inline)) void finish(const DenseProduct<T>& args, int64_t batch, int64_t row,
                                                  int64_t column, const accumulate_t<T>* sums, int64_t count) {
  const int64_t place = batch * args.output_batch_stride + row * args.output_row_stride + column;
  const T* const bias = args.bias == nullptr ? nullptr : args.bias + batch * args.bias_batch_stride + column;
  const auto write = [&](auto* to) {
    for_each_vector<T>(count, [&](int64_t first, int used) {
      auto sum = load(sums + first);
      if (bias != nullptr) {
        sum += load_piece(bias + first, used);
      }
      if (args.adds) {
        sum += load_piece(to + first, used);
      }
      store_piece(to + first, sum, used);
    });
  };
  if (args.wide_output != nullptr) {
    write(args.wide_output + place);
  } else {
    write(args.output + place);
  }
}

#if defined(__AVX512BF16__)
// The same of the sums that products on tiles give. A whole block is rounded by the instruction for it, which makes
// zeros of denormal numbers, as tiles do.
inline __attribute__((always_inline)) void finish_on_tiles(const DenseProduct<bfloat16>& args, int64_t batch,
                                                           int64_t row, int64_t column, const float* sums,
                                                           int64_t count) {
  if (count != 2 * lanes<float> || args.bias != nullptr || args.adds || args.output == nullptr) {
    return finish(args, batch, row, column, sums, count);
  }
  bfloat16* const to = args.output + batch * args.output_batch_stride + row * args.output_row_stride + column;
  store_pairs(reinterpret_cast<bfloat16_pair*>(to), load(sums), load(sums + lanes<float>));
}
#endif

}  // namespace torchops::kernels::core::TORCHOPS_LEVEL
