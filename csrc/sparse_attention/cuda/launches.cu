#include "core/cuda/dtypes.h"
#include "sparse_attention/cuda/choose_by_codes.cuh"
#include "sparse_attention/cuda/launches.cuh"

namespace torchops::kernels::sparse_attention {

void launch_choose_by_codes(const CodeChoice& args, int64_t batch, const QueryTile& tile, int32_t* lists,
                            int32_t behind) {
  device::launch(
      {batch * args.num_kv_heads * tile.num_heads * tile.num_queries, choice_threads, device::BlockMemory::bytes},
      choose_by_codes, args, tile, lists, behind);
}

#define TORCHOPS_INSTANTIATE(T)                                                                                 \
  template void launch_sort_lists(const Attention<T>&, const SortedLists&);                                     \
  template void launch_forward(const AttentionForward<T>&, const SortedLists&);                                 \
  template void launch_row_delta(const RowDelta<T>&);                                                           \
  template void launch_query_gradient(const AttentionBackward<T>&, const SortedLists&);                         \
  template void launch_key_gradient(const AttentionBackward<T>&, const SortedLists&,                            \
                                    const CarriedSums<accumulate_t<T>>&);                                       \
  template void launch_scores(const Scores<T>&);                                                                \
  template void launch_score_query_gradient(const ScoreGradients<T>&);                                          \
  template void launch_score_key_gradient(const ScoreGradients<T>&, const SortedLists&);                        \
  template void launch_nearest_codeword(const NearestCodeword<T>&);                                             \
  template void launch_choose_by_scores(const ScoreChoice<T>&, const ScoreScratch<accumulate_t<T>>&, int32_t*); \
  template void launch_quantization_loss(const QuantizationLoss<T>&);                                           \
  template void launch_quantization_gradient(const QuantizationGradient<T>&);
TORCHOPS_FOR_EACH_DTYPE(TORCHOPS_INSTANTIATE)

}  // namespace torchops::kernels::sparse_attention
