#include "sparse_attention/pq_encode.h"

#include "core/checks.h"
#include "core/library.h"
#include "sparse_attention/sparse_attention.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def("pq_encode(Tensor input, Tensor codebooks) -> Tensor");
}

void check_pq_encode(const at::Tensor& input, const at::Tensor& codebooks) {
  const Checks check("pq_encode");
  check.not_scalar("input", input, "[..., D]");
  check.floating("input", input);
  check.rank("codebooks", codebooks, "[M, E, D / M]");
  check.floating("codebooks", codebooks);
  check.same_device("codebooks", codebooks, "input", input);
  check.between("codebooks's second dimension", codebooks.sym_size(1), 1, 256);
  check.equal("input's last dimension", input.sym_size(-1), "codebooks's M times D / M",
              codebooks.sym_size(0) * codebooks.sym_size(2));
}

namespace {

at::Tensor pq_encode_meta(const at::Tensor& input, const at::Tensor& codebooks) {
  check_pq_encode(input, codebooks);
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
