#include "sparse_attention/cpu/backward_kernel.h"

#include "core/attention/cpu/delta_kernel.h"
#include "sparse_attention/cpu/query_backward.h"
#include "sparse_attention/cpu/tile_backward.h"

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {
namespace {

// The backward of `Steps`, which are QueryBackward<T> or TileBackward<T>, with its scratch memory: gradients to the
// keys of a range, of one key-value head, and where asked for to all queries of its group.
template <typename Steps, typename Scratch, typename T>
void compute_keys(const AttentionBackward<T>& args, Scratch& scratch, int64_t kv_heads_before, Range range,
                  int64_t heads_at_a_time, bool for_queries) {
  const Sizes& sizes = args.inputs.sizes;
  const int64_t batch = kv_heads_before / sizes.num_kv_heads, kv_head = kv_heads_before % sizes.num_kv_heads;
  scratch.sums.range = range;
  scratch.sums.clear_sums(args);
  for (int64_t in_group = 0; in_group < sizes.group_size(); in_group += heads_at_a_time) {
    const Steps steps{args, scratch, batch, kv_head * sizes.group_size() + in_group, for_queries, &scratch.sums};
    for (int64_t unit = 0; unit < Steps::units(args.inputs); ++unit) {
      steps.compute(unit);
    }
  }
  store_key_gradients(args, batch, kv_head, range, scratch.sums, columns_of<multiplicand_t<T>>(sizes.head_dim),
                      columns_of<multiplicand_t<T>>(sizes.value_dim));
}

template <typename Steps, typename Scratch>
struct form {
  using steps = Steps;
  using scratch = Scratch;
};
// Calls body(form, heads whose lists its steps go through together).
template <typename T, typename Body>
auto with_form(const Attention<T>& inputs, const Body& body) {
  using E = multiplicand_t<T>;
  return by_tile(inputs) ? body(form<TileBackward<T>, TileBackwardScratch<E>>{}, inputs.heads_of_list())
                         : body(form<QueryBackward<T>, BackwardScratch<E>>{}, int64_t{1});
}

}  // namespace

template <typename T>
void row_delta(const RowDelta<T>& args, bool tiles, int64_t begin, int64_t end) {
  tiles ? attention::TORCHOPS_LEVEL::row_delta(args, begin, end) : row_delta_by_lanes(args, begin, end);
}

template <typename T>
int64_t backward_scratch_bytes(const AttentionBackward<T>& args, int64_t num_keys) {
  return with_form(args.inputs, [&](auto form, int64_t /*heads*/) {
    Arena arena(nullptr);
    typename decltype(form)::scratch(&arena, args, num_keys);
    return arena.bytes();
  });
}

template <typename T>
void backward_heads(const AttentionBackward<T>& args, void* scratch, int64_t begin, int64_t end) {
  const int64_t num_keys = args.inputs.sizes.num_keys;
  with_form(args.inputs, [&](auto form, int64_t heads) {
    Arena arena(scratch);
    typename decltype(form)::scratch buffers(&arena, args, num_keys);
    for (int64_t unit = begin; unit < end; ++unit) {
      compute_keys<typename decltype(form)::steps>(args, buffers, unit, Range{0, num_keys}, heads, true);
    }
  });
}

template <typename T>
int64_t backward_query_units(const Attention<T>& inputs) {
  return with_form(inputs, [&](auto form, int64_t heads) {
    return inputs.sizes.group_size() / heads * decltype(form)::steps::units(inputs);
  });
}

template <typename T>
void backward_queries(const AttentionBackward<T>& args, int64_t first_head, void* scratch, int64_t begin, int64_t end) {
  const Sizes& sizes = args.inputs.sizes;
  with_form(args.inputs, [&](auto form, int64_t heads) {
    using Steps = typename decltype(form)::steps;
    Arena arena(scratch);
    const typename decltype(form)::scratch buffers(&arena, args, 0);
    const int64_t units = Steps::units(args.inputs);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = first_head * sizes.group_size() + unit / units * heads;
      Steps{args, buffers, head / sizes.num_heads, head % sizes.num_heads, true, nullptr}.compute(
          balanced_tile(unit % units, units));
    }
  });
}

template <typename T>
void backward_keys(const AttentionBackward<T>& args, int64_t first_head, int64_t keys_at_a_time, void* scratch,
                   int64_t begin, int64_t end) {
  const Sizes& sizes = args.inputs.sizes;
  const int64_t ranges = divide_up(sizes.num_keys, keys_at_a_time);
  with_form(args.inputs, [&](auto form, int64_t heads) {
    Arena arena(scratch);
    typename decltype(form)::scratch buffers(&arena, args, keys_at_a_time);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % ranges * keys_at_a_time;
      compute_keys<typename decltype(form)::steps>(args, buffers, first_head + unit / ranges,
                                                   Range{first, smaller(first + keys_at_a_time, sizes.num_keys)}, heads,
                                                   false);
    }
  });
}

#define TORCHOPS_INSTANTIATE(T)                                                                  \
  template void row_delta(const RowDelta<T>&, bool, int64_t, int64_t);                           \
  template int64_t backward_scratch_bytes(const AttentionBackward<T>&, int64_t);                 \
  template void backward_heads(const AttentionBackward<T>&, void*, int64_t, int64_t);            \
  template int64_t backward_query_units<T>(const Attention<T>&);                                 \
  template void backward_queries(const AttentionBackward<T>&, int64_t, void*, int64_t, int64_t); \
  template void backward_keys(const AttentionBackward<T>&, int64_t, int64_t, void*, int64_t, int64_t);
TORCHOPS_INSTANTIATE(double)
TORCHOPS_INSTANTIATE(float)
TORCHOPS_INSTANTIATE(bfloat16)
TORCHOPS_INSTANTIATE(float16)
#undef TORCHOPS_INSTANTIATE

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
