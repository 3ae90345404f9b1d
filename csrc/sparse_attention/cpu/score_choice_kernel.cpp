#include "sparse_attention/cpu/score_choice_kernel.h"

#include "core/attention/cpu/packing.h"
#include "sparse_attention/cpu/largest_numbers.h"

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {
namespace {

// Rows of queries that are multiplied at a time: fewer where the scores of so many would not stay in the second cache.
constexpr int64_t rows_at_once(int64_t num_keys) {
  return num_keys > 4096 ? 32 : 64;
}

constexpr int64_t larger(int64_t one, int64_t other) {
  return one > other ? one : other;
}

// How the queries of a group are cut.
template <typename T>
struct Cut {
  using E = multiplicand_t<T>;
  static constexpr int64_t panel = panel_columns<sum_t<E>>;

  int64_t kv_heads;         // of a group
  int64_t heads;            // of a key-value head, that are multiplied at a time
  int64_t queries;          // of each, that are multiplied at a time
  int64_t lists;            // of each head of lists, of a unit
  int64_t units_of_a_head;  // of lists
  int64_t units;            // of a group
  int64_t panels;           // of the keys of a head

  explicit Cut(const ScoreChoice<T>& args) {
    const Sizes& sizes = args.sizes;
    const bool adds_heads = args.weights != nullptr;
    const int64_t most_rows = rows_at_once(sizes.num_keys);
    kv_heads = adds_heads ? sizes.num_kv_heads : 1;
    // Few queries are multiplied together with those of the other heads of their group.
    heads = adds_heads ? sizes.group_size() : clamp(most_rows / larger(sizes.num_queries, 1), 1, sizes.group_size());
    queries = larger(most_rows / (kv_heads * heads), 1);
    lists = larger(queries / args.rule.query_block, 1);
    units_of_a_head = divide_up(args.num_lists(), lists);
    units = (adds_heads ? 1 : divide_up(sizes.group_size(), heads)) * units_of_a_head;
    panels = divide_up(sizes.num_keys, panel);
    queries = smaller(queries, lists * args.rule.query_block);
  }

  // Keys are worth packing when several multiplications share them.
  bool packs_ahead(const ScoreChoice<T>& args) const {
    return units * divide_up(smaller(lists * args.rule.query_block, args.sizes.num_queries), queries) > 1;
  }
};

// Lists of heads [head, head + num_heads) that a unit makes.
struct Unit {
  int64_t batch;
  int64_t kv_head;
  int64_t head;  // of queries
  int64_t num_heads;
  int64_t list;
  int64_t num_lists;
};

template <typename T>
Unit unit_at(const ScoreChoice<T>& args, const Cut<T>& cut, int64_t group, int64_t unit) {
  const Sizes& sizes = args.sizes;
  const bool adds_heads = args.weights != nullptr;
  const int64_t kv_head = adds_heads ? 0 : group % sizes.num_kv_heads;
  const int64_t in_group = unit / cut.units_of_a_head * cut.heads;
  const int64_t list = balanced_tile(unit % cut.units_of_a_head, cut.units_of_a_head) * cut.lists;
  return {adds_heads ? group : group / sizes.num_kv_heads,   kv_head, kv_head * sizes.group_size() + in_group,
          smaller(cut.heads, sizes.group_size() - in_group), list,    smaller(cut.lists, args.num_lists() - list)};
}

// Where the products of a row with a panel of keys go.
template <typename A>
struct RowPlace {
  A* sums;  // of its query, over heads; or null
  A weight;
  ordered_t<A>* scores;  // of its list; or null
  int64_t end;           // behind the last key that its query sees
};

template <typename T>
class Chooser {
 public:
  using E = multiplicand_t<T>;
  using A = accumulate_t<T>;
  using I = ordered_t<A>;
  static constexpr int64_t panel = Cut<T>::panel, word = 64;

  Chooser(Arena* arena, const ScoreChoice<T>& args)
      : args_(args),
        cut_(args),
        // Rows that lie 4096 bytes apart would share their places in the first cache.
        stride_(round_up(args.sizes.num_keys, word) + word + 16),
        rows_of_head_(round_up(cut_.heads * cut_.queries, tile_rows)),
        largest_(arena, stride_) {
    const int64_t rows = cut_.kv_heads * rows_of_head_;
    queries_ = arena->take<E>(rows * left_stride<E>(args.sizes.head_dim));
    keys_ = arena->take<E>(cut_.packs_ahead(args) ? 0 : panel * depth());
    places_ = arena->take<RowPlace<A>>(rows);
    of_queries_ = arena->take<RowPlace<A>>(args.weights == nullptr ? 0 : cut_.queries);
    sums_ = arena->take<A>(args.weights == nullptr ? 0 : cut_.queries * panel);
    scores_ = arena->take<I>((args.weights == nullptr ? cut_.heads : 1) * cut_.lists * stride_);
    names_ = arena->take<I>(args.rule.block_size == 1 ? 0 : stride_);
    seen_ = arena->take<I>(args.key_bias == nullptr ? 0 : stride_);
  }

  // The lists of a unit; `packed` are the keys of its group, where they are packed ahead.
  void choose(const Unit& unit, const E* packed, int32_t* indices) const {
    const Sequence sequence = args_.sequence(unit.batch);
    const Range queries = args_.queries_of_lists(unit.list, unit.num_lists);
    const int64_t end = end_of_keys(args_.rule, sequence, queries.end - 1);
    const int64_t list_heads = args_.weights == nullptr ? unit.num_heads : 1;
    for (int64_t row = 0; row < list_heads * unit.num_lists; ++row) {
      fill(scores_ + row * stride_, larger(round_up(end, word), round_up(end, panel)));
    }
    note_seen(unit.batch, end);
    for (int64_t query = queries.begin; query < queries.end; query += cut_.queries) {
      add_scores(unit, {query, smaller(query + cut_.queries, queries.end)}, packed);
    }
    for (int64_t row = 0; row < list_heads * unit.num_lists; ++row) {
      const int64_t head = unit.head + row / unit.num_lists, list = unit.list + row % unit.num_lists;
      const int64_t last_query = args_.queries_of_lists(list, 1).end - 1;
      write_list(sequence, end_of_keys(args_.rule, sequence, last_query), scores_ + row * stride_,
                 indices + args_.offset_of_list(unit.batch, args_.weights == nullptr ? head : 0, list));
    }
  }

 private:
  int64_t depth() const { return depth_of<E>(args_.sizes.head_dim); }

  static void fill(I* integers, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      integers[i] = no_number<I>;
    }
  }

  // Which keys their biases do not hide, as masks.
  void note_seen(int64_t batch, int64_t end) const {
    if (args_.key_bias != nullptr) {
      const A* const biases = args_.key_biases_of(batch);
      for (int64_t key = 0; key < end; ++key) {
        seen_[key] = biases[key] == -static_cast<A>(__builtin_inf()) ? 0 : -1;
      }
    }
  }

  // Rows are the heads of a key-value head, for each of the queries.
  void add_scores(const Unit& unit, Range queries, const E* packed) const {
    const Sizes& sizes = args_.sizes;
    const Sequence sequence = args_.sequence(unit.batch);
    const int64_t rows = unit.num_heads * (queries.end - queries.begin), padded_rows = round_up(rows, tile_rows);
    place_rows(unit, sequence, queries);
    for (int64_t kv = 0; kv < cut_.kv_heads; ++kv) {
      const auto row_at = [&](int64_t row) {
        return row < rows ? args_.query.row(unit.batch, unit.head + kv * sizes.group_size() + row % unit.num_heads,
                                            queries.begin + row / unit.num_heads)
                          : nullptr;
      };
      pack_left(row_at, sizes.head_dim, padded_rows, queries_ + kv * rows_of_head_ * left_stride<E>(sizes.head_dim));
    }
    const int64_t end = end_of_keys(args_.rule, sequence, queries.end - 1);
    for (int64_t first = 0; first < end; first += panel) {
      for (int64_t kv = 0; kv < cut_.kv_heads; ++kv) {
        multiply(unit, kv, rows, first, packed);
      }
      for (int64_t query = 0; args_.weights != nullptr && query < queries.end - queries.begin; ++query) {
        const RowPlace<A>& place = of_queries_[query];
        vec<A> sums[tile_vectors];
        for (int v = 0; v < tile_vectors; ++v) {
          sums[v] = load(place.sums + v * lanes<A>);
          store(place.sums + v * lanes<A>, vec<A>{});
        }
        put(place, first, sums);
      }
    }
  }

  void place_rows(const Unit& unit, const Sequence& sequence, Range queries) const {
    for (int64_t query = queries.begin; query < queries.end; ++query) {
      const int64_t index = query - queries.begin, list = query / args_.rule.query_block - unit.list;
      const int64_t end = end_of_keys(args_.rule, sequence, query);
      if (args_.weights == nullptr) {
        for (int64_t head = 0; head < unit.num_heads; ++head) {
          places_[index * unit.num_heads + head] = {nullptr, 0, scores_ + (head * unit.num_lists + list) * stride_,
                                                    end};
        }
        continue;
      }
      A* const sums = sums_ + index * panel;
      __builtin_memset(sums, 0, static_cast<size_t>(panel) * sizeof(A));
      of_queries_[index] = {sums, 0, scores_ + list * stride_, end};
      for (int64_t head = 0; head < args_.sizes.num_heads; ++head) {
        places_[head / unit.num_heads * rows_of_head_ + index * unit.num_heads + head % unit.num_heads] = {
            sums, args_.weight(unit.batch, head, query), nullptr, end};
      }
    }
  }

  void multiply(const Unit& unit, int64_t kv, int64_t rows, int64_t first, const E* packed) const {
    const Sizes& sizes = args_.sizes;
    const E* keys = keys_;
    if (packed != nullptr) {
      keys = packed + (kv * cut_.panels * panel + first) * depth();
    } else {
      pack_panel(args_, unit.batch, unit.kv_head + kv, first, keys_);
    }
    const RowPlace<A>* const places = places_ + kv * rows_of_head_;
    const int64_t stride = left_stride<E>(sizes.head_dim);
    panel_product(round_up(rows, tile_rows), depth(), Operand<E>{queries_ + kv * rows_of_head_ * stride, stride, 1},
                  keys, [&](int64_t row, vec<A>(&numbers)[tile_vectors]) {
                    if (row >= rows) {
                      return;
                    }
                    if (args_.relu) {
                      for (auto& number : numbers) {
                        number = number < A(0) ? vec<A>{} : number;  // a NaN stays
                      }
                    }
                    const RowPlace<A>& place = places[row];
                    if (place.sums == nullptr) {
                      return put(place, first, numbers);
                    }
                    for (int v = 0; v < tile_vectors; ++v) {
                      A* const sums = place.sums + v * lanes<A>;
                      store(sums, load(sums) + place.weight * numbers[v]);
                    }
                  });
  }

  // A query's scores of the keys from `first` on, into those of its list.
  void put(const RowPlace<A>& place, int64_t first, const vec<A> (&scores)[tile_vectors]) const {
    for (int v = 0; v < tile_vectors; ++v) {
      const int64_t key = first + v * lanes<A>;
      vec<I> ordered = in_order<A>(scores[v]);
      if (args_.key_bias != nullptr) {
        ordered = load_integers(seen_ + key) != I(0) ? ordered : no_number<I>;
      }
      if (key + lanes<A> > place.end) {
        ordered = lane_numbers<I>() < static_cast<I>(clamp(place.end - key, 0, lanes<A>)) ? ordered : no_number<I>;
      }
      I* const to = place.scores + key;
      const vec<I> before = load_integers(to);
      store_integers(to, before > ordered ? before : ordered);
    }
  }

  void write_list(const Sequence& sequence, int64_t end, const I* scores, int32_t* list) const {
    const Names names = names_of(args_.rule, sequence, end);
    const I* of_names = scores;
    if (args_.rule.block_size > 1) {
      for (int64_t i = 0; i < names.count; ++i) {
        const Range keys = listed_keys(args_.rule, sequence, names.first + i);
        I largest = no_number<I>;
        for (int64_t key = keys.begin; key < smaller(keys.end, end); ++key) {
          largest = scores[key] > largest ? scores[key] : largest;
        }
        names_[i] = largest;
      }
      fill(names_ + names.count, round_up(names.count, word) - names.count);
      of_names = names_;
    }
    int64_t length = largest_.choose(of_names, round_up(names.count, word), args_.num_chosen, list);
    if (names.first != 0) {
      for (int64_t i = 0; i < length; ++i) {
        list[i] += static_cast<int32_t>(names.first);
      }
    }
    for (; length < args_.num_chosen; ++length) {
      list[length] = -1;
    }
  }

 public:
  // Zeros stand for keys behind the last.
  static void pack_panel(const ScoreChoice<T>& args, int64_t batch, int64_t kv_head, int64_t first, E* packed) {
    const Range keys = Range{0, args.sizes.num_keys}.within(first, panel);
    pack_transposed(RowsInOrder<T>{args.key.row(batch, kv_head, first), args.key.row_stride, keys}, args.sizes.head_dim,
                    panel, packed);
  }

 private:
  const ScoreChoice<T>& args_;
  Cut<T> cut_;
  int64_t stride_;
  int64_t rows_of_head_;
  LargestNumbers<I> largest_;
  E* queries_;               // left operands [kv_heads][rows_of_head][D]
  E* keys_;                  // a panel [D][panel]
  RowPlace<A>* places_;      // [kv_heads][rows_of_head]
  RowPlace<A>* of_queries_;  // [queries]
  A* sums_;                  // [queries][panel]
  I* scores_;                // [heads of lists][lists][stride]: the largest of what queries have come so far
  I* names_;                 // [stride]: the largest of each block of keys
  I* seen_;                  // [stride]: 0 for a key that its bias hides, else -1
};

}  // namespace

template <typename T>
int64_t score_choice_pack_bytes(const ScoreChoice<T>& args) {
  using E = multiplicand_t<T>;
  const Cut<T> cut(args);
  Arena arena(nullptr);
  arena.take<E>(cut.packs_ahead(args) ? cut.kv_heads * cut.panels * cut.panel * depth_of<E>(args.sizes.head_dim) : 0);
  return arena.bytes();
}

template <typename T>
int64_t score_choice_pack_units(const ScoreChoice<T>& args) {
  const Cut<T> cut(args);
  return cut.packs_ahead(args) ? cut.kv_heads * cut.panels : 0;
}

template <typename T>
void score_choice_pack(const ScoreChoice<T>& args, int64_t first_group, void* packs, int64_t begin, int64_t end) {
  using E = multiplicand_t<T>;
  const Cut<T> cut(args);
  const int64_t units = cut.kv_heads * cut.panels, bytes = score_choice_pack_bytes(args);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t head = (first_group + unit / units) * cut.kv_heads + unit % units / cut.panels;
    auto* const packed = reinterpret_cast<E*>(static_cast<char*>(packs) + unit / units * bytes);
    Chooser<T>::pack_panel(args, head / args.sizes.num_kv_heads, head % args.sizes.num_kv_heads,
                           unit % cut.panels * cut.panel,
                           packed + unit % units * cut.panel * depth_of<E>(args.sizes.head_dim));
  }
}

template <typename T>
int64_t score_choice_units(const ScoreChoice<T>& args) {
  return Cut<T>(args).units;
}

template <typename T>
int64_t score_choice_scratch_bytes(const ScoreChoice<T>& args) {
  Arena arena(nullptr);
  const Chooser<T> chooser(&arena, args);
  return arena.bytes();
}

template <typename T>
void choose_by_scores(const ScoreChoice<T>& args, int32_t* indices, int64_t first_group, void* packs, void* scratch,
                      int64_t begin, int64_t end) {
  const Cut<T> cut(args);
  Arena arena(scratch);
  const Chooser<T> chooser(&arena, args);
  const int64_t bytes = score_choice_pack_bytes(args);
  for (int64_t unit = begin; unit < end; ++unit) {
    const char* const packed = static_cast<char*>(packs) + unit / cut.units * bytes;
    chooser.choose(unit_at(args, cut, first_group + unit / cut.units, unit % cut.units),
                   bytes == 0 ? nullptr : reinterpret_cast<const multiplicand_t<T>*>(packed), indices);
  }
}

#define TORCHOPS_INSTANTIATE(T)                                                             \
  template int64_t score_choice_pack_bytes(const ScoreChoice<T>&);                          \
  template int64_t score_choice_pack_units(const ScoreChoice<T>&);                          \
  template void score_choice_pack(const ScoreChoice<T>&, int64_t, void*, int64_t, int64_t); \
  template int64_t score_choice_units(const ScoreChoice<T>&);                               \
  template int64_t score_choice_scratch_bytes(const ScoreChoice<T>&);                       \
  template void choose_by_scores(const ScoreChoice<T>&, int32_t*, int64_t, void*, void*, int64_t, int64_t);
TORCHOPS_INSTANTIATE(double)
TORCHOPS_INSTANTIATE(float)
TORCHOPS_INSTANTIATE(bfloat16)
TORCHOPS_INSTANTIATE(float16)
#undef TORCHOPS_INSTANTIATE

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
