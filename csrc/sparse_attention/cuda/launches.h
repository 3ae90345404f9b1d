#pragma once

#include <cstdint>
#include <type_traits>

#include "sparse_attention/attention.h"
#include "sparse_attention/code_choice.h"
#include "sparse_attention/cuda/query_tile.h"
#include "sparse_attention/nearest_codeword.h"
#include "sparse_attention/quantization_loss.h"
#include "sparse_attention/score_choice.h"
#include "sparse_attention/scores.h"

// What the host layer has to know of the kernels, and how it starts them.

namespace torchops::kernels::sparse_attention {

// Heads whose lists are sorted: those of pair_bias, or of the lists where there is none.
template <typename T>
int64_t sorted_heads(const Attention<T>& inputs) {
  return inputs.pair_bias == nullptr ? inputs.lists.num_heads : inputs.bias_heads;
}

// Where an entry without keys begins: behind all others.
inline constexpr int32_t no_key = INT32_MAX;

// Lists in ascending order, entries without keys at their ends.
struct SortedLists {
  int32_t* begins;  // [B, num_heads, num_lists, k]: the first key of each entry
  int32_t* places;  // where it stands in the caller's list; null where nobody asks, for there are no biases of entries
  int64_t num_heads;  // sorted_heads, or those of the keys where the tile has one head of each group
  int64_t first_list;
  int64_t num_lists;
  QueryTile tile;  // whose lists these are

  template <typename T>
  constexpr int64_t first_of(const Attention<T>& inputs, int64_t batch, int64_t head, int64_t list) const {
    const int64_t own = head / (inputs.sizes.num_heads / num_heads);
    return ((batch * num_heads + own) * num_lists + list - first_list) * inputs.lists.num_listed;
  }
  constexpr const int32_t* places_of(int64_t first) const { return places == nullptr ? nullptr : places + first; }
};

// Of all lists.
template <typename T>
SortedLists all_lists(const Attention<T>& inputs, int32_t* begins, int32_t* places) {
  return {begins, places, sorted_heads(inputs), 0, inputs.lists.num_lists, all_queries(inputs.sizes)};
}

// What keys have added up in tiles before, carried to those behind; null where one tile has all queries, and for what
// nobody asks for.
template <typename A>
struct CarriedSums {
  A* keys;    // [B, Hkv, Lk, D], without the scale
  A* values;  // [B, Hkv, Lk, Dv]
};

// Rows of queries that a block multiplies with a key at a time.
inline constexpr int score_rows = 8;

// Lists of a block: as many as have these rows.
template <typename T>
constexpr int64_t score_lists(const ScoreChoice<T>& args) {
  const int64_t lists = score_rows / (args.rule.query_block * args.heads_of_list());
  return lists > 1 ? lists : 1;
}
template <typename T>
constexpr int64_t score_units_of_head(const ScoreChoice<T>& args) {
  return (args.num_lists() + score_lists(args) - 1) / score_lists(args);
}
template <typename T>
constexpr int64_t score_choice_units(const ScoreChoice<T>& args) {
  return args.sizes.batch * args.list_heads() * score_units_of_head(args);
}

// Scores as integers of their order.
template <typename A>
using ordered_score_t = std::conditional_t<sizeof(A) == sizeof(uint64_t), uint64_t, uint32_t>;

// What blocks keep scores in: there are no more blocks than it has room for.
template <typename A>
struct ScoreScratch {
  ordered_score_t<A>* scores;  // [num_blocks, score_lists, stride]
  int64_t stride;              // of the keys of a list, and blocks of them
  int64_t num_blocks;
};

template <typename T>
constexpr int64_t score_scratch_stride(const ScoreChoice<T>& args) {
  const int64_t num_keys = args.sizes.num_keys;
  return args.rule.block_size == 1 ? num_keys : num_keys + num_keys / args.rule.block_size + 2;
}

template <typename T>
void launch_sort_lists(const Attention<T>& inputs, const SortedLists& sorted);

template <typename T>
void launch_forward(const AttentionForward<T>& args, const SortedLists& sorted);

template <typename T>
void launch_row_delta(const RowDelta<T>& args);

// args.grad_query or grad_pair_bias is wanted.
template <typename T>
void launch_query_gradient(const AttentionBackward<T>& args, const SortedLists& sorted);

// One of args.grad_key, grad_value and grad_key_bias is wanted. The last tile writes them, grad_key_bias all.
template <typename T>
void launch_key_gradient(const AttentionBackward<T>& args, const SortedLists& sorted,
                         const CarriedSums<accumulate_t<T>>& carried);

template <typename T>
void launch_scores(const Scores<T>& args);

// args.grad_query is wanted.
template <typename T>
void launch_score_query_gradient(const ScoreGradients<T>& args);

// args.grad_key is wanted.
template <typename T>
void launch_score_key_gradient(const ScoreGradients<T>& args, const SortedLists& sorted);

template <typename T>
void launch_nearest_codeword(const NearestCodeword<T>& args);

// lists are [B, heads of the tile, its queries, num_chosen]; `behind` follows where a query sees fewer keys.
void launch_choose_by_codes(const CodeChoice& args, int64_t batch, const QueryTile& tile, int32_t* lists,
                            int32_t behind);

// indices are [B, heads of lists, Nq, num_chosen].
template <typename T>
void launch_choose_by_scores(const ScoreChoice<T>& args, const ScoreScratch<accumulate_t<T>>& scratch,
                             int32_t* indices);

template <typename T>
void launch_quantization_loss(const QuantizationLoss<T>& args);

// One of args.grad_input and grad_codewords is wanted.
template <typename T>
void launch_quantization_gradient(const QuantizationGradient<T>& args);

}  // namespace torchops::kernels::sparse_attention
