#pragma once

#include "core/attention/cpu/rows.h"
#include "sparse_attention/cpu/rows.h"
#include "sparse_attention/cpu/tile_lists.h"

// Queries of one head, and their way through the keys that their lists name: stretch by stretch of keys, which stay in
// a cache meanwhile, query by query.

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {

// Queries of a tile.
inline constexpr int64_t most_rows = 64;
// Keys that a query computes with at a time.
inline constexpr int64_t most_keys = 256;

// Queries are cut into units of whole lists: one list, or as many as a tile has rows for.
constexpr int64_t lists_of_unit(const ListRule& rule) {
  return rule.query_block >= most_rows ? 1 : most_rows / rule.query_block;
}
template <typename T>
constexpr int64_t units_of_head(const Attention<T>& inputs) {
  return divide_up(inputs.lists.num_lists, lists_of_unit(inputs.rule));
}

// A list of a head; keys that are not of `range` are left out.
template <typename T>
void fill_list(const TileLists& lists, int64_t to, const Attention<T>& inputs, int64_t batch, int64_t head,
               int64_t list, Range range) {
  lists.fill(to, inputs.lists, inputs.rule, inputs.sequence(batch), batch, inputs.list_head(head), list, range,
             inputs.biases_of(batch, head, list));
}

struct UnitOfLists {
  int64_t first;  // list
  int64_t count;
  int64_t first_query;
  int64_t end_of_queries;

  template <typename T>
  UnitOfLists(const Attention<T>& inputs, int64_t unit) {
    const int64_t most = lists_of_unit(inputs.rule), query_block = inputs.rule.query_block;
    first = unit * most;
    count = inputs.lists.num_lists - first < most ? inputs.lists.num_lists - first : most;
    first_query = first * query_block;
    const int64_t end = first_query + count * query_block;
    end_of_queries = end < inputs.sizes.num_queries ? end : inputs.sizes.num_queries;
  }

  template <typename T>
  void fill(const TileLists& to, const Attention<T>& inputs, int64_t batch, int64_t head, Range range) const {
    if (inputs.lists.choice != nullptr) {
      to.choose(batch, head, first_query, count, inputs.sequence(batch), range);  // each query has a list of its own
      return;
    }
    for (int64_t list = 0; list < count; ++list) {
      fill_list(to, list, inputs, batch, head, first + list, range);
    }
  }
};

// Keys of a stretch: as many as stay in a cache, or enough for a list to name some of them. It depends on sizes alone,
// for sums are rescaled from stretch to stretch.
template <typename T>
constexpr int64_t stretch_of_keys(const Attention<T>& inputs) {
  constexpr int64_t worth_a_visit = 16;
  const int64_t num_keys = inputs.sizes.num_keys;
  const int64_t block = inputs.rule.block_size < num_keys ? inputs.rule.block_size : num_keys;
  int64_t keys = most_keys;
  while (keys < num_keys && keys * inputs.lists.num_listed * block < worth_a_visit * num_keys) {
    keys *= 2;
  }
  return keys;
}

// Some of the keys that a query sees, in ascending order, and where their entries stand in the list.
struct Run {
  const int32_t* keys;
  const int32_t* places;
  int64_t count;
};

// Where a query is on its way.
struct Progress {
  List list;
  int64_t end_of_keys;
  int64_t entry;  // of the list
  int64_t key;    // of the entry: so many are done
};

class Runs {
 public:
  Runs(Arena* arena, int64_t num_rows) {
    progress_ = arena->take<Progress>(num_rows);
    keys_ = arena->take<int32_t>(most_keys);
    places_ = arena->take<int32_t>(most_keys);
  }

  void start(int64_t row, const List& list, int64_t end_of_keys) const { progress_[row] = {list, end_of_keys, 0, 0}; }

  // At most `most` of the next keys of entries that begin before `end`; none where there are no more.
  Run next(int64_t row, int64_t end, int64_t most, bool of_single_keys) const {
    Progress& at = progress_[row];
    const int64_t bound = end < at.end_of_keys ? end : at.end_of_keys;
    if (of_single_keys) {
      const int32_t* const begin = at.list.begin + at.entry;
      const int32_t* const place = at.list.place + at.entry;
      const int64_t left = at.list.length - at.entry < most ? at.list.length - at.entry : most;
      int64_t count = 0;
      while (count < left && begin[count] < bound) {
        ++count;
      }
      at.entry += count;
      return {begin, place, count};
    }
    int64_t count = 0;
    // A block that is listed twice begins another run, so that what a query sees of one is its first keys.
    const auto ascends = [&] { return count == 0 || at.list.begin[at.entry] + at.key > keys_[count - 1]; };
    while (at.entry < at.list.length && count < most && at.list.begin[at.entry] < bound && ascends()) {
      const int64_t first = at.list.begin[at.entry] + at.key;
      const int64_t last = at.list.end[at.entry] < at.end_of_keys ? at.list.end[at.entry] : at.end_of_keys;
      const int64_t taken = last - first < most - count ? last - first : most - count;
      for (int64_t i = 0; i < taken; ++i) {
        keys_[count + i] = static_cast<int32_t>(first + i);
        places_[count + i] = at.list.place[at.entry];
      }
      count += taken;
      at.key += taken;
      if (first + taken == last) {
        ++at.entry;
        at.key = 0;
      }
    }
    return {keys_, places_, count};
  }

 private:
  Progress* progress_;
  int32_t *keys_, *places_;
};

// Scores of a run, computed in the same way by the forward and the backward; -inf up to whole vectors behind the last.
// Its values are fetched meanwhile.
template <typename E, typename T>
void scores_of_run(const Attention<T>& inputs, const typename element<E>::vector* query, const RowsByNumber<T>& keys,
                   const RowsByNumber<T>& values, const Run& run, const sum_t<E>* key_bias, const sum_t<E>* pair_bias,
                   sum_t<E>* bias, sum_t<E>* scores) {
  using A = sum_t<E>;
  using Lane = typename lane_index<sizeof(A)>::type;
  products_with_rows<E>(query, keys, inputs.sizes.head_dim, run.keys, run.count, values, inputs.sizes.value_dim,
                        scores);
  const bool biased = key_bias != nullptr || pair_bias != nullptr;
  if (biased) {
    for (int64_t e = 0; e < run.count; ++e) {
      bias[e] = (key_bias == nullptr ? A(0) : key_bias[run.keys[e]]) +
                (pair_bias == nullptr ? A(0) : pair_bias[run.places[e]]);
    }
  }
  for (int64_t e = 0; e < run.count; e += lanes<A>) {
    vec<A> score = load(scores + e);
    score = biased ? score_of(score, inputs.scale, load(bias + e)) : score * inputs.scale;
    if (run.count - e < lanes<A>) {
      const vec<Lane> lane = lane_numbers<Lane>();
      score = lane < static_cast<Lane>(run.count - e) ? score : broadcast(-static_cast<A>(__builtin_inf()));
    }
    store(scores + e, score);
  }
}

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
