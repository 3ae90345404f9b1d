#pragma once

#include "core/attention/cpu/packing.h"

// The forward of a tile of queries: products of its rows with blocks of keys, and the softmax over all of them.

namespace torchops::kernels::inline TORCHOPS_LEVEL {

// Keys whose scores are computed at a time: several tiles, so that sums are rescaled less often.
template <typename E>
constexpr int64_t key_block = 2 * key_tile<E>;

// Rows of queries on their way through the keys.
template <typename E>
struct TileSoftmax {
  using A = sum_t<E>;

  E* queries;       // left operand [query_tile][D]
  A* scores;        // [query_tile][key_block], then exp(score - largest) where E is A
  E* weights;       // [query_tile][key_block], the same as E
  A* output;        // [query_tile][Dv]
  vec<A>* highest;  // [query_tile]: the largest of a block's scores, lane by lane
  vec<A>* sum;      // [query_tile]: the sum of weights, lane by lane
  A* largest;       // [query_tile]
  A* rescale;       // [query_tile]
  A* bias;          // [key_block]

  TileSoftmax(Arena* arena, const attention::Sizes& sizes) {
    queries = arena->take<E>(query_tile * left_stride<E>(sizes.head_dim));
    scores = arena->take<A>(query_tile * key_block<E>);
    weights = is_pair<E> ? arena->take<E>(query_tile * key_block<E> / element<E>::depth) : reinterpret_cast<E*>(scores);
    output = arena->take<A>(query_tile * columns_of<E>(sizes.value_dim));
    highest = arena->take<vec<A>>(query_tile);
    sum = arena->take<vec<A>>(query_tile);
    largest = arena->take<A>(query_tile);
    rescale = arena->take<A>(query_tile);
    bias = arena->take<A>(key_block<E>);
  }

  void clear(int64_t num_rows, int64_t columns) const {
    for (int64_t row = 0; row < num_rows; ++row) {
      largest[row] = -static_cast<A>(__builtin_inf());
      sum[row] = vec<A>{};
    }
    __builtin_memset(output, 0, static_cast<size_t>(num_rows * columns) * sizeof(A));
  }

  // Scores of a block of keys, whose first is first_key of what the rows see, and their largest, row by row.
  // Keys are panels [num_keys / panel][D][panel].
  void compute_scores(int64_t head_dim, const E* keys, int64_t num_rows, int64_t num_keys, A scale, bool biased,
                      const TileRanges& seen, int64_t first_key) const {
    constexpr int64_t panel = panel_columns<A>;
    const int64_t depth = depth_of<E>(head_dim);
    const int64_t padded_rows = round_up(num_rows, tile_rows);
    for (int64_t row = 0; row < padded_rows; ++row) {
      highest[row] = broadcast(-static_cast<A>(__builtin_inf()));
    }
    for (int64_t first = 0; first < num_keys; first += panel) {
      const bool all_visible = seen.all_visible(first_key + first, first_key + first + panel, num_rows);
      const auto finish = [&](auto hide, auto add_bias) {
        panel_product(padded_rows, depth, Operand<E>{queries, left_stride<E>(head_dim), 1}, keys + first * depth,
                      [&](int64_t row, vec<A>(&numbers)[tile_vectors]) {
                        for (int v = 0; v < tile_vectors; ++v) {
                          if constexpr (decltype(add_bias)::value) {
                            numbers[v] = score_of(numbers[v], scale, load(bias + first + v * lane_count<E>));
                          } else {
                            numbers[v] *= scale;  // the bits of a bias of 0
                          }
                        }
                        if constexpr (decltype(hide)::value) {
                          seen.template hide<A>(row, first_key + first, numbers, -static_cast<A>(__builtin_inf()));
                        }
                        vec<A> above = highest[row];
                        A* const to = scores + row * key_block<E> + first;
                        for (int v = 0; v < tile_vectors; ++v) {
                          above = numbers[v] > above ? numbers[v] : above;
                          store(to + v * lane_count<E>, numbers[v]);
                        }
                        highest[row] = above;
                      });
      };
      if (biased) {
        all_visible ? finish(count<0>{}, count<1>{}) : finish(count<1>{}, count<1>{});
      } else {
        all_visible ? finish(count<0>{}, count<0>{}) : finish(count<1>{}, count<0>{});
      }
    }
  }

  // Scores become weights, exp(score - largest); what was summed up before is to be multiplied by `rescale`.
  void compute_weights(int64_t num_rows, int64_t num_keys) const {
    E* to = weights;
    for (int64_t row = 0; row < num_rows; ++row, to += key_block<E> / element<E>::depth) {
      const A before = largest[row];
      const A here = largest_lane<A>(highest[row]);
      largest[row] = here > before ? here : before;
      const A shift = reference_of(largest[row]);
      rescale[row] = largest[row] == before ? A(1) : exp_of(before - shift);
      vec<A> total = sum[row] * rescale[row];
      const A* const from = scores + row * key_block<E>;
      for (int64_t key = 0; key < num_keys; key += lane_count<E> * element<E>::depth) {
        const vec<A> weight = exp(load(from + key) - shift);
        total += weight;
        if constexpr (is_pair<E>) {
          const vec<A> next = exp(load(from + key + lane_count<E>) - shift);
          total += next;
          store_pairs(to + key / 2, weight, next);
        } else {
          store(to + key, weight);
        }
      }
      sum[row] = total;
    }
  }

  // Elements [first, end) of the block's depth: values are rows below each other, value_stride apart.
  void add_values(int64_t padded_rows, int64_t columns, int64_t first, int64_t end, const E* values,
                  int64_t value_stride) const {
    matrix_product(padded_rows, columns / lane_count<E>, end - first,
                   Operand<E>{weights + first, key_block<E> / element<E>::depth, 1}, values + first * value_stride,
                   value_stride, [&](int64_t row, int64_t vector, auto& sums) {
                     A* to = output + row * columns + vector * lane_count<E>;
                     for (const auto& product : sums) {
                       store(to, load(to) * rescale[row] + product);
                       to += lane_count<E>;
                     }
                   });
  }
};

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
