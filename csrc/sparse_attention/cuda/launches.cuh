#pragma once

#include <algorithm>

#include "core/attention/cuda/row_delta.cuh"
#include "core/cuda/launch.h"
#include "core/cuda/tiles.h"
#include "sparse_attention/cuda/choose_by_scores.cuh"
#include "sparse_attention/cuda/forward.cuh"
#include "sparse_attention/cuda/key_gradient.cuh"
#include "sparse_attention/cuda/launches.h"
#include "sparse_attention/cuda/nearest_codeword.cuh"
#include "sparse_attention/cuda/quantization_loss.cuh"
#include "sparse_attention/cuda/query_gradient.cuh"
#include "sparse_attention/cuda/scores.cuh"

// Which kernel on which grid.

namespace torchops::kernels::sparse_attention {

template <typename T>
void launch_sort_lists(const Attention<T>& inputs, const SortedLists& sorted) {
  device::launch({inputs.sizes.batch * sorted.num_heads * inputs.lists.num_lists, sort_threads,
                  device::shared_size<EntryOrder>(sort_threads)},
                 sort_lists<T>, inputs, sorted);
}

template <typename T>
void launch_forward(const AttentionForward<T>& args, const SortedLists& sorted) {
  device::launch({device::tiles_of(sorted.tile.units(args.inputs.sizes), num_warps), num_threads,
                  WarpMemory<accumulate_t<T>>::bytes},
                 forward<T>, args, sorted);
}

template <typename T>
void launch_query_gradient(const AttentionBackward<T>& args, const SortedLists& sorted) {
  const int64_t queries_of_warp = args.grad_pair_bias == nullptr ? 1 : args.inputs.rule.query_block;
  device::launch({device::tiles_of(sorted.tile.units(args.inputs.sizes, queries_of_warp), num_warps), num_threads,
                  WarpMemory<accumulate_t<T>>::bytes},
                 query_gradient<T>, args, sorted, queries_of_warp);
}

template <typename T>
void launch_key_gradient(const AttentionBackward<T>& args, const SortedLists& sorted,
                         const CarriedSums<accumulate_t<T>>& carried) {
  const Sizes& sizes = args.inputs.sizes;
  device::launch({device::tiles_of(sizes.batch * sizes.num_kv_heads * sizes.num_keys, num_warps), num_threads,
                  WarpMemory<accumulate_t<T>>::bytes},
                 key_gradient<T>, args, sorted, carried);
}

template <typename T>
void launch_row_delta(const RowDelta<T>& args) {
  const Sizes& sizes = args.sizes;
  device::launch(
      {device::tiles_of(sizes.batch * sizes.num_heads * sizes.num_queries, row_delta_threads), row_delta_threads},
      row_delta_fma<1, T>, args);
}

template <typename T>
void launch_scores(const Scores<T>& args) {
  const Sizes& sizes = args.inputs.sizes;
  const int64_t shares = device::tiles_of(num_columns(args.inputs), columns_of_warp);
  device::launch({device::tiles_of(sizes.batch * sizes.num_heads * sizes.num_queries * shares, num_warps), num_threads,
                  WarpMemory<accumulate_t<T>>::bytes},
                 scores<T>, args);
}

template <typename T>
void launch_score_query_gradient(const ScoreGradients<T>& args) {
  const Sizes& sizes = args.inputs.sizes;
  device::launch({device::tiles_of(sizes.batch * sizes.num_heads * sizes.num_queries, num_warps), num_threads,
                  WarpMemory<accumulate_t<T>>::bytes},
                 score_query_gradient<T>, args);
}

template <typename T>
void launch_score_key_gradient(const ScoreGradients<T>& args, const SortedLists& sorted) {
  const Sizes& sizes = args.inputs.sizes;
  device::launch({device::tiles_of(sizes.batch * sizes.num_kv_heads * sizes.num_keys, num_warps), num_threads,
                  WarpMemory<accumulate_t<T>>::bytes},
                 score_key_gradient<T>, args, sorted);
}

template <typename T>
void launch_nearest_codeword(const NearestCodeword<T>& args) {
  device::launch({args.parts.num_subspaces * device::tiles_of(args.parts.num_rows, nearest_codeword_threads),
                  nearest_codeword_threads},
                 nearest_codeword<T>, args);
}

template <typename T>
void launch_choose_by_scores(const ScoreChoice<T>& args, const ScoreScratch<accumulate_t<T>>& scratch,
                             int32_t* indices) {
  device::launch({scratch.num_blocks, score_threads, ScoreMemory<accumulate_t<T>>::bytes(args.sizes.head_dim)},
                 choose_by_scores<T>, args, scratch, indices);
}

// A lane has one codeword, or up to the most that there can be.
template <typename Args>
bool has_one_share(const Args& args) {
  return args.parts.num_codewords <= codeword_group;
}

template <typename Args>
device::LaunchShape quantization_shape(const Args& args) {
  return {device::tiles_of(args.num_units() * codeword_group, quantization_threads), quantization_threads};
}

template <typename T>
void launch_quantization_loss(const QuantizationLoss<T>& args) {
  constexpr int most_shares = most_codewords / codeword_group;
  device::launch(quantization_shape(args),
                 has_one_share(args) ? quantization_loss<1, T> : quantization_loss<most_shares, T>, args);
  device::launch({1, mean_threads, device::shared_size<double>(mean_threads / device::warp_size)}, mean_of_pieces<T>,
                 args);
}

template <typename T>
void launch_quantization_gradient(const QuantizationGradient<T>& args) {
  constexpr int most_shares = most_codewords / codeword_group;
  device::launch(quantization_shape(args),
                 has_one_share(args) ? quantization_gradient<1, T> : quantization_gradient<most_shares, T>, args);
  if (args.piece_gradients != nullptr) {
    constexpr int threads = warps_of_sums * sums_of_block;
    device::launch(
        {device::tiles_of(args.num_sums(), sums_of_block), threads, device::shared_size<accumulate_t<T>>(threads)},
        sum_piece_gradients<T>, args);
  }
}

}  // namespace torchops::kernels::sparse_attention
