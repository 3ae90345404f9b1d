#include "span_attention/span_attention.h"

#include <algorithm>

#include "core/attention/cpu/device.h"
#include "core/cpu/aligned_buffer.h"
#include "core/library.h"
#include "core/parallel.h"
#include "span_attention/attending.h"
#include "span_attention/cpu/backward_kernel.h"
#include "span_attention/cpu/decode_kernel.h"
#include "span_attention/cpu/forward_kernel.h"

namespace torchops {
namespace {

using kernels::span_attention::Sizes;

// Key-value heads that are packed at a time: enough for all threads, and as many as stay in the caches.
int64_t heads_in_a_wave(const Sizes& sizes, int64_t bytes_of_head) {
  constexpr int64_t bytes_of_wave = int64_t{8} << 20;
  const int64_t threads = at::get_num_threads();
  const int64_t fitting = bytes_of_wave / std::max<int64_t>(bytes_of_head, 1) / threads * threads;
  return std::min(std::max(threads, fitting), sizes.batch * sizes.num_kv_heads);
}

// Calls work(first head, heads, packs) for each wave.
template <typename Work>
void for_each_wave(const Sizes& sizes, int64_t bytes_of_head, const Work& work) {
  const int64_t num_heads = sizes.batch * sizes.num_kv_heads;
  const int64_t wave = heads_in_a_wave(sizes, bytes_of_head);
  AlignedBuffer<char> packs(static_cast<size_t>(wave * bytes_of_head));
  for (int64_t first = 0; first < num_heads; first += wave) {
    work(first, std::min(wave, num_heads - first), packs.data());
  }
}

// At most what a tile of `rows` queries or keys costs: several multiplications of a product are one operation.
int64_t tile_cost(const Sizes& sizes, int64_t rows, int64_t others) {
  constexpr int64_t at_once = 4;
  return std::min<int64_t>(rows, 64) * others * (sizes.head_dim + sizes.value_dim) / at_once;
}

// Few queries without a backward to come; whether they are few enough.
template <typename T>
bool decode(const kernels::span_attention::AttentionForward<T>& args) {
  const Sizes& sizes = args.inputs.sizes;
  const auto pieces = args.normalizer != nullptr ? 0 : TORCHOPS_KERNEL(span_attention, decode_pieces<T>)(args.inputs);
  if (pieces == 0) {
    return false;
  }
  AlignedBuffer<char> partials(
      static_cast<size_t>(TORCHOPS_KERNEL(span_attention, decode_partial_bytes<T>)(args.inputs)));
  const auto scratch_bytes = TORCHOPS_KERNEL(span_attention, decode_scratch_bytes<T>)(args.inputs);
  const int64_t rows = sizes.num_queries * sizes.group_size();
  parallel_tiles(sizes.batch * sizes.num_kv_heads * pieces, tile_cost(sizes, rows + 3, sizes.num_keys / pieces),
                 scratch_bytes, [&](char* scratch, int64_t begin, int64_t end) {
                   TORCHOPS_KERNEL(span_attention, decode<T>)(args.inputs, partials.data(), scratch, begin, end);
                 });
  parallel_units(sizes.batch * sizes.num_heads * sizes.num_queries, pieces * sizes.value_dim,
                 [&](int64_t begin, int64_t end) {
                   TORCHOPS_KERNEL(span_attention, decode_merge<T>)(args, partials.data(), begin, end);
                 });
  return true;
}

// The CPU, for span_attention/attending.h.
class CpuSpanAttention : public CpuAttention {
 public:
  using CpuAttention::CpuAttention;

  template <typename T>
  void forward(const kernels::span_attention::AttentionForward<T>& args) const {
    if (decode(args)) {
      return;
    }
    const Sizes& sizes = args.inputs.sizes;
    const auto pack_bytes = TORCHOPS_KERNEL(span_attention, forward_pack_bytes<T>)(sizes);
    const auto pack_units = TORCHOPS_KERNEL(span_attention, forward_pack_units<T>)(sizes);
    const auto units = TORCHOPS_KERNEL(span_attention, forward_units<T>)(sizes);
    const auto scratch_bytes = TORCHOPS_KERNEL(span_attention, forward_scratch_bytes<T>)(sizes);
    for_each_wave(sizes, pack_bytes, [&](int64_t first, int64_t heads, char* packs) {
      parallel_units(heads * pack_units, sizes.head_dim * 256, [&](int64_t begin, int64_t end) {
        TORCHOPS_KERNEL(span_attention, forward_pack<T>)(args.inputs, first, packs, begin, end);
      });
      parallel_tiles(heads * units, tile_cost(sizes, sizes.num_queries, sizes.num_keys), scratch_bytes,
                     [&](char* scratch, int64_t begin, int64_t end) {
                       TORCHOPS_KERNEL(span_attention, forward<T>)(args, first, packs, scratch, begin, end);
                     });
    });
  }

  template <typename T>
  void backward(const kernels::span_attention::AttentionBackward<T>& args, const SpanMask& mask) const {
    const Sizes& sizes = args.inputs.sizes;
    const bool for_queries = mask.query();
    const bool for_keys = mask.key() || mask.value() || mask.key_bias();
    const auto pack_bytes = TORCHOPS_KERNEL(span_attention, backward_pack_bytes<T>)(sizes);
    const auto pack_units = TORCHOPS_KERNEL(span_attention, backward_pack_units<T>)(sizes);
    const auto query_units = TORCHOPS_KERNEL(span_attention, backward_query_units<T>)(sizes);
    const auto key_units = TORCHOPS_KERNEL(span_attention, backward_key_units<T>)(sizes);
    const auto whole_bytes = TORCHOPS_KERNEL(span_attention, backward_scratch_bytes<T>)(sizes, true);
    const auto tile_bytes = TORCHOPS_KERNEL(span_attention, backward_scratch_bytes<T>)(sizes, false);
    for_each_wave(sizes, pack_bytes, [&](int64_t first, int64_t heads, char* packs) {
      parallel_units(heads * pack_units, sizes.head_dim * 512, [&](int64_t begin, int64_t end) {
        TORCHOPS_KERNEL(span_attention, backward_pack<T>)(args, first, packs, begin, end);
      });
      // A pass over whole heads computes the probabilities once instead of twice; heads that do not fill
      // the threads are cut into tiles.
      const int64_t threads = at::get_num_threads();
      const int64_t whole = for_queries && for_keys ? heads / threads * threads : 0;
      parallel_tiles(whole, 4 * query_units * tile_cost(sizes, sizes.num_queries, sizes.num_keys), whole_bytes,
                     [&](char* scratch, int64_t begin, int64_t end) {
                       TORCHOPS_KERNEL(span_attention, backward_heads<T>)(args, first, packs, scratch, begin, end);
                     });
      char* const rest = packs + whole * pack_bytes;
      parallel_tiles(for_queries ? (heads - whole) * query_units : 0,
                     2 * tile_cost(sizes, sizes.num_queries, sizes.num_keys), tile_bytes,
                     [&](char* scratch, int64_t begin, int64_t end) {
                       TORCHOPS_KERNEL(span_attention, backward_queries<T>)
                       (args, first + whole, rest, scratch, begin, end);
                     });
      parallel_tiles(for_keys ? (heads - whole) * key_units : 0,
                     2 * sizes.group_size() * tile_cost(sizes, sizes.num_keys, sizes.num_queries), tile_bytes,
                     [&](char* scratch, int64_t begin, int64_t end) {
                       TORCHOPS_KERNEL(span_attention, backward_keys<T>)
                       (args, first + whole, rest, scratch, begin, end);
                     });
    });
  }
};

}  // namespace

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("span_attention", flattened<span_attention_on<CpuSpanAttention>>);
  m.impl("span_attention_lse", flattened<span_attention_lse_on<CpuSpanAttention>>);
  m.impl("_span_attention_forward", flattened<span_attention_forward_on<CpuSpanAttention>>);
  m.impl("_span_attention_backward", flattened<span_attention_backward_on<CpuSpanAttention>>);
}

}  // namespace torchops
