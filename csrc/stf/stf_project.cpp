#include <ATen/ATen.h>

#include "core/autograd.h"
#include "core/checks.h"
#include "core/forward_mode.h"
#include "core/library.h"
#include "stf/factorization.h"
#include "stf/linear.h"
#include "stf/stf.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def(
      "stf_project(Tensor weight, Tensor basis, SymInt nnz, *, SymInt num_iterations=1)"
      " -> (Tensor projected, Tensor refined_basis)");
  m.def(
      "_stf_project_to_factors(Tensor weight, Tensor basis, SymInt nnz, *, SymInt num_iterations=1)"
      " -> (Tensor refined_basis, Tensor values, Tensor indices)");
}

// ---- checks -----------------------------------------------------------------------------------

static void check_stf_project(const char* op, const at::Tensor& weight, const at::Tensor& basis, const c10::SymInt& nnz,
                              const c10::SymInt& num_iterations) {
  const Checks check(op);
  check.rank("weight", weight, "[rows, cols]");
  check.floating("weight", weight);
  check.rank("basis", basis, "[blocks, K, cols / blocks]");
  check.same_dtype("basis", basis, "weight", weight);
  check.same_device("basis", basis, "weight", weight);
  check.between("basis's second dimension K", basis.sym_size(1), 1, largest_basis_size);
  check.equal("weight's number of columns", weight.sym_size(1), "that of all blocks",
              basis.sym_size(0) * basis.sym_size(2));
  check.at_most("nnz", nnz, "K", basis.sym_size(1));
  check.at_least("num_iterations", num_iterations, 0);
}

namespace {

// ---- shapes -----------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> stf_project_meta(const at::Tensor& weight, const at::Tensor& basis, c10::SymInt nnz,
                                                    c10::SymInt num_iterations) {
  check_stf_project("stf_project", weight, basis, nnz, num_iterations);
  return {at::empty_symint(weight.sym_sizes(), weight.options()), at::empty_symint(basis.sym_sizes(), basis.options())};
}

using Factors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Factors stf_project_to_factors_meta(const at::Tensor& weight, const at::Tensor& basis, c10::SymInt nnz,
                                    c10::SymInt num_iterations) {
  check_stf_project("_stf_project_to_factors", weight, basis, nnz, num_iterations);
  const c10::SymInt sizes[] = {weight.sym_size(0), basis.sym_size(0), nnz};
  return {at::empty_symint(basis.sym_sizes(), basis.options()), at::empty_symint(sizes, weight.options()),
          at::empty_symint(sizes, weight.options().dtype(index_dtype(basis.sym_size(1))))};
}

// ---- gradient ---------------------------------------------------------------------------------

// Straight through: the gradient to the projection is taken for that to the weight.
struct StfProject : torch::autograd::Function<StfProject> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& weight,
                                                const at::Tensor& basis, c10::SymInt nnz, c10::SymInt num_iterations) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [projected, refined] = stf_project(weight, basis, std::move(nnz), std::move(num_iterations));
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({refined});
    return {projected, refined};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* /*ctx*/,
                                                 const torch::autograd::variable_list& grads) {
    return {grads[0], {}, {}, {}};
  }
};

std::tuple<at::Tensor, at::Tensor> stf_project_autograd(const at::Tensor& weight, const at::Tensor& basis,
                                                        c10::SymInt nnz, c10::SymInt num_iterations) {
  refuse_tangents("stf_project", {weight, basis});
  const auto outputs = StfProject::apply(weight, basis, std::move(nnz), std::move(num_iterations));
  return {outputs[0], outputs[1]};
}

}  // namespace

// ---- every device -----------------------------------------------------------------------------

// take(block, factors with moderate codes, scale of the block's weight) for the factorization of every block.
template <typename Take>
static void project_blocks(const char* op, const at::Tensor& weight, const at::Tensor& basis, int64_t nnz,
                           int64_t num_iterations, const Take& take) {
  check_finite(op, "weight", weight);
  check_finite(op, "basis", basis);
  const at::NoGradGuard no_grad;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto matrix = weight.contiguous(), start = basis.contiguous();
  const auto dtype = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto columns = basis.size(2);
  for (int64_t block = 0; block < basis.size(0); ++block) {
    const auto part = matrix.narrow(1, block * columns, columns).to(dtype);
    const auto scale = scale_of(part);
    take(block, factorize_from(part / scale, start[block].to(dtype), nnz, num_iterations), scale);
  }
}

std::tuple<at::Tensor, at::Tensor> project_weight(const at::Tensor& weight, const at::Tensor& basis, int64_t nnz,
                                                  int64_t num_iterations) {
  check_stf_project("stf_project", weight, basis, nnz, num_iterations);
  const auto columns = basis.size(2);
  const double largest = largest_number(weight.scalar_type());
  auto projected = at::empty(weight.sizes(), weight.options());
  auto refined = at::empty(basis.sizes(), basis.options());
  project_blocks("stf_project", weight, basis, nnz, num_iterations,
                 [&](int64_t block, const Factorization& factors, const at::Tensor& scale) {
                   const auto product = factors.code.matmul(factors.basis).mul_(scale);
                   projected.narrow(1, block * columns, columns).copy_(product.clamp_(-largest, largest));
                   refined[block].copy_(factors.basis);
                 });
  return {projected, refined};
}

Factors project_weight_to_factors(const at::Tensor& weight, const at::Tensor& basis, int64_t nnz,
                                  int64_t num_iterations) {
  check_stf_project("_stf_project_to_factors", weight, basis, nnz, num_iterations);
  auto refined = at::empty(basis.sizes(), basis.options());
  std::vector<at::Tensor> codes;
  project_blocks("_stf_project_to_factors", weight, basis, nnz, num_iterations,
                 [&](int64_t block, const Factorization& moderate, const at::Tensor& scale) {
                   const auto factors = scaled(moderate, scale, weight.scalar_type());
                   refined[block].copy_(factors.basis);
                   codes.push_back(factors.code.to(weight.scalar_type()));
                 });
  const auto code =
      codes.empty() ? at::empty({weight.size(0), 0, basis.size(1)}, weight.options()) : at::stack(codes, 1);
  const auto [values, indices] = stf_select(code, nnz);
  return {refined, values, indices};
}

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("stf_project", stf_project_meta);
  m.impl("_stf_project_to_factors", stf_project_to_factors_meta);
}

TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("stf_project", stf_project_autograd);
  m.impl("_stf_project_to_factors", torch::autograd::autogradNotImplementedFallback());
}

// ---- C++ API ----------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> stf_project(const at::Tensor& weight, const at::Tensor& basis, c10::SymInt nnz,
                                               c10::SymInt num_iterations) {
  static const auto op = find_operator<decltype(stf_project)>("stf_project");
  return op(weight, basis, nnz, num_iterations);
}

}  // namespace torchops
