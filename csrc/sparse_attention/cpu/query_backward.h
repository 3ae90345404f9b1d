#pragma once

#include "sparse_attention/cpu/key_sums.h"
#include "sparse_attention/cpu/tile_rows.h"

// The backward query by query, where few queries share a list.

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {

template <typename E>
struct BackwardScratch {
  using A = sum_t<E>;
  using Vector = typename element<E>::vector;

  TileLists lists;
  Runs runs;
  Vector* queries;    // [most_rows][vectors_of(D)]
  Vector* grads;      // [most_rows][vectors_of(Dv)]
  A* query_numbers;   // [most_rows][D, whole vectors], the same where E is A
  A* grad_numbers;    // [most_rows][Dv, whole vectors]
  A* query_sums;      // [most_rows][D, whole vectors], without the scale
  A* probabilities;   // [most_keys]
  A* score_grads;     // [most_keys]
  A* bias;            // [most_keys]
  int32_t* in_range;  // [most_keys]: keys, counted from the range's first
  KeySums<E> sums;

  template <typename T>
  BackwardScratch(Arena* arena, const AttentionBackward<T>& args, int64_t num_keys)
      : lists(arena, args.inputs.lists, lists_of_unit(args.inputs.rule)),
        runs(arena, most_rows),
        sums(arena, args, num_keys) {
    const Sizes& sizes = args.inputs.sizes;
    const int64_t columns = round_up(sizes.head_dim, lanes<A>), value_columns = round_up(sizes.value_dim, lanes<A>);
    queries = arena->take<Vector>(most_rows * vectors_of<E>(sizes.head_dim));
    grads = arena->take<Vector>(most_rows * vectors_of<E>(sizes.value_dim));
    query_numbers = is_pair<E> ? arena->take<A>(most_rows * columns) : reinterpret_cast<A*>(queries);
    grad_numbers = is_pair<E> ? arena->take<A>(most_rows * value_columns) : reinterpret_cast<A*>(grads);
    query_sums = arena->take<A>(most_rows * columns);
    probabilities = arena->take<A>(most_keys);
    score_grads = arena->take<A>(most_keys);
    bias = arena->take<A>(most_keys);
    in_range = arena->take<int32_t>(most_keys);
  }
};

// The queries of one unit of a head's lists, tile by tile.
template <typename T>
struct QueryBackward {
  using E = multiplicand_t<T>;
  using A = sum_t<E>;

  const AttentionBackward<T>& args;
  const BackwardScratch<E>& scratch;
  int64_t batch;
  int64_t head;
  bool for_queries;
  const KeySums<E>* for_keys;

  const Attention<T>& inputs() const { return args.inputs; }
  const Sizes& sizes() const { return inputs().sizes; }
  Range range() const { return for_keys == nullptr ? Range{0, sizes().num_keys} : for_keys->range; }
  int64_t columns() const { return round_up(sizes().head_dim, lanes<A>); }
  int64_t value_columns() const { return round_up(sizes().value_dim, lanes<A>); }

  static int64_t units(const Attention<T>& inputs) { return units_of_head(inputs); }

  void compute(int64_t unit) const {
    const UnitOfLists lists(inputs(), unit);
    lists.fill(scratch.lists, inputs(), batch, head, range());
    for (int64_t query = lists.first_query; query < lists.end_of_queries; query += most_rows) {
      const int64_t left = lists.end_of_queries - query;
      compute_tile(lists.first, query, left < most_rows ? left : most_rows);
    }
  }

 private:
  void compute_tile(int64_t first_list, int64_t first_query, int64_t num_rows) const {
    const int64_t kv_head = head / sizes().group_size();
    const Sequence sequence = inputs().sequence(batch);
    for (int64_t row = 0; row < num_rows; ++row) {
      const int64_t query = first_query + row;
      scratch.runs.start(row, scratch.lists[query / inputs().rule.query_block - first_list],
                         end_of_keys(inputs().rule, sequence, query));
      load_row(inputs().query, query, sizes().head_dim, scratch.queries + row * vectors_of<E>(sizes().head_dim),
               scratch.query_numbers + row * columns());
      if (sizes().value_dim > 0) {
        load_row(args.grad_output, query, sizes().value_dim, scratch.grads + row * vectors_of<E>(sizes().value_dim),
                 scratch.grad_numbers + row * value_columns());
      }
    }
    clear(scratch.query_sums, num_rows * columns());
    const RowsByNumber<T> keys{inputs().key.row(batch, kv_head, 0), inputs().key.row_stride};
    const RowsByNumber<T> values{inputs().value.data == nullptr ? nullptr : inputs().value.row(batch, kv_head, 0),
                                 inputs().value.row_stride};
    const bool single = inputs().rule.block_size == 1;
    const int64_t stretch = stretch_of_keys(inputs());
    for (int64_t end = range().begin / stretch * stretch + stretch; end < range().end + stretch; end += stretch) {
      for (int64_t row = 0; row < num_rows; ++row) {
        const auto next = [&] { return scratch.runs.next(row, end, most_keys, single); };
        for (Run run = next(); run.count > 0; run = next()) {
          meet(first_query + row, row, run, keys, values);
        }
      }
    }
    for (int64_t row = 0; for_queries && args.grad_query.data != nullptr && row < num_rows; ++row) {
      store_gradient(args.grad_query.row(batch, head, first_query + row), scratch.query_sums + row * columns(),
                     sizes().head_dim, inputs().scale);
    }
  }

  void load_row(const Heads<const T>& tensor, int64_t query, int64_t size, typename element<E>::vector* row,
                A* numbers) const {
    const T* const from = tensor.row(batch, head, query);
    sparse_attention::TORCHOPS_LEVEL::load_row<E>(from, size, row);
    if constexpr (is_pair<E>) {
      load_numbers(from, size, numbers);
    }
  }

  // A query and some of the keys that it sees.
  void meet(int64_t query, int64_t row, const Run& run, const RowsByNumber<T>& keys,
            const RowsByNumber<T>& values) const {
    const int64_t list = query / inputs().rule.query_block;
    const int64_t index = (batch * sizes().num_heads + head) * sizes().num_queries + query;
    const Normalizer<A> normalizer = args.normalizer[index];
    const A* const key_bias = inputs().key_biases_of(batch);
    scores_of_run<E>(inputs(), scratch.queries + row * vectors_of<E>(sizes().head_dim), keys, values, run, key_bias,
                     inputs().biases_of(batch, head, list), scratch.bias, scratch.probabilities);
    for (int64_t e = 0; e < run.count; e += lanes<A>) {
      const vec<A> distance = load(scratch.probabilities + e) - normalizer.largest;
      store(scratch.probabilities + e, exp(distance > A(0) ? vec<A>{} : distance) * normalizer.inverse_sum);
    }
    if (for_keys != nullptr) {
      for (int64_t e = 0; e < run.count; ++e) {
        scratch.in_range[e] = run.keys[e] - static_cast<int32_t>(for_keys->range.begin);
      }
      if (args.grad_value.data != nullptr) {
        add_to_rows(for_keys->values, value_columns() / lanes<A>, scratch.in_range, scratch.probabilities, run.count,
                    scratch.grad_numbers + row * value_columns());
      }
    }
    if (args.delta == nullptr) {
      return;  // no gradient to scores is wanted
    }
    compute_score_grads(row, run, values, args.delta[index]);
    if (for_keys != nullptr && args.grad_key.data != nullptr) {
      add_to_rows(for_keys->keys, columns() / lanes<A>, scratch.in_range, scratch.score_grads, run.count,
                  scratch.query_numbers + row * columns());
    }
    if (for_keys != nullptr && args.grad_key_bias != nullptr) {
      for (int64_t e = 0; e < run.count; ++e) {
        for_keys->bias[scratch.in_range[e]] += scratch.score_grads[e];
      }
    }
    if (A* const to = args.grad_biases_of(batch, head, list); for_queries && to != nullptr) {
      for (int64_t e = 0; e < run.count; ++e) {
        to[run.places[e]] += scratch.score_grads[e];
      }
    }
    if (for_queries && args.grad_query.data != nullptr) {
      add_weighted_rows(keys, sizes().head_dim, run.keys, scratch.score_grads, run.count, A(1),
                        scratch.query_sums + row * columns());
    }
  }

  void compute_score_grads(int64_t row, const Run& run, const RowsByNumber<T>& values, A delta) const {
    if (sizes().value_dim > 0) {
      products_with_rows<E>(scratch.grads + row * vectors_of<E>(sizes().value_dim), values, sizes().value_dim, run.keys,
                            run.count, RowsByNumber<T>{}, 0, scratch.score_grads);
    } else {
      clear(scratch.score_grads, round_up(run.count, lanes<A>));
    }
    for (int64_t e = 0; e < run.count; e += lanes<A>) {
      const vec<A> probability = load(scratch.probabilities + e);
      const vec<A> score_grad = probability * (load(scratch.score_grads + e) - delta);
      store(scratch.score_grads + e, probability == A(0) ? vec<A>{} : score_grad);
    }
  }
};

// Summed up as the products of grad_output with values are: where a query sees a single key, whose value the output
// then is, they are the same to the last bit.
template <typename T>
void row_delta_by_lanes(const RowDelta<T>& args, int64_t begin, int64_t end) {
  using E = multiplicand_t<T>;
  using A = accumulate_t<T>;
  const Sizes& sizes = args.sizes;
  typename element<E>::vector grad[256 / lane_count<E>];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t query = row % sizes.num_queries, head = row / sizes.num_queries % sizes.num_heads;
    const int64_t batch = row / sizes.num_queries / sizes.num_heads;
    load_row<E>(args.grad_output.row(batch, head, query), sizes.value_dim, grad);
    const int32_t itself = 0;
    A products[lanes<A>];
    products_with_rows<E>(grad, RowsByNumber<T>{args.output.row(batch, head, query), 0}, sizes.value_dim, &itself, 1,
                          RowsByNumber<T>{}, 0, products);
    args.delta[row] = products[0] - (args.grad_logsumexp == nullptr ? A(0) : args.grad_logsumexp[row]);
  }
}

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
