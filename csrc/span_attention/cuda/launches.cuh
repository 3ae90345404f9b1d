#pragma once

#include <algorithm>
#include <type_traits>

#include "core/cuda/launch.h"
#include "core/cuda/tiles.h"
#include "span_attention/cuda/decode.cuh"
#include "span_attention/cuda/forward_fma.cuh"
#include "span_attention/cuda/forward_mma.cuh"
#include "span_attention/cuda/key_gradient_fma.cuh"
#include "span_attention/cuda/key_gradient_mma.cuh"
#include "span_attention/cuda/launches.h"
#include "span_attention/cuda/query_gradient_fma.cuh"
#include "span_attention/cuda/query_gradient_mma.cuh"
#include "span_attention/cuda/row_delta.cuh"

// Which kernel, in which size, on which grid.

namespace torchops::kernels::span_attention {

template <int value>
using int_constant = std::integral_constant<int, value>;

// Whether rows of `size` elements begin at multiples of 16 bytes and have a multiple of 16 bytes.
template <typename T>
bool is_wide(const Heads<T>& heads, int64_t size) {
  constexpr int64_t width = device::widest<std::remove_const_t<T>>;
  return reinterpret_cast<uintptr_t>(heads.data) % 16 == 0 && heads.batch_stride % width == 0 &&
         heads.head_stride % width == 0 && heads.row_stride % width == 0 && size % width == 0;
}
template <typename T>
bool is_wide(const Attention<T>& inputs) {
  return is_wide(inputs.query, inputs.sizes.head_dim) && is_wide(inputs.key, inputs.sizes.head_dim) &&
         is_wide(inputs.value, inputs.sizes.value_dim);
}

// Calls body with the number of slices that a kernel is compiled for.
template <typename Body>
void for_slices(int64_t size, const Body& body) {
  switch (num_slices(size)) {
    case 1:
      return body(int_constant<1>{});
    case 2:
      return body(int_constant<2>{});
    default:
      return body(int_constant<4>{});
  }
}

// Calls body with the lengths of rows of queries and of values that a kernel on matrix units is compiled for.
template <typename Body>
void for_head_dims(const Sizes& sizes, const Body& body) {
  const int64_t longest = std::max(sizes.head_dim, sizes.value_dim);
  if (longest <= 64) {
    body(int_constant<64>{}, int_constant<64>{});
  } else if (longest <= 128) {
    body(int_constant<128>{}, int_constant<128>{});
  } else if (sizes.head_dim <= 192 && sizes.value_dim <= 128) {
    body(int_constant<192>{}, int_constant<128>{});
  } else {
    body(int_constant<256>{}, int_constant<256>{});
  }
}

template <typename T>
inline constexpr bool on_matrix_units = sizeof(T) == 2;

template <typename T>
void launch_forward(const AttentionForward<T>& args) {
  const Sizes& sizes = args.inputs.sizes;
  const bool wide = is_wide(args.inputs) && is_wide(args.output, sizes.value_dim);
  const int64_t heads = sizes.batch * sizes.num_heads;
  if constexpr (on_matrix_units<T>) {
    for_head_dims(sizes, [&](auto d, auto v) {
      using Tile = ForwardTile<d(), v()>;
      device::launch(
          {heads * device::tiles_of(sizes.num_queries, Tile::queries), mma_threads, Tile::template shared_bytes<T>},
          forward_mma<T, d(), v()>, args, wide);
    });
  } else {
    for_slices(sizes.value_dim, [&](auto slices) {
      using Slices = ForwardSlices<T, slices()>;
      device::launch(
          {heads * device::tiles_of(sizes.num_queries, Slices::tile), device::fma_threads, Slices::shared_bytes},
          forward_fma<T, slices()>, args, wide);
    });
  }
}

template <typename T>
void launch_decode(const AttentionForward<T>& args, const DecodePartials<accumulate_t<T>>& partials) {
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const int64_t units = sizes.batch * sizes.num_kv_heads * decode_row_tiles(sizes) * partials.pieces;
  const bool aligned = is_wide(inputs.key, sizes.head_dim) && is_wide(inputs.value, sizes.value_dim);
  const auto launch = [&](auto width, auto rows) {
    device::launch({units, decode_threads, decode_shared_bytes<accumulate_t<T>, rows()>},
                   decode_piece<T, width(), rows()>, inputs, partials, aligned);
  };
  const auto with_width = [&](auto width) {
    rows_of(sizes) == 1 ? launch(width, int_constant<1>{}) : launch(width, int_constant<most_decode_rows>{});
  };
  constexpr int widest = device::widest<T>;
  sizes.head_dim % widest == 0 && sizes.value_dim % widest == 0 ? with_width(int_constant<widest>{})
                                                                : with_width(int_constant<1>{});
  device::launch({sizes.batch * sizes.num_heads * sizes.num_queries, decode_threads}, decode_merge<T>, args, partials);
}

template <typename T>
void launch_query_gradient(const AttentionBackward<T>& args) {
  const Sizes& sizes = args.inputs.sizes;
  const bool wide =
      is_wide(args.inputs) && is_wide(args.grad_output, sizes.value_dim) && is_wide(args.grad_query, sizes.head_dim);
  const int64_t heads = sizes.batch * sizes.num_heads;
  if constexpr (on_matrix_units<T>) {
    for_head_dims(sizes, [&](auto d, auto v) {
      using Tile = QueryGradientTile<d(), v()>;
      device::launch(
          {heads * device::tiles_of(sizes.num_queries, Tile::queries), mma_threads, Tile::template shared_bytes<T>},
          query_gradient_mma<T, d(), v()>, args, wide);
    });
  } else {
    for_slices(sizes.head_dim, [&](auto slices) {
      using Slices = QueryGradientSlices<T, slices()>;
      device::launch(
          {heads * device::tiles_of(sizes.num_queries, Slices::tile), device::fma_threads, Slices::shared_bytes},
          query_gradient_fma<T, slices()>, args, wide);
    });
  }
}

template <typename T>
void launch_key_gradient(const AttentionBackward<T>& args) {
  const Sizes& sizes = args.inputs.sizes;
  const bool wide = is_wide(args.inputs) && is_wide(args.grad_output, sizes.value_dim) &&
                    is_wide(args.grad_key, sizes.head_dim) && is_wide(args.grad_value, sizes.value_dim);
  const int64_t heads = sizes.batch * sizes.num_kv_heads;
  if constexpr (on_matrix_units<T>) {
    for_head_dims(sizes, [&](auto d, auto v) {
      using Tile = KeyGradientTile<d(), v()>;
      device::launch(
          {heads * device::tiles_of(sizes.num_keys, Tile::keys), mma_threads, Tile::template shared_bytes<T>},
          key_gradient_mma<T, d(), v()>, args, wide);
    });
  } else {
    for_slices(std::max(sizes.head_dim, sizes.value_dim), [&](auto slices) {
      using Slices = KeyGradientSlices<T, slices()>;
      device::launch(
          {heads * device::tiles_of(sizes.num_keys, Slices::tile), device::fma_threads, Slices::shared_bytes},
          key_gradient_fma<T, slices()>, args, wide);
    });
  }
}

template <typename T>
void launch_row_delta(const RowDelta<T>& args) {
  const Sizes& sizes = args.sizes;
  const bool wide = is_wide(args.grad_output, sizes.value_dim) && is_wide(args.output, sizes.value_dim);
  if constexpr (on_matrix_units<T>) {
    const auto launch = [&](auto v) {
      const int64_t tiles = sizes.batch * sizes.num_heads * device::tiles_of(sizes.num_queries, row_delta_tile);
      device::launch({tiles, mma_threads, row_delta_bytes<T, v()>}, row_delta_mma<T, v()>, args, wide);
    };
    sizes.value_dim <= 64    ? launch(int_constant<64>{})
    : sizes.value_dim <= 128 ? launch(int_constant<128>{})
                             : launch(int_constant<256>{});
  } else {
    const auto launch = [&](auto width) {
      const int64_t rows = sizes.batch * sizes.num_heads * sizes.num_queries;
      device::launch({device::tiles_of(rows, row_delta_threads), row_delta_threads}, row_delta_fma<width(), T>, args);
    };
    wide ? launch(int_constant<device::widest<T>>{}) : launch(int_constant<1>{});
  }
}

}  // namespace torchops::kernels::span_attention
