#pragma once

#include "sparse_attention/cpu/tile_rows.h"
#include "sparse_attention/scores.h"

// Queries of one head, and their way through the columns of topk_scores.

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {

// Some of the columns of a query that have a score, in ascending order, and their keys.
struct Columns {
  const int32_t* keys;
  const int32_t* columns;
  int64_t count;
};

template <typename A>
void hide_columns(A* scores, int64_t count) {
  for (int64_t column = 0; column < count; ++column) {
    scores[column] = -static_cast<A>(__builtin_inf());
  }
}

// At most most_rows queries on their way, and most_keys columns at a time.
template <typename T>
class ColumnWalk {
 public:
  ColumnWalk(Arena* arena, const Attention<T>& inputs) : inputs_(inputs) {
    progress_ = arena->take<Progress>(most_rows);
    keys_ = arena->take<int32_t>(most_keys);
    columns_ = arena->take<int32_t>(most_keys);
  }

  void start(int64_t row, int64_t batch, int64_t head, int64_t query) const {
    const Sequence sequence = inputs_.sequence(batch);
    progress_[row] = {sequence,
                      end_of_keys(inputs_.rule, sequence, query),
                      batch,
                      inputs_.list_head(head),
                      query / inputs_.rule.query_block,
                      0,
                      0};
  }

  // The next columns of a row whose keys are of `range`, `most` at most; none where the next entry that the query sees
  // begins at `end` or behind it, resp. there is none.
  Columns next(int64_t row, int64_t end, Range range, int64_t most) const {
    Progress& at = progress_[row];
    const int64_t count = with_entries(at, [&](const auto* entries) {
      return inputs_.rule.block_size == 1 ? next_keys(at, entries, end, range, most)
                                          : next_blocks(at, entries, end, range, most);
    });
    return {keys_, columns_, count};
  }

  // The first key that a row's list names, whether the query sees it or not; behind all keys where it names none.
  int64_t first_key(int64_t row) const {
    const Progress& at = progress_[row];
    return with_entries(at, [&](const auto* entries) {
      int64_t first = inputs_.sizes.num_keys;
      for (int64_t i = 0; i < inputs_.lists.num_listed; ++i) {
        const Range named = listed_keys(inputs_.rule, at.sequence, entries[i]);
        first = named.empty() ? first : smaller(first, named.begin);
      }
      return first;
    });
  }

 private:
  struct Progress {
    Sequence sequence;
    int64_t end_of_keys;
    int64_t batch;
    int64_t list_head;
    int64_t list;
    int64_t entry;
    int64_t key;  // of the entry, those before are done
  };

  template <typename Body>
  int64_t with_entries(const Progress& at, const Body& body) const {
    const Lists& lists = inputs_.lists;
    return lists.wide.data == nullptr ? body(lists.narrow.row(at.batch, at.list_head, at.list))
                                      : body(lists.wide.row(at.batch, at.list_head, at.list));
  }

  template <typename Index>
  int64_t next_keys(Progress& at, const Index* entries, int64_t end, Range range, int64_t most) const {
    const int64_t num_listed = inputs_.lists.num_listed;
    int64_t count = 0, entry = at.entry;
    for (; entry < num_listed && count < most; ++entry) {
      const int64_t key = entries[entry];
      if (key >= end && key < at.end_of_keys) {
        break;
      }
      keys_[count] = static_cast<int32_t>(key);
      columns_[count] = static_cast<int32_t>(entry);
      count += range.contains(key) && key < at.end_of_keys ? 1 : 0;
    }
    at.entry = entry;
    return count;
  }

  template <typename Index>
  int64_t next_blocks(Progress& at, const Index* entries, int64_t end, Range range, int64_t most) const {
    const ListRule& rule = inputs_.rule;
    int64_t count = 0;
    while (at.entry < inputs_.lists.num_listed && count < most) {
      const int64_t entry = entries[at.entry];
      const Range named = listed_keys(rule, at.sequence, entry);
      if (!named.empty() && named.begin >= end && named.begin < at.end_of_keys) {
        break;
      }
      const int64_t first = larger(larger(named.begin, range.begin), at.key);
      const int64_t last = smaller(smaller(named.end, range.end), at.end_of_keys);
      const int64_t taken = smaller(last - first, most - count);
      for (int64_t key = first; key < first + taken; ++key) {
        keys_[count] = static_cast<int32_t>(key);
        columns_[count] =
            static_cast<int32_t>(at.entry * rule.block_size + key - first_column_key(rule, at.sequence, entry));
        ++count;
      }
      if (first + taken < last) {
        at.key = first + taken;
      } else {
        at.key = 0;
        ++at.entry;
      }
    }
    return count;
  }

  static constexpr int64_t larger(int64_t one, int64_t other) { return one > other ? one : other; }

  const Attention<T>& inputs_;
  Progress* progress_;
  int32_t *keys_, *columns_;
};

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
