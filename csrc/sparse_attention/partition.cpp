#include "sparse_attention/partition.h"

#include "core/checks.h"

namespace torchops {

void check_partition(const char* op, const at::Tensor& input, const at::Tensor& codebooks) {
  const Checks check(op);
  check.not_scalar("input", input, "[..., D]");
  check.floating("input", input);
  check.rank("codebooks", codebooks, "[M, E, D / M]");
  check.floating("codebooks", codebooks);
  check.same_device("codebooks", codebooks, "input", input);
  check.between("codebooks's second dimension", codebooks.sym_size(1), 1, kernels::sparse_attention::most_codewords);
  check.equal("input's last dimension", input.sym_size(-1), "codebooks's M times D / M",
              codebooks.sym_size(0) * codebooks.sym_size(2));
}

}  // namespace torchops
