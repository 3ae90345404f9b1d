#pragma once

#include <cstdint>

#include "core/heads.h"
#include "sparse_attention/lists.h"

// The choice of keys by codes, the one rule that every kernel goes by. Of the keys that a query may see, sink and local
// keys come first, then those that agree with it in more codes, then the nearer ones, then the earlier one.

namespace torchops::kernels::sparse_attention {

// Kernels count codes that agree in 8 bits, and tell these from keys that are taken, or not seen, whatever their codes.
inline constexpr int64_t most_subspaces = 253;

struct CodeChoice {
  Heads<const uint8_t> query_codes;  // [B, Hq, Lq, M]
  const uint8_t* key_codes;          // of each head of [B, Hkv], laid out as the device's kernel has it
  const uint8_t* seen;               // [B, key_stride]: 255, and 0 for a key that its bias hides; or null
  const int64_t* query_start;        // [B], or null for Lk - Lq
  const int64_t* key_start;          // [B], or null for 0
  int64_t num_heads;                 // Hq, a multiple of Hkv
  int64_t num_kv_heads;              // Hkv
  int64_t num_queries;               // Lq
  int64_t num_keys;                  // Lk
  int64_t key_stride;                // Lk and what the layout adds to it
  int64_t num_subspaces;             // M and what the layout adds to it
  int64_t num_chosen;                // k
  int64_t sink_keys;
  int64_t local_keys;
  bool is_causal;

  constexpr Sequence sequence(int64_t batch) const {
    return sequence_of(query_start, key_start, batch, num_queries, num_keys);
  }
  constexpr const uint8_t* codes_of(int64_t batch, int64_t head) const {
    return key_codes + (batch * num_kv_heads + head / (num_heads / num_kv_heads)) * num_subspaces * key_stride;
  }
  constexpr const uint8_t* seen_of(int64_t batch) const {
    return seen == nullptr ? nullptr : seen + batch * key_stride;
  }
};

// A query among the keys of its sequence.
struct QueryPlace {
  int64_t place;  // the key at its position; -1 and Lk for one before and one behind all keys
  int64_t end;    // behind the last key that it may see
  Range sink;
  Range local;
};

TORCHOPS_INLINE QueryPlace place_of(const CodeChoice& args, const Sequence& sequence, int64_t query) {
  const int64_t count = sequence.num_keys, at = sequence.query_start + query - sequence.key_start;
  const int64_t first = at - (args.is_causal ? args.local_keys - 1 : args.local_keys / 2);
  const int64_t end = end_of_keys({1, 1, args.is_causal}, sequence, query);  // of the list that is made
  return {clamp(at, -1, count),
          end,
          {clamp(-sequence.key_start, 0, end), clamp(args.sink_keys - sequence.key_start, 0, end)},
          {clamp(first, 0, end), clamp(first + args.local_keys, 0, end)}};
}

}  // namespace torchops::kernels::sparse_attention
