#include <ATen/ATen.h>

#include <utility>
#include <vector>

#include "core/autograd.h"
#include "core/checks.h"
#include "core/library.h"
#include "stf/factorization.h"
#include "stf/linear.h"
#include "stf/stf.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def(
      "stf_factorize(Tensor weight, SymInt basis_size, SymInt nnz, Tensor? gram=None, Tensor? row_gram=None,"
      " *, SymInt num_blocks=1, SymInt num_iterations=20) -> (Tensor basis, Tensor values, Tensor indices)");
}

// ---- checks -----------------------------------------------------------------------------------

void check_stf_factorize(const at::Tensor& weight, const c10::SymInt& basis_size, const c10::SymInt& nnz,
                         const c10::SymInt& num_blocks, const c10::SymInt& num_iterations,
                         const std::optional<at::Tensor>& gram, const std::optional<at::Tensor>& row_gram) {
  const Checks check("stf_factorize");
  check.rank("weight", weight, "[rows, cols]");
  check.floating("weight", weight);
  check.between("basis_size", basis_size, 1, largest_basis_size);
  check.at_most("nnz", nnz, "basis_size", basis_size);
  check.at_least("num_blocks", num_blocks, 1);
  check.multiple_of("weight's number of columns", weight.sym_size(1), "num_blocks", num_blocks);
  check.at_least("num_iterations", num_iterations, 0);
  const auto check_gram = [&](const char* name, const std::optional<at::Tensor>& squares, const char* shape,
                              const c10::SymInt& size) {
    if (squares) {
      check.shape(name, *squares, shape, {{size, size}});
      check.floating(name, *squares);
      check.same_device(name, *squares, "weight", weight);
    }
  };
  check_gram("gram", gram, "[cols, cols]", weight.sym_size(1));
  check_gram("row_gram", row_gram, "[rows, rows]", weight.sym_size(0));
}

// A pass over the data, which is small beside the factorization of it.
void check_finite(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(at::isfinite(tensor).all().item<bool>(), op, ": expected ", name,
                    " to be finite, got a NaN or an infinity");
}

namespace {

using Factors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// ---- shapes -----------------------------------------------------------------------------------

Factors stf_factorize_meta(const at::Tensor& weight, c10::SymInt basis_size, c10::SymInt nnz,
                           const std::optional<at::Tensor>& gram, const std::optional<at::Tensor>& row_gram,
                           c10::SymInt num_blocks, c10::SymInt num_iterations) {
  check_stf_factorize(weight, basis_size, nnz, num_blocks, num_iterations, gram, row_gram);
  const c10::SymInt sizes[] = {weight.sym_size(0), num_blocks, nnz};
  return {at::empty_symint({num_blocks, basis_size, weight.sym_size(1) / num_blocks}, weight.options()),
          at::empty_symint(sizes, weight.options()),
          at::empty_symint(sizes, weight.options().dtype(index_dtype(basis_size)))};
}

}  // namespace

// ---- every device -----------------------------------------------------------------------------

namespace {

// X^T X of inputs X, of moderate size and with a ridge, beside its root: root root^T. Inputs that never occur, or
// always together, would leave what is multiplied by them free.
std::tuple<at::Tensor, at::Tensor> with_root(const char* name, const at::Tensor& gram, at::ScalarType dtype) {
  auto moderate = gram.to(dtype).contiguous();
  moderate = moderate / scale_of(moderate);
  const auto ridge = moderate.diagonal().mean() * 1e-3 + 1e-12;
  moderate = moderate + ridge * at::eye(moderate.size(0), moderate.options());
  const auto [root, failed] = at::linalg_cholesky_ex(moderate);
  TORCH_CHECK_VALUE(failed.item<int>() == 0, "stf_factorize: expected ", name, " to be X^T X of inputs X, got a matrix",
                    " with a negative square");
  return {moderate, root};
}

}  // namespace

// With a gram matrix of the layer's inputs, the error of its outputs is what counts: that of weight L, where
// gram = L L^T. Blocks are weighed each by its own part of gram. A row_gram couples the rows of every block.
Factors factorize_weight(const at::Tensor& weight, int64_t basis_size, int64_t nnz,
                         const std::optional<at::Tensor>& gram, const std::optional<at::Tensor>& row_gram,
                         int64_t num_blocks, int64_t num_iterations) {
  check_stf_factorize(weight, basis_size, nnz, num_blocks, num_iterations, gram, row_gram);
  check_finite("stf_factorize", "weight", weight);
  for (const auto& [name, squares] : {std::pair("gram", gram), std::pair("row_gram", row_gram)}) {
    if (squares) {
      check_finite("stf_factorize", name, *squares);
    }
  }
  const at::NoGradGuard no_grad;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto matrix = weight.contiguous();
  const auto dtype = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto columns = weight.size(1) / num_blocks;
  Target target;
  if (row_gram) {
    target.row_gram = std::get<0>(with_root("row_gram", *row_gram, dtype));
  }
  std::vector<at::Tensor> bases, codes;
  for (int64_t block = 0; block < num_blocks; ++block) {
    target.weight = matrix.narrow(1, block * columns, columns).to(dtype);
    const auto scale = scale_of(target.weight);
    target.weight = target.weight / scale;
    at::Tensor root;
    if (gram) {
      const auto own = gram->narrow(0, block * columns, columns).narrow(1, block * columns, columns);
      root = std::get<1>(with_root("gram", own, dtype));
      target.weight = target.weight.matmul(root);
    }
    auto factors = factorize(target, basis_size, nnz, num_iterations);
    if (gram) {
      // Back among weights; an optimizer's steps are of the same size for basis and code.
      factors.basis = at::linalg_solve_triangular(root, factors.basis, /*upper=*/false, /*left=*/false);
      factors = with_unit_atoms(factors);
    }
    factors = scaled(factors, scale, weight.scalar_type());
    bases.push_back(factors.basis);
    codes.push_back(factors.code);
  }
  auto [values, indices] = stf_select(at::stack(codes, 1), nnz);
  return {at::stack(bases).to(weight.scalar_type()), values.to(weight.scalar_type()), indices};
}

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("stf_factorize", stf_factorize_meta);
}

// A start point of training, not a step of it.
TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("stf_factorize", torch::autograd::autogradNotImplementedFallback());
}

// ---- C++ API ----------------------------------------------------------------------------------

Factors stf_factorize(const at::Tensor& weight, c10::SymInt basis_size, c10::SymInt nnz, c10::SymInt num_blocks,
                      c10::SymInt num_iterations, const std::optional<at::Tensor>& gram,
                      const std::optional<at::Tensor>& row_gram) {
  static const auto op = find_operator<decltype(stf_factorize_meta)>("stf_factorize");
  return op(weight, basis_size, nnz, gram, row_gram, num_blocks, num_iterations);
}

}  // namespace torchops
