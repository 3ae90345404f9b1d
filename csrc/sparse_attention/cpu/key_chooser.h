#pragma once

#include "core/cpu/arena.h"
#include "core/cpu/elements.h"
#include "sparse_attention/cpu/byte_masks.h"
#include "sparse_attention/cpu/code_choice_kernel.h"

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {

inline uint64_t bits_below(int64_t count) {
  return count >= keys_of_word ? ~uint64_t{0} : (uint64_t{1} << (count > 0 ? count : 0)) - 1;
}

inline uint64_t bits_within(const Range& keys, int64_t first) {
  return bits_below(keys.end - first) & ~bits_below(keys.begin - first);
}

// Makes the lists of queries_of_choice queries at a time, in scratch memory of its own.
class KeyChooser {
 public:
  // Without a choice it takes no memory, and nobody may ask it.
  KeyChooser(Arena* arena, const CodeChoice* choice) : choice_(choice) {
    const int64_t stride = choice == nullptr ? 0 : choice->key_stride;
    codes_ = arena->take<vbyte>(choice == nullptr ? 0 : queries_of_choice * choice->num_subspaces);
    counts_ = arena->take<uint8_t>(queries_of_choice * stride);
    above_ = arena->take<uint64_t>(words_of(stride));
    ties_ = arena->take<uint64_t>(words_of(stride));
    ranks_ = arena->take<int32_t>(choice == nullptr ? 0 : words_of(stride) + 1);
  }

  // Of the queries of a head from `first` on, `count` and at most queries_of_choice: keys, ascending, `stride` numbers
  // apart, and how many.
  void choose(int64_t batch, int64_t head, int64_t first, int64_t count, int32_t* keys, int64_t stride,
              int64_t* lengths) const {
    const Sequence sequence = choice_->sequence(batch);
    for (int64_t q = 0; q < queries_of_choice; ++q) {
      const uint8_t* const codes = choice_->query_codes.row(batch, head, first + (q < count ? q : 0));
      for (int64_t m = 0; m < choice_->num_subspaces; ++m) {
        codes_[q * choice_->num_subspaces + m] = vbyte{} + codes[m];
      }
    }
    count_codes(choice_->codes_of(batch, head), choice_->seen_of(batch),
                place_of(*choice_, sequence, first + count - 1).end);
    for (int64_t q = 0; q < count; ++q) {
      const QueryPlace query = place_of(*choice_, sequence, first + q);
      uint8_t* const counts = counts_ + q * choice_->key_stride;
      take(query, counts);
      lengths[q] = choose(query, counts, keys + q * stride);
    }
  }

 private:
  // What a key counts for: nothing where it is not seen, else one more than its codes that agree, or this where it is
  // taken whatever its codes.
  static constexpr uint8_t taken = 255;

  static int64_t words_of(int64_t num_keys) { return divide_up(num_keys, keys_of_word); }

  // For the first words_of(end) words of keys: what they count for queries_of_choice queries.
  void count_codes(const uint8_t* key_codes, const uint8_t* seen, int64_t end) const {
    const int64_t num_subspaces = choice_->num_subspaces, stride = choice_->key_stride;
    for (int64_t key = 0; key < words_of(end) * keys_of_word; key += vector_bytes) {
      vbyte counts[queries_of_choice];
      for (vbyte& count : counts) {
        count = vbyte{} + 1;
      }
      for (int64_t m = 0; m < num_subspaces; ++m) {
        const vbyte codes = load_bytes(key_codes + m * stride + key);
        for (int64_t q = 0; q < queries_of_choice; ++q) {
          counts[q] -= bit_cast<vbyte>(codes == codes_[q * num_subspaces + m]);
        }
      }
      const vbyte visible = seen == nullptr ? vbyte{} - 1 : load_bytes(seen + key);
      for (int64_t q = 0; q < queries_of_choice; ++q) {
        const vbyte count = counts[q] & visible;
        __builtin_memcpy(counts_ + q * stride + key, &count, sizeof(count));
      }
    }
  }

  // Counts of one query, from those of its codes to what decides.
  static void take(const QueryPlace& query, uint8_t* counts) {
    for (const Range& keys : {query.sink, query.local}) {
      for (int64_t key = keys.begin; key < keys.end; ++key) {
        counts[key] = counts[key] == 0 ? 0 : taken;
      }
    }
    for (int64_t key = query.end; key < words_of(query.end) * keys_of_word; ++key) {
      counts[key] = 0;
    }
  }

  static int64_t number_from(const uint8_t* counts, int64_t words, uint8_t least) {
    int64_t number = 0;
    for (int64_t w = 0; w < words; ++w) {
      number += __builtin_popcountll(word_of(counts + w * keys_of_word, [&](vbyte count) { return count >= least; }));
    }
    return number;
  }

  // The largest count that num_chosen keys reach; 1, that of any key that is seen, where there are fewer.
  uint8_t last_count(const uint8_t* counts, int64_t words) const {
    const int64_t wanted = choice_->num_chosen;
    if (number_from(counts, words, taken) >= wanted) {
      return taken;
    }
    int64_t reached = 1, missed = choice_->num_subspaces + 2;
    while (missed - reached > 1) {
      const int64_t middle = (reached + missed) / 2;
      (number_from(counts, words, static_cast<uint8_t>(middle)) >= wanted ? reached : missed) = middle;
    }
    return static_cast<uint8_t>(reached);
  }

  // How many ties lie before a key.
  int64_t rank_of(int64_t key) const {
    const int64_t word = key / keys_of_word, rest = key % keys_of_word;
    return ranks_[word] + (rest == 0 ? 0 : __builtin_popcountll(ties_[word] & bits_below(rest)));
  }

  // The keys among which the `wanted` nearest ties are all ties; there are as many at least.
  Range nearest_ties(const QueryPlace& query, int64_t wanted) const {
    const auto within = [&](int64_t distance) {
      return Range{clamp(query.place - distance, 0, query.end), clamp(query.place + distance + 1, 0, query.end)};
    };
    const auto number_in = [&](const Range& keys) { return rank_of(keys.end) - rank_of(keys.begin); };
    int64_t too_near = -1, far_enough = query.end + 1;
    while (far_enough - too_near > 1) {
      const int64_t middle = too_near + (far_enough - too_near) / 2;
      (number_in(within(middle)) >= wanted ? far_enough : too_near) = middle;
    }
    const Range keys = within(far_enough);
    // Of two that are equally far the earlier one is chosen.
    return {keys.begin, number_in(keys) > wanted ? keys.end - 1 : keys.end};
  }

  int64_t choose(const QueryPlace& query, const uint8_t* counts, int32_t* keys) const {
    const int64_t words = words_of(query.end);
    const uint8_t last = last_count(counts, words);
    int64_t above = 0, ties = 0;
    for (int64_t w = 0; w < words; ++w) {
      const uint8_t* const of_word = counts + w * keys_of_word;
      ranks_[w] = static_cast<int32_t>(ties);
      ties_[w] = word_of(of_word, [&](vbyte count) { return count == last; });
      above_[w] = word_of(of_word, [&](vbyte count) { return count > last; });
      ties += __builtin_popcountll(ties_[w]);
      above += __builtin_popcountll(above_[w]);
    }
    ranks_[words] = static_cast<int32_t>(ties);
    const int64_t wanted = choice_->num_chosen - above;
    const Range nearest = wanted >= ties ? Range{0, query.end} : nearest_ties(query, wanted);
    int64_t number = 0;
    for (int64_t w = 0; w < words; ++w) {
      const int64_t first = w * keys_of_word;
      for (uint64_t chosen = above_[w] | (ties_[w] & bits_within(nearest, first)); chosen != 0; chosen &= chosen - 1) {
        keys[number++] = static_cast<int32_t>(first + __builtin_ctzll(chosen));
      }
    }
    return number;
  }

  const CodeChoice* choice_;
  vbyte* codes_;     // [queries_of_choice, M]: a query's code in every lane
  uint8_t* counts_;  // [queries_of_choice, key_stride]
  uint64_t* above_;  // [key_stride / keys_of_word]: which keys count more than the last one chosen
  uint64_t* ties_;   // [key_stride / keys_of_word]: which keys count as much
  int32_t* ranks_;   // [key_stride / keys_of_word + 1]: how many of these there are in the words before
};

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
