#include "sparse_attention/pq_encode.h"

#include "core/library.h"
#include "core/parallel.h"
#include "sparse_attention/cpu/nearest_codeword_kernel.h"

namespace torchops {
namespace {

at::Tensor pq_encode_cpu(const at::Tensor& input, const at::Tensor& codebooks) {
  return pq_encode_on_device(input, codebooks,
                             []<typename T>(const kernels::sparse_attention::NearestCodeword<T>& args) {
                               const auto& parts = args.parts;
                               const int64_t cost = parts.num_subspaces * parts.subspace * parts.num_codewords;
                               parallel_units(parts.num_rows, cost, [&](int64_t begin, int64_t end) {
                                 TORCHOPS_KERNEL(sparse_attention, nearest_codeword<T>)(args, begin, end);
                               });
                             });
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("pq_encode", pq_encode_cpu);
}

}  // namespace torchops
