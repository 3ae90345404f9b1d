#include "sparse_attention/pq_topk.h"

#include "core/library.h"
#include "core/parallel.h"
#include "sparse_attention/cpu/code_layout.h"

namespace torchops {
namespace {

at::Tensor pq_topk_cpu(const at::Tensor& query_codes, const at::Tensor& key_codes, const PqTopkOptions& options) {
  check_pq_topk("pq_topk", query_codes, key_codes, options);
  auto indices = empty_choice(query_codes, options);
  if (indices.numel() == 0) {
    return indices;
  }
  const CodeTensors tensors(query_codes, key_codes, options, subspaces_first);
  const auto args = tensors.arguments(indices.size(3));
  constexpr int64_t queries = kernels::sparse_attention::queries_of_choice;
  const int64_t tiles = (args.num_queries + queries - 1) / queries;
  parallel_tiles(indices.size(0) * args.num_heads * tiles, queries * (args.key_stride + args.num_chosen),
                 TORCHOPS_KERNEL(sparse_attention, choose_by_codes_scratch_bytes)(args),
                 [&](char* scratch, int64_t begin, int64_t end) {
                   TORCHOPS_KERNEL(sparse_attention, choose_by_codes)
                   (args, indices.mutable_data_ptr<int32_t>(), scratch, begin, end);
                 });
  return indices;
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("pq_topk", flattened<pq_topk_cpu>);
}

}  // namespace torchops
