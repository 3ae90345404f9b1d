#include "sparse_attention/cpu/scores_kernel.h"

#include "sparse_attention/cpu/list_scores.h"
#include "sparse_attention/cpu/query_scores.h"

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {
namespace {

template <typename Form>
struct form {
  using type = Form;
};
// Calls body(form) with how the scores of these inputs are computed.
template <typename T, typename Body>
auto with_form(const Attention<T>& inputs, const Body& body) {
  return by_tile(inputs) ? body(form<ListScores<T>>{}) : body(form<QueryScores<T>>{});
}

template <typename T>
constexpr int64_t sums_of_keys(const Attention<T>& inputs, int64_t num_keys) {
  return num_keys * round_up(inputs.sizes.head_dim, lanes<accumulate_t<T>>);
}

}  // namespace

template <typename T>
int64_t score_units(const Attention<T>& inputs) {
  return with_form(inputs, [&](auto form) { return decltype(form)::type::units(inputs); });
}

template <typename T>
int64_t scores_scratch_bytes(const Attention<T>& inputs, int64_t num_keys) {
  Arena arena(nullptr);
  with_form(inputs, [&](auto form) { typename decltype(form)::type(&arena, inputs); });
  arena.take<accumulate_t<T>>(sums_of_keys(inputs, num_keys));
  return arena.bytes();
}

template <typename T>
void scores(const Scores<T>& args, void* scratch, int64_t begin, int64_t end) {
  Arena arena(scratch);
  with_form(args.inputs, [&](auto form) {
    const typename decltype(form)::type steps(&arena, args.inputs);
    for (int64_t unit = begin; unit < end; ++unit) {
      steps.compute_scores(args, unit);
    }
  });
}

template <typename T>
void score_query_gradient(const ScoreGradients<T>& args, void* scratch, int64_t begin, int64_t end) {
  Arena arena(scratch);
  with_form(args.inputs, [&](auto form) {
    const typename decltype(form)::type steps(&arena, args.inputs);
    for (int64_t unit = begin; unit < end; ++unit) {
      steps.compute_query_gradient(args, unit);
    }
  });
}

template <typename T>
void score_key_gradient(const ScoreGradients<T>& args, int64_t keys_at_a_time, void* scratch, int64_t begin,
                        int64_t end) {
  using A = accumulate_t<T>;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const int64_t ranges = divide_up(sizes.num_keys, keys_at_a_time), stride = sums_of_keys(inputs, 1);
  Arena arena(scratch);
  with_form(inputs, [&](auto form) {
    const typename decltype(form)::type steps(&arena, inputs);
    A* const sums = arena.take<A>(sums_of_keys(inputs, keys_at_a_time));
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t batch = unit / ranges / sizes.num_kv_heads, kv_head = unit / ranges % sizes.num_kv_heads;
      const int64_t first = unit % ranges * keys_at_a_time;
      const Range range{first, smaller(first + keys_at_a_time, sizes.num_keys)};
      clear(sums, (range.end - range.begin) * stride);
      steps.add_to_keys(args, batch, kv_head, range, sums);
      for (int64_t key = range.begin; key < range.end; ++key) {
        store_gradient(args.grad_key.row(batch, kv_head, key), sums + (key - range.begin) * stride, sizes.head_dim,
                       inputs.scale);
      }
    }
  });
}

#define TORCHOPS_INSTANTIATE(T)                                                          \
  template int64_t score_units(const Attention<T>&);                                     \
  template int64_t scores_scratch_bytes(const Attention<T>&, int64_t);                   \
  template void scores(const Scores<T>&, void*, int64_t, int64_t);                       \
  template void score_query_gradient(const ScoreGradients<T>&, void*, int64_t, int64_t); \
  template void score_key_gradient(const ScoreGradients<T>&, int64_t, void*, int64_t, int64_t);
TORCHOPS_INSTANTIATE(double)
TORCHOPS_INSTANTIATE(float)
TORCHOPS_INSTANTIATE(bfloat16)
TORCHOPS_INSTANTIATE(float16)
#undef TORCHOPS_INSTANTIATE

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
