#include "sparse_attention/cpu/code_choice_kernel.h"

#include "core/cpu/arena.h"
#include "core/cpu/elements.h"
#include "sparse_attention/cpu/byte_masks.h"

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {

namespace {

// What a key counts for: nothing where it is not seen, else one more than its codes that agree, or this where it is
// taken whatever its codes.
constexpr uint8_t taken = 255;

struct Scratch {
  Arena arena;
  vbyte* codes;     // [queries_of_choice, M]: a query's code in every lane
  uint8_t* counts;  // [queries_of_choice, key_stride]
  uint64_t* ties;   // [key_stride / keys_of_word]: which keys count as much as the last one chosen
  int32_t* ranks;   // [key_stride / keys_of_word + 1]: how many of them there are in the words before

  Scratch(const CodeChoice& args, void* block)
      : arena(block),
        codes(arena.take<vbyte>(queries_of_choice * args.num_subspaces)),
        counts(arena.take<uint8_t>(queries_of_choice * args.key_stride)),
        ties(arena.take<uint64_t>(args.key_stride / keys_of_word)),
        ranks(arena.take<int32_t>(args.key_stride / keys_of_word + 1)) {}
};

int64_t words_of(int64_t num_keys) {
  return divide_up(num_keys, keys_of_word);
}

uint64_t bits_below(int64_t count) {
  return count >= keys_of_word ? ~uint64_t{0} : (uint64_t{1} << (count > 0 ? count : 0)) - 1;
}

uint64_t bits_within(const Range& keys, int64_t first) {
  return bits_below(keys.end - first) & ~bits_below(keys.begin - first);
}

// For the first words_of(end) words of keys: what they count for queries_of_choice queries.
void count_codes(const Scratch& scratch, const CodeChoice& args, const uint8_t* key_codes, const uint8_t* seen,
                 int64_t end) {
  const int64_t num_subspaces = args.num_subspaces, stride = args.key_stride;
  for (int64_t key = 0; key < words_of(end) * keys_of_word; key += vector_bytes) {
    vbyte counts[queries_of_choice];
    for (vbyte& count : counts) {
      count = vbyte{} + 1;
    }
    for (int64_t m = 0; m < num_subspaces; ++m) {
      const vbyte codes = load_bytes(key_codes + m * stride + key);
      for (int64_t q = 0; q < queries_of_choice; ++q) {
        counts[q] -= bit_cast<vbyte>(codes == scratch.codes[q * num_subspaces + m]);
      }
    }
    const vbyte visible = seen == nullptr ? vbyte{} - 1 : load_bytes(seen + key);
    for (int64_t q = 0; q < queries_of_choice; ++q) {
      const vbyte count = counts[q] & visible;
      __builtin_memcpy(scratch.counts + q * stride + key, &count, sizeof(count));
    }
  }
}

// Counts of one query, from those of its codes to what decides.
void take(const QueryPlace& query, uint8_t* counts) {
  for (const Range& keys : {query.sink, query.local}) {
    for (int64_t key = keys.begin; key < keys.end; ++key) {
      counts[key] = counts[key] == 0 ? 0 : taken;
    }
  }
  for (int64_t key = query.end; key < words_of(query.end) * keys_of_word; ++key) {
    counts[key] = 0;
  }
}

int64_t number_from(const uint8_t* counts, int64_t words, uint8_t least) {
  int64_t number = 0;
  for (int64_t w = 0; w < words; ++w) {
    number += __builtin_popcountll(word_of(counts + w * keys_of_word, [&](vbyte count) { return count >= least; }));
  }
  return number;
}

// The largest count that `wanted` keys reach; 1, that of any key that is seen, where there are fewer.
uint8_t last_count(const uint8_t* counts, int64_t words, int64_t num_subspaces, int64_t wanted) {
  if (number_from(counts, words, taken) >= wanted) {
    return taken;
  }
  int64_t reached = 1, missed = num_subspaces + 2;
  while (missed - reached > 1) {
    const int64_t middle = (reached + missed) / 2;
    (number_from(counts, words, static_cast<uint8_t>(middle)) >= wanted ? reached : missed) = middle;
  }
  return static_cast<uint8_t>(reached);
}

// How many ties lie before a key.
int64_t rank_of(const Scratch& scratch, int64_t key) {
  const int64_t word = key / keys_of_word, rest = key % keys_of_word;
  return scratch.ranks[word] + (rest == 0 ? 0 : __builtin_popcountll(scratch.ties[word] & bits_below(rest)));
}

// The keys among which the `wanted` nearest ties are all ties; there are as many at least.
Range nearest_ties(const Scratch& scratch, const QueryPlace& query, int64_t wanted) {
  const auto within = [&](int64_t distance) {
    return Range{clamp(query.place - distance, 0, query.end), clamp(query.place + distance + 1, 0, query.end)};
  };
  const auto number_in = [&](const Range& keys) { return rank_of(scratch, keys.end) - rank_of(scratch, keys.begin); };
  int64_t too_near = -1, far_enough = query.end + 1;
  while (far_enough - too_near > 1) {
    const int64_t middle = too_near + (far_enough - too_near) / 2;
    (number_in(within(middle)) >= wanted ? far_enough : too_near) = middle;
  }
  const Range keys = within(far_enough);
  // Of two that are equally far the earlier one is chosen.
  return {keys.begin, number_in(keys) > wanted ? keys.end - 1 : keys.end};
}

void choose(const Scratch& scratch, const CodeChoice& args, const QueryPlace& query, const uint8_t* counts,
            int32_t* indices) {
  const int64_t words = words_of(query.end);
  const uint8_t last = last_count(counts, words, args.num_subspaces, args.num_chosen);
  int64_t above = 0, ties = 0;
  for (int64_t w = 0; w < words; ++w) {
    const uint8_t* const of_word = counts + w * keys_of_word;
    scratch.ranks[w] = static_cast<int32_t>(ties);
    scratch.ties[w] = word_of(of_word, [&](vbyte count) { return count == last; });
    ties += __builtin_popcountll(scratch.ties[w]);
    above += __builtin_popcountll(word_of(of_word, [&](vbyte count) { return count > last; }));
  }
  scratch.ranks[words] = static_cast<int32_t>(ties);
  const int64_t wanted = args.num_chosen - above;
  const Range nearest = wanted >= ties ? Range{0, query.end} : nearest_ties(scratch, query, wanted);
  int64_t number = 0;
  for (int64_t w = 0; w < words; ++w) {
    const int64_t first = w * keys_of_word;
    uint64_t chosen = word_of(counts + first, [&](vbyte count) { return count > last; }) |
                      (scratch.ties[w] & bits_within(nearest, first));
    for (; chosen != 0; chosen &= chosen - 1) {
      indices[number++] = static_cast<int32_t>(first + __builtin_ctzll(chosen));
    }
  }
  for (; number < args.num_chosen; ++number) {
    indices[number] = -1;
  }
}

}  // namespace

int64_t choose_by_codes_scratch_bytes(const CodeChoice& args) {
  return Scratch(args, nullptr).arena.bytes();
}

void choose_by_codes(const CodeChoice& args, void* block, int64_t begin, int64_t end) {
  const Scratch scratch(args, block);
  const int64_t tiles = divide_up(args.num_queries, queries_of_choice);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t head = unit / tiles % args.num_heads, batch = unit / tiles / args.num_heads;
    const int64_t first = unit % tiles * queries_of_choice;
    const int64_t count = clamp(args.num_queries - first, 0, queries_of_choice);
    const Sequence sequence = args.sequence(batch);
    for (int64_t q = 0; q < queries_of_choice; ++q) {
      const uint8_t* const codes = args.query_codes.row(batch, head, first + (q < count ? q : 0));
      for (int64_t m = 0; m < args.num_subspaces; ++m) {
        scratch.codes[q * args.num_subspaces + m] = vbyte{} + codes[m];
      }
    }
    count_codes(scratch, args, args.codes_of(batch, head), args.seen_of(batch),
                place_of(args, sequence, first + count - 1).end);
    for (int64_t q = 0; q < count; ++q) {
      const QueryPlace query = place_of(args, sequence, first + q);
      uint8_t* const counts = scratch.counts + q * args.key_stride;
      take(query, counts);
      choose(scratch, args, query, counts, args.indices_of(batch, head, first + q));
    }
  }
}

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
