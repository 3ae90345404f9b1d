#include "sparse_attention/pq_attention.h"

#include <ATen/ops/empty.h>

#include "core/attention/cuda/device.h"
#include "core/library.h"
#include "sparse_attention/cuda/code_layout.h"
#include "sparse_attention/cuda/launches.h"

namespace torchops {
namespace {

// A CUDA device, for sparse_attention/pq_attention.h. Lists are made for a tile of queries at a time, in memory that
// the next one's take over.
class CudaPqAttention : public CudaAttention {
 public:
  using CudaAttention::CudaAttention;
  static constexpr auto lay_out = codes_in_words;

  template <typename T>
  void forward(const kernels::sparse_attention::AttentionForward<T>& args) const {
    for_tiles(args.inputs, [&](const kernels::sparse_attention::SortedLists& sorted) {
      kernels::sparse_attention::launch_forward(args, sorted);
    });
  }

  template <typename T>
  void row_delta(const kernels::attention::RowDelta<T>& args) const {
    kernels::sparse_attention::launch_row_delta(args);
  }

  template <typename T>
  void backward(const kernels::sparse_attention::AttentionBackward<T>& args, const TopkMask& mask) const {
    using A = kernels::accumulate_t<T>;
    const kernels::attention::Sizes& sizes = args.inputs.sizes;
    at::Tensor keys, values;
    for_tiles(args.inputs, [&](const kernels::sparse_attention::SortedLists& sorted) {
      if (mask.query()) {
        kernels::sparse_attention::launch_query_gradient(args, sorted);
      }
      if (sorted.tile.is_first() && !sorted.tile.is_last(sizes)) {
        const auto sums = [&](bool wanted, int64_t size) {
          return wanted ? at::empty({sizes.batch, sizes.num_kv_heads, sizes.num_keys, size}, options<A>())
                        : at::Tensor();
        };
        keys = sums(mask.key(), sizes.head_dim), values = sums(mask.value(), sizes.value_dim);
      }
      if (mask.key() || mask.value() || mask.key_bias()) {
        kernels::sparse_attention::launch_key_gradient(
            args, sorted, {mutable_data_or_null<A>(keys), mutable_data_or_null<A>(values)});
      }
    });
  }

 private:
  // Calls body(lists) for tiles of queries whose lists take no more memory than the call's tensors do.
  template <typename T, typename Body>
  void for_tiles(const kernels::sparse_attention::Attention<T>& inputs, const Body& body) const {
    namespace kernels = kernels::sparse_attention;
    const kernels::Sizes& sizes = inputs.sizes;
    const kernels::CodeChoice& choice = *inputs.lists.choice;
    const int64_t rows = sizes.num_heads * sizes.num_queries + sizes.num_kv_heads * sizes.num_keys;
    const auto row_bytes = (sizes.head_dim + sizes.value_dim) * static_cast<int64_t>(sizeof(T));
    const kernels::QueryTile first = kernels::first_tile(sizes, choice.num_chosen, sizes.batch * rows * row_bytes);
    const auto memory = at::empty({first.units(sizes), choice.num_chosen}, options<int32_t>());
    auto* const begins = memory.mutable_data_ptr<int32_t>();
    for (auto tile = first;; tile = kernels::next_tile(tile, sizes, first.num_queries)) {
      if (choice.num_chosen > 0) {
        kernels::launch_choose_by_codes(choice, sizes.batch, tile, begins, kernels::no_key);
      }
      body(kernels::SortedLists{begins, nullptr, sizes.num_kv_heads * tile.num_heads, tile.first_query,
                                tile.num_queries, tile});
      if (tile.is_last(sizes)) {
        return;
      }
    }
  }
};

}  // namespace

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("pq_attention", flattened<pq_attention_on<CudaPqAttention>>);
  m.impl("pq_attention_lse", flattened<pq_attention_lse_on<CudaPqAttention>>);
  m.impl("_pq_attention_forward", flattened<pq_attention_forward_on<CudaPqAttention>>);
  m.impl("_pq_attention_backward", flattened<pq_attention_backward_on<CudaPqAttention>>);
}

}  // namespace torchops
