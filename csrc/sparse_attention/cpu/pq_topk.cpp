#include "sparse_attention/pq_topk.h"

#include <ATen/ops/constant_pad_nd.h>

#include "core/library.h"
#include "core/parallel.h"
#include "sparse_attention/cpu/code_choice_kernel.h"

namespace torchops {
namespace {

using kernels::sparse_attention::CodeChoice;

// A row for each subspace, so that a vector of codes is one of keys.
CodeLayout subspaces_first(const at::Tensor& query_codes, const at::Tensor& key_codes) {
  const int64_t num_keys = key_codes.size(2), word = kernels::sparse_attention::keys_of_word;
  const int64_t key_stride = (num_keys + word - 1) / word * word;
  return {with_contiguous_rows(query_codes),
          at::constant_pad_nd(key_codes.transpose(2, 3), {0, key_stride - num_keys}).contiguous(), query_codes.size(3),
          key_stride};
}

at::Tensor pq_topk_cpu(const at::Tensor& query_codes, const at::Tensor& key_codes, const PqTopkOptions& options) {
  return pq_topk_on_device(query_codes, key_codes, options, subspaces_first, [](const CodeChoice& args, int64_t batch) {
    constexpr int64_t queries = kernels::sparse_attention::queries_of_choice;
    const int64_t tiles = (args.num_queries + queries - 1) / queries;
    parallel_tiles(batch * args.num_heads * tiles, queries * (args.key_stride + args.num_chosen),
                   TORCHOPS_KERNEL(sparse_attention, choose_by_codes_scratch_bytes)(args),
                   [&](char* scratch, int64_t begin, int64_t end) {
                     TORCHOPS_KERNEL(sparse_attention, choose_by_codes)
                     (args, scratch, begin, end);
                   });
  });
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("pq_topk", flattened<pq_topk_cpu>);
}

}  // namespace torchops
