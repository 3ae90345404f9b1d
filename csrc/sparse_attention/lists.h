#pragma once

#include <cstdint>

#include "core/attention/positions.h"
#include "core/heads.h"

// Which keys the entries of a list name, the one rule that every kernel goes by. With absolute positions
// p = query_start + i and t = key_start + j, an entry e names the keys with floor(t / block_size) = e, or key e itself
// where block_size is 1; a negative one, or one of which there is no key, names none. A causal query sees what its list
// names as far as t <= p.

namespace torchops::kernels::sparse_attention {

using namespace attention;

struct ListRule {
  int64_t block_size;   // of keys, at most unbounded
  int64_t query_block;  // queries that share a list, at most max(1, Lq)
  bool is_causal;
};

// The keys that an entry names.
TORCHOPS_INLINE Range listed_keys(const ListRule& rule, const Sequence& sequence, int64_t entry) {
  if (rule.block_size == 1) {
    return entry >= 0 && entry < sequence.num_keys ? Range{entry, entry + 1} : Range{0, 0};
  }
  const int64_t last = sequence.key_start + sequence.num_keys - 1;
  if (entry < 0 || last < 0 || entry > last / rule.block_size) {
    return {0, 0};
  }
  const int64_t begin = entry * rule.block_size - sequence.key_start;
  return {clamp(begin, 0, sequence.num_keys), clamp(begin + rule.block_size, 0, sequence.num_keys)};
}

// The first key of the block that a key lies in, and behind the last one; -1 for a key that no entry names.
TORCHOPS_INLINE int64_t begin_of_block(const ListRule& rule, const Sequence& sequence, int64_t key) {
  const int64_t position = sequence.key_start + key;
  return rule.block_size == 1 ? key : position < 0 ? -1 : clamp(key - position % rule.block_size, 0, sequence.num_keys);
}
TORCHOPS_INLINE int64_t end_of_block(const ListRule& rule, const Sequence& sequence, int64_t key) {
  const int64_t before = (sequence.key_start + key) % rule.block_size;
  return rule.block_size == 1 ? key + 1 : clamp(key - before + rule.block_size, 0, sequence.num_keys);
}

// Behind the last key that a query may see.
TORCHOPS_INLINE int64_t end_of_keys(const ListRule& rule, const Sequence& sequence, int64_t query) {
  const int64_t behind = sequence.query_start + query + 1 - sequence.key_start;
  return rule.is_causal ? clamp(behind, 0, sequence.num_keys) : sequence.num_keys;
}

struct CodeChoice;

// indices [B, Hi, Nq, k], of which one of the two is there; or a choice in their place, by which a kernel makes the
// lists where it needs them.
struct Lists {
  Heads<const int32_t> narrow;
  Heads<const int64_t> wide;
  int64_t num_heads;         // Hi, which divides Hq
  int64_t num_lists;         // Nq
  int64_t num_listed;        // k
  const CodeChoice* choice;  // in the host's memory; null for indices
};

}  // namespace torchops::kernels::sparse_attention
