#pragma once

#include "core/cpu/arena.h"
#include "core/cpu/elements.h"
#include "sparse_attention/attention.h"
#include "sparse_attention/cpu/key_chooser.h"

// The lists of a tile of queries in one form: entries that name keys, in ascending order, one behind the other.

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {

// Entries that name the same keys are ordered by the bits of their biases: then the order of the caller's list, biases
// along with it, does not show.
template <typename A>
uint64_t order_of_bias(A bias) {
  if constexpr (sizeof(A) == sizeof(uint32_t)) {
    return bit_cast<uint32_t>(bias);
  } else {
    return bit_cast<uint64_t>(bias);
  }
}

// One list in scratch memory.
struct List {
  int32_t* begin;  // the first key of each entry
  int32_t* end;    // behind its last one; for entries that name a block
  int32_t* place;  // where it stands in the caller's list
  int64_t length;
  int64_t first_key;  // of all that the caller's list names, of whatever range
};

class TileLists {
 public:
  TileLists(Arena* arena, const Lists& lists, int64_t num_lists) : chooser_(arena, lists.choice) {
    // Lists that lie 4096 bytes apart would share their places in the first cache.
    stride_ = round_up(lists.num_listed, 16) + 16;
    begin_ = arena->take<int32_t>(num_lists * stride_);
    end_ = arena->take<int32_t>(num_lists * stride_);
    place_ = arena->take<int32_t>(num_lists * stride_);
    length_ = arena->take<int64_t>(num_lists);
    first_key_ = arena->take<int64_t>(num_lists);
    sorted_ = arena->take<uint64_t>(lists.num_listed);
    spare_ = arena->take<uint64_t>(lists.num_listed);
    counts_ = arena->take<int32_t>(int64_t{1} << digit_bits);
  }

  List operator[](int64_t list) const {
    return {begin_ + list * stride_, end_ + list * stride_, place_ + list * stride_, length_[list], first_key_[list]};
  }

  // The entries of a list as far as they name keys of `range`.
  template <typename A>
  void fill(int64_t to, const Lists& lists, const ListRule& rule, const Sequence& sequence, int64_t batch,
            int64_t list_head, int64_t list, Range range, const A* biases) const {
    const auto read = [&](const auto* entries) {
      if (rule.block_size > 1) {
        collect(to, entries, lists.num_listed, rule, sequence, range);
      } else if (copy_keys(to, entries, lists.num_listed, sequence.num_keys, range)) {
        return;
      } else {
        collect_keys(to, entries, lists.num_listed, sequence.num_keys, range);
      }
      if (!is_ascending((*this)[to])) {
        sort((*this)[to], sequence.num_keys, rule.block_size > 1);
      }
    };
    lists.wide.data == nullptr ? read(lists.narrow.row(batch, list_head, list))
                               : read(lists.wide.row(batch, list_head, list));
    if (biases != nullptr) {
      order_equal_entries((*this)[to], biases);
    }
  }

  // The lists of `count` queries from `first` on, which their codes choose, as far as they name keys of `range`.
  void choose(int64_t batch, int64_t head, int64_t first, int64_t count, const Sequence& sequence, Range range) const {
    for (int64_t q = 0; q < count; q += queries_of_choice) {
      chooser_.choose(batch, head, first + q, smaller(count - q, queries_of_choice), begin_ + q * stride_, stride_,
                      length_ + q);
    }
    for (int64_t q = 0; q < count; ++q) {
      int32_t* const keys = begin_ + q * stride_;
      first_key_[q] = length_[q] == 0 ? sequence.num_keys : keys[0];
      const int64_t begin = number_below(keys, length_[q], range.begin);
      length_[q] = number_below(keys, length_[q], range.end) - begin;
      __builtin_memmove(keys, keys + begin, static_cast<size_t>(length_[q]) * sizeof(int32_t));
    }
  }

 private:
  static constexpr int digit_bits = 11;

  // Of ascending keys.
  static int64_t number_below(const int32_t* keys, int64_t length, int64_t bound) {
    int64_t below = 0, rest = length;
    while (rest > 0) {
      const int64_t half = rest / 2;
      if (keys[below + half] < bound) {
        below += half + 1;
        rest -= half + 1;
      } else {
        rest = half;
      }
    }
    return below;
  }

  template <typename Index>
  void collect(int64_t to, const Index* entries, int64_t count, const ListRule& rule, const Sequence& sequence,
               Range range) const {
    const List here = (*this)[to];
    int64_t length = 0, first_key = sequence.num_keys;
    for (int64_t i = 0; i < count; ++i) {
      const Range keys = listed_keys(rule, sequence, entries[i]);
      const int64_t begin = keys.begin > range.begin ? keys.begin : range.begin;
      const int64_t end = keys.end < range.end ? keys.end : range.end;
      here.begin[length] = static_cast<int32_t>(begin);
      here.end[length] = static_cast<int32_t>(end);
      here.place[length] = static_cast<int32_t>(i);
      length += begin < end ? 1 : 0;
      first_key = !keys.empty() && keys.begin < first_key ? keys.begin : first_key;
    }
    first_key_[to] = first_key;
    length_[to] = length;
  }

  // The same where an entry is its key: nobody asks where it ends.
  template <typename Index>
  void collect_keys(int64_t to, const Index* entries, int64_t count, int64_t num_keys, Range range) const {
    const List here = (*this)[to];
    int64_t length = 0, first_key = num_keys;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t key = entries[i];
      here.begin[length] = static_cast<int32_t>(key);
      here.place[length] = static_cast<int32_t>(i);
      length += range.contains(key) ? 1 : 0;
      first_key = key >= 0 && key < first_key ? key : first_key;
    }
    first_key_[to] = first_key;
    length_[to] = length;
  }

  // The same of a list as selectors write them, keys of the range in ascending order and -1 behind: vectors of entries
  // at a time. False, and nothing said, of another one.
  template <typename Index>
  bool copy_keys(int64_t to, const Index* entries, int64_t count, int64_t num_keys, Range range) const {
    while (count > 0 && entries[count - 1] == -1) {
      --count;
    }
    const List here = (*this)[to];
    bool ascending = true;
    for (int64_t i = 1; i < count; ++i) {
      ascending &= entries[i - 1] <= entries[i];
    }
    if (count > 0 && !(ascending && range.begin <= entries[0] && entries[count - 1] < range.end)) {
      return false;
    }
    for (int64_t i = 0; i < count; ++i) {
      here.begin[i] = static_cast<int32_t>(entries[i]);
      here.place[i] = static_cast<int32_t>(i);
    }
    first_key_[to] = count == 0 ? num_keys : here.begin[0];
    length_[to] = count;
    return true;
  }

  static bool is_ascending(const List& list) {
    for (int64_t i = 1; i < list.length; ++i) {
      if (list.begin[i] < list.begin[i - 1]) {
        return false;
      }
    }
    return true;
  }

  // By digits, from the lowest; entries that begin with the same key keep their order.
  void sort(const List& list, int64_t num_keys, bool with_ends) const {
    uint64_t *from = sorted_, *to = spare_;
    for (int64_t i = 0; i < list.length; ++i) {
      from[i] = static_cast<uint64_t>(list.begin[i]) << 32 | static_cast<uint64_t>(i);
    }
    for (int shift = 0; num_keys >> shift != 0; shift += digit_bits) {
      const auto digit_of = [shift](uint64_t key) { return key >> (32 + shift) & ((1 << digit_bits) - 1); };
      __builtin_memset(counts_, 0, sizeof(int32_t) << digit_bits);
      for (int64_t i = 0; i < list.length; ++i) {
        ++counts_[digit_of(from[i])];
      }
      for (int32_t digit = 0, before = 0; digit < 1 << digit_bits; ++digit) {
        const int32_t here = counts_[digit];
        counts_[digit] = before;
        before += here;
      }
      for (int64_t i = 0; i < list.length; ++i) {
        to[counts_[digit_of(from[i])]++] = from[i];
      }
      uint64_t* const other = from;
      from = to;
      to = other;
    }
    if (with_ends) {
      permute(list.end, from, to, list.length);
    }
    permute(list.place, from, to, list.length);
    for (int64_t i = 0; i < list.length; ++i) {
      list.begin[i] = static_cast<int32_t>(from[i] >> 32);
    }
  }

  static void permute(int32_t* numbers, const uint64_t* order, uint64_t* spare, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      spare[i] = static_cast<uint64_t>(numbers[order[i] & 0xffffffff]);
    }
    for (int64_t i = 0; i < count; ++i) {
      numbers[i] = static_cast<int32_t>(spare[i]);
    }
  }

  template <typename A>
  static void order_equal_entries(const List& list, const A* biases) {
    for (int64_t i = 1; i < list.length; ++i) {
      const int32_t place = list.place[i];
      int64_t at = i;
      for (; at > 0 && list.begin[at - 1] == list.begin[i] &&
             order_of_bias(biases[list.place[at - 1]]) > order_of_bias(biases[place]);
           --at) {
        list.place[at] = list.place[at - 1];
      }
      list.place[at] = place;
    }
  }

  KeyChooser chooser_;
  int64_t stride_;
  int32_t *begin_, *end_, *place_;
  int64_t *length_, *first_key_;
  uint64_t *sorted_, *spare_;
  int32_t* counts_;
};

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
