#include "sparse_attention/pq_encode.h"

#include "core/library.h"
#include "sparse_attention/sparse_attention.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def("pq_encode(Tensor input, Tensor codebooks) -> Tensor");
}

namespace {

at::Tensor pq_encode_meta(const at::Tensor& input, const at::Tensor& codebooks) {
  check_partition("pq_encode", input, codebooks);
  return empty_codes(input, codebooks);
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("pq_encode", pq_encode_meta);
}

// Integers have no gradient.
TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("pq_encode", torch::CppFunction::makeFallthrough());
}

at::Tensor pq_encode(const at::Tensor& input, const at::Tensor& codebooks) {
  static const auto op = find_operator<decltype(pq_encode_meta)>("pq_encode");
  return op(input, codebooks);
}

}  // namespace torchops
