#include <ATen/ops/empty.h>
#include <ATen/ops/gather.h>

#include "core/autograd.h"
#include "core/checks.h"
#include "core/forward_mode.h"
#include "core/library.h"
#include "stf/linear.h"
#include "stf/stf.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def("stf_select(Tensor latent, SymInt nnz) -> (Tensor values, Tensor indices)");
  m.def("_stf_select_backward(Tensor grad_values, Tensor indices, SymInt basis_size) -> Tensor");
}

// ---- checks -----------------------------------------------------------------------------------

void check_stf_select(const at::Tensor& latent, const c10::SymInt& nnz) {
  const Checks check("stf_select");
  check.rank("latent", latent, "[rows, blocks, K]");
  check.floating("latent", latent);
  check.between("latent's last dimension K", latent.sym_size(2), 1, largest_basis_size);
  check.at_most("nnz", nnz, "K", latent.sym_size(2));
}

void check_stf_select_backward(const at::Tensor& grad_values, const at::Tensor& indices,
                               const c10::SymInt& basis_size) {
  const Checks check("_stf_select_backward");
  check.rank("grad_values", grad_values, "[rows, blocks, nnz]");
  check.floating("grad_values", grad_values);
  check.shape("indices", indices, "[rows, blocks, nnz]", grad_values.sym_sizes());
  check.index_dtype("indices", indices);
  check.same_device("indices", indices, "grad_values", grad_values);
  check.between("basis_size", basis_size, 1, largest_basis_size);
  check.at_most("grad_values' last dimension nnz", grad_values.sym_size(2), "basis_size", basis_size);
}

namespace {

// ---- shapes -----------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> stf_select_meta(const at::Tensor& latent, c10::SymInt nnz) {
  check_stf_select(latent, nnz);
  const c10::SymInt sizes[] = {latent.sym_size(0), latent.sym_size(1), nnz};
  return {at::empty_symint(sizes, latent.options()),
          at::empty_symint(sizes, latent.options().dtype(index_dtype(latent.sym_size(2))))};
}

at::Tensor stf_select_backward_meta(const at::Tensor& grad_values, const at::Tensor& indices, c10::SymInt basis_size) {
  check_stf_select_backward(grad_values, indices, basis_size);
  return at::empty_symint({grad_values.sym_size(0), grad_values.sym_size(1), std::move(basis_size)},
                          grad_values.options());
}

// ---- gradient ---------------------------------------------------------------------------------

struct StfSelect : torch::autograd::Function<StfSelect> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& latent,
                                                c10::SymInt nnz) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [values, indices] = stf_select(latent, std::move(nnz));
    ctx->save_for_backward({indices});
    ctx->set_materialize_grads(false);
    ctx->saved_data["basis_size"] = latent.sym_size(2);
    ctx->mark_non_differentiable({indices});
    return {values, indices};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    static const auto op = find_operator<decltype(stf_select_backward_meta)>("_stf_select_backward");
    if (!grads[0].defined()) {
      return {{}, {}};
    }
    return {op(grads[0], ctx->get_saved_variables()[0], ctx->saved_data["basis_size"].toSymInt()), {}};
  }
};

std::tuple<at::Tensor, at::Tensor> stf_select_autograd(const at::Tensor& latent, c10::SymInt nnz) {
  if (has_tangent(latent)) {  // what is selected is a matter of the latent alone
    const auto [values, indices] = stf_select(without_tangent(latent), std::move(nnz));
    return {with_tangent(values, tangent_or_zeros(latent).gather(2, indices.to(at::kLong))), indices};
  }
  if (any_requires_grad({latent})) {
    const auto outputs = StfSelect::apply(latent, std::move(nnz));
    return {outputs[0], outputs[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return stf_select(latent, std::move(nnz));
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("stf_select", stf_select_meta);
  m.impl("_stf_select_backward", stf_select_backward_meta);
}

TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("stf_select", stf_select_autograd);
  m.impl("_stf_select_backward", torch::autograd::autogradNotImplementedFallback());
}

// ---- C++ API ----------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> stf_select(const at::Tensor& latent, c10::SymInt nnz) {
  static const auto op = find_operator<decltype(stf_select)>("stf_select");
  return op(latent, nnz);
}

}  // namespace torchops
