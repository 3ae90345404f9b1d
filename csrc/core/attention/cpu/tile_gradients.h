#pragma once

#include "core/attention/cpu/packing.h"

// The backward where a tile of queries meets a tile of keys: probabilities, gradients to scores, and what they are
// multiplied with.

namespace torchops::kernels::inline TORCHOPS_LEVEL {

template <typename A>
void clear(A* numbers, int64_t count) {
  __builtin_memset(numbers, 0, static_cast<size_t>(count) * sizeof(A));
}

// Adds left [rows, depth] times right [depth, columns]; sums_of(row) is where the sums of a row are, or null for one
// that nobody wants.
template <typename E, typename Sums>
void add_product(int64_t rows, int64_t columns, int64_t depth, Operand<E> left, const E* right, const Sums& sums_of) {
  matrix_product(rows, columns / lane_count<E>, depth, left, right, columns,
                 [&](int64_t row, int64_t vector, auto& products) {
                   sum_t<E>* to = sums_of(row);
                   if (to == nullptr) {
                     return;
                   }
                   to += vector * lane_count<E>;
                   for (const auto& product : products) {
                     store(to, load(to) + product);
                     to += lane_count<E>;
                   }
                 });
}

// Sums of rows one behind the other.
template <typename A>
struct SumsInOrder {
  A* data;
  int64_t columns;

  A* operator()(int64_t row) const { return data + row * columns; }
};

template <typename E>
struct Meeting {
  using A = sum_t<E>;

  A* probabilities;         // [query_tile][key_tile]
  A* score_grads;           // [query_tile][key_tile]
  E* probabilities_by_key;  // left operand [key_tile][query_tile], transposed in memory
  E* score_grads_by_key;    // left operand [key_tile][query_tile], transposed in memory
  E* score_grads_by_query;  // left operand [query_tile][key_tile]
  A* bias;                  // [key_tile]
  A* largest;               // [query_tile], of the normalizer
  A* inverse_sum;           // [query_tile]
  A* delta;                 // [query_tile]

  explicit Meeting(Arena* arena) {
    constexpr int64_t size = query_tile * key_tile<E>;
    probabilities = arena->take<A>(size);
    score_grads = arena->take<A>(size);
    const auto operand = [&](A* numbers) {
      return is_pair<E> ? arena->take<E>(size / element<E>::depth) : reinterpret_cast<E*>(numbers);
    };
    probabilities_by_key = operand(probabilities);
    score_grads_by_key = operand(score_grads);
    score_grads_by_query = operand(score_grads);
    bias = arena->take<A>(key_tile<E>);
    largest = arena->take<A>(query_tile);
    inverse_sum = arena->take<A>(query_tile);
    delta = arena->take<A>(query_tile);
  }

  // Of `rows` queries, a left operand, and a tile of keys, panels [key_tile / panel][D][panel].
  // hide(row, key, probabilities) makes those 0 of keys that a row does not see.
  template <typename Hide>
  void compute_probabilities(int64_t rows, int64_t head_dim, const E* queries, const E* keys, A scale,
                             const Hide& hide) const {
    constexpr int64_t panel = panel_columns<A>;
    const int64_t depth = depth_of<E>(head_dim);
    for (int64_t first = 0; first < key_tile<E>; first += panel) {
      panel_product(rows, depth, Operand<E>{queries, left_stride<E>(head_dim), 1}, keys + first * depth,
                    [&](int64_t row, vec<A>(&numbers)[tile_vectors]) {
                      A* const to = probabilities + row * key_tile<E> + first;
                      for (int v = 0; v < tile_vectors; ++v) {
                        const vec<A> of_key = load(bias + first + v * lane_count<E>);
                        const vec<A> distance = score_of(numbers[v], scale, of_key) - largest[row];
                        numbers[v] = exp(distance > A(0) ? vec<A>{} : distance) * inverse_sum[row];
                      }
                      hide(row, first, numbers);
                      for (int v = 0; v < tile_vectors; ++v) {
                        store(to + v * lane_count<E>, numbers[v]);
                      }
                    });
    }
  }

  // From probabilities and the products of grads, a left operand, with values, panels [key_tile / panel][Dv][panel].
  void compute_score_grads(int64_t rows, int64_t value_dim, const E* grads, const E* values) const {
    constexpr int64_t panel = panel_columns<A>;
    const int64_t depth = depth_of<E>(value_dim);
    for (int64_t first = 0; first < key_tile<E>; first += panel) {
      panel_product(rows, depth, Operand<E>{grads, left_stride<E>(value_dim), 1}, values + first * depth,
                    [&](int64_t row, const vec<A>(&products)[tile_vectors]) {
                      const int64_t at = row * key_tile<E> + first;
                      for (int v = 0; v < tile_vectors; ++v) {
                        const int64_t here = at + v * lane_count<E>;
                        const vec<A> probability = load(probabilities + here);
                        const vec<A> score_grad = probability * (products[v] - delta[row]);
                        store(score_grads + here, probability == A(0) ? vec<A>{} : score_grad);
                      }
                    });
    }
  }

  // To what a tile of keys adds up from `rows` queries: probabilities times grads, resp. gradients to scores times
  // queries, right operands [rows][columns].
  template <typename Sums>
  void add_to_values(int64_t rows, int64_t columns, const E* grads, const Sums& sums_of) const {
    add_by_key(rows, columns, probabilities, probabilities_by_key, grads, sums_of);
  }
  template <typename Sums>
  void add_to_keys(int64_t rows, int64_t columns, const E* queries, const Sums& sums_of) const {
    add_by_key(rows, columns, score_grads, score_grads_by_key, queries, sums_of);
  }
  // Gradients to the scores of rows [first, end), to sums [key_tile].
  void add_to_biases(int64_t first, int64_t end, A* sums) const {
    for (int64_t row = first; row < end; ++row) {
      for (int64_t key = 0; key < key_tile<E>; key += lane_count<E>) {
        store(sums + key, load(sums + key) + load(score_grads + row * key_tile<E> + key));
      }
    }
  }

  // To what `rows` queries add up: gradients to scores times keys, a right operand [key_tile][columns].
  void add_to_queries(int64_t rows, int64_t columns, const E* keys, A* sums) const {
    if constexpr (is_pair<E>) {
      // The depth is along the keys: neighbouring columns are pairs.
      for (int64_t at = 0; at < rows * key_tile<E>; at += 2 * lane_count<E>) {
        store_pairs(score_grads_by_query + at / 2, load(score_grads + at), load(score_grads + at + lane_count<E>));
      }
    }
    add_product(rows, columns, key_tile<E> / element<E>::depth,
                Operand<E>{score_grads_by_query, key_tile<E> / element<E>::depth, 1}, keys,
                SumsInOrder<A>{sums, columns});
  }

 private:
  template <typename Sums>
  void add_by_key(int64_t rows, int64_t columns, const A* numbers, E* by_key, const E* right,
                  const Sums& sums_of) const {
    if constexpr (is_pair<E>) {
      // The depth is along the queries: neighbouring rows are pairs.
      for (int64_t row = 0; row < rows; row += 2) {
        for (int64_t key = 0; key < key_tile<E>; key += lane_count<E>) {
          const A* const from = numbers + row * key_tile<E> + key;
          store_interleaved(by_key + row / 2 * key_tile<E> + key, load(from), load(from + key_tile<E>));
        }
      }
    }
    add_product(key_tile<E>, columns, depth_of<E>(rows), Operand<E>{by_key, 1, key_tile<E>}, right, sums_of);
  }
};

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
