#pragma once

#include "sparse_attention/cpu/tile_rows.h"

// The forward query by query, where few queries share a list.

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {
template <typename E>
struct ForwardScratch {
  using A = sum_t<E>;
  using Vector = typename element<E>::vector;

  TileLists lists;
  Runs runs;
  Vector* queries;  // [most_rows][vectors_of(D)]
  A* scores;        // [most_keys], then exp(score - largest)
  A* bias;          // [most_keys]
  A* output;        // [most_rows][Dv, whole vectors]
  vec<A>* sum;      // [most_rows]: the sum of weights, lane by lane
  A* largest;       // [most_rows]

  template <typename T>
  ForwardScratch(Arena* arena, const Attention<T>& inputs)
      : lists(arena, inputs.lists, lists_of_unit(inputs.rule)), runs(arena, most_rows) {
    queries = arena->take<Vector>(most_rows * vectors_of<E>(inputs.sizes.head_dim));
    scores = arena->take<A>(most_keys);
    bias = arena->take<A>(most_keys);
    output = arena->take<A>(most_rows * round_up(inputs.sizes.value_dim, lanes<A>));
    sum = arena->take<vec<A>>(most_rows);
    largest = arena->take<A>(most_rows);
  }
};

// A tile of at most most_rows queries of one head, whose lists are in scratch.
template <typename T>
struct QueryForward {
  using E = multiplicand_t<T>;
  using A = sum_t<E>;

  const AttentionForward<T>& args;
  const ForwardScratch<E>& scratch;
  int64_t batch;
  int64_t head;
  int64_t first_query;
  int64_t num_rows;

  const Attention<T>& inputs() const { return args.inputs; }
  int64_t columns() const { return round_up(inputs().sizes.value_dim, lanes<A>); }
  int64_t list_of(int64_t row) const { return (first_query + row) / inputs().rule.query_block; }

  void compute(int64_t first_list) const {
    const Sizes& sizes = inputs().sizes;
    const int64_t kv_head = head / sizes.group_size();
    const RowsByNumber<T> keys{inputs().key.row(batch, kv_head, 0), inputs().key.row_stride};
    const RowsByNumber<T> values{inputs().value.row(batch, kv_head, 0), inputs().value.row_stride};
    const A* const key_bias = inputs().key_biases_of(batch);
    const int64_t vectors = vectors_of<E>(sizes.head_dim);
    const Sequence sequence = inputs().sequence(batch);
    for (int64_t row = 0; row < num_rows; ++row) {
      scratch.runs.start(row, scratch.lists[list_of(row) - first_list],
                         end_of_keys(inputs().rule, sequence, first_query + row));
      load_row<E>(inputs().query.row(batch, head, first_query + row), sizes.head_dim, scratch.queries + row * vectors);
      scratch.largest[row] = -static_cast<A>(__builtin_inf());
      scratch.sum[row] = vec<A>{};
    }
    __builtin_memset(scratch.output, 0, static_cast<size_t>(num_rows * columns()) * sizeof(A));
    const bool single = inputs().rule.block_size == 1;
    const int64_t stretch = stretch_of_keys(inputs());
    for (int64_t end = stretch; end < sizes.num_keys + stretch; end += stretch) {
      for (int64_t row = 0; row < num_rows; ++row) {
        const A* const pair_bias = inputs().biases_of(batch, head, list_of(row));
        const auto next = [&] { return scratch.runs.next(row, end, most_keys, single); };
        for (Run run = next(); run.count > 0; run = next()) {
          scores_of_run<E>(inputs(), scratch.queries + row * vectors, keys, values, run, key_bias, pair_bias,
                           scratch.bias, scratch.scores);
          const A rescale = weigh(row, run.count);
          add_weighted_rows(values, sizes.value_dim, run.keys, scratch.scores, run.count, rescale,
                            scratch.output + row * columns());
        }
      }
    }
    for (int64_t row = 0; row < num_rows; ++row) {
      finish_row(args, batch, head, first_query + row, scratch.largest[row], sum_lanes<A>(scratch.sum[row]),
                 scratch.output + row * columns());
    }
  }

 private:
  // Scores become weights, exp(score - largest); returns what was summed up before is to be multiplied by.
  A weigh(int64_t row, int64_t number) const {
    vec<A> highest = load(scratch.scores);
    for (int64_t e = lanes<A>; e < number; e += lanes<A>) {
      const vec<A> score = load(scratch.scores + e);
      highest = score > highest ? score : highest;
    }
    const A before = scratch.largest[row], here = largest_lane<A>(highest);
    const A largest = here > before ? here : before;
    const A shift = reference_of(largest);
    const A rescale = largest == before ? A(1) : exp_of(before - shift);
    vec<A> sum = scratch.sum[row] * rescale;
    for (int64_t e = 0; e < number; e += lanes<A>) {
      const vec<A> weight = exp(load(scratch.scores + e) - shift);
      sum += weight;
      store(scratch.scores + e, weight);
    }
    scratch.sum[row] = sum;
    scratch.largest[row] = largest;
    return rescale;
  }
};

template <typename T>
void forward_by_query(const AttentionForward<T>& args, void* scratch, int64_t begin, int64_t end) {
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  Arena arena(scratch);
  const ForwardScratch<multiplicand_t<T>> buffers(&arena, inputs);
  const int64_t units = units_of_head(inputs);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t batch = unit / units / sizes.num_heads, head = unit / units % sizes.num_heads;
    const UnitOfLists lists(inputs, balanced_tile(unit % units, units));
    lists.fill(buffers.lists, inputs, batch, head, Range{0, sizes.num_keys});
    for (int64_t query = lists.first_query; query < lists.end_of_queries; query += most_rows) {
      const int64_t left = lists.end_of_queries - query;
      QueryForward<T>{args, buffers, batch, head, query, smaller(left, most_rows)}.compute(lists.first);
    }
  }
}

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
