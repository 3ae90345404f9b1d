#include "sparse_attention/pq_loss.h"

#include <ATen/OpMathType.h>

#include "core/autograd.h"
#include "core/checks.h"
#include "core/forward_mode.h"
#include "core/library.h"
#include "sparse_attention/sparse_attention.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def("pq_loss(Tensor input, Tensor codebooks) -> Tensor");
  m.def(
      "_pq_loss_backward(Tensor grad, Tensor input, Tensor codebooks, *, bool[2] output_mask)"
      " -> (Tensor grad_input, Tensor grad_codebooks)");
}

void check_pq_loss_backward(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& codebooks) {
  check_partition("_pq_loss_backward", input, codebooks);
  const Checks check("_pq_loss_backward");
  check.sizes("grad", grad, {});
  check.dtype("grad", grad, at::toOpMathType(input.scalar_type()));
  check.same_device("grad", grad, "input", input);
}

namespace {

// ---- shapes -----------------------------------------------------------------------------------

at::Tensor pq_loss_meta(const at::Tensor& input, const at::Tensor& codebooks) {
  check_partition("pq_loss", input, codebooks);
  return at::empty({}, input.options().dtype(at::toOpMathType(input.scalar_type())));
}

std::tuple<at::Tensor, at::Tensor> pq_loss_backward_meta(const at::Tensor& grad, const at::Tensor& input,
                                                         const at::Tensor& codebooks, std::array<bool, 2> output_mask) {
  check_pq_loss_backward(grad, input, codebooks);
  const auto empty_like = [](const at::Tensor& tensor) {
    return at::empty_symint(tensor.sym_sizes(), tensor.options());
  };
  return {output_mask[0] ? empty_like(input) : at::Tensor(), output_mask[1] ? empty_like(codebooks) : at::Tensor()};
}

// ---- gradient ---------------------------------------------------------------------------------

struct PqLoss : torch::autograd::Function<PqLoss> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& input,
                            const at::Tensor& codebooks) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({input, codebooks});
    return torchops::pq_loss(input, codebooks);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    static const auto op = find_operator<decltype(pq_loss_backward_meta)>("_pq_loss_backward");
    const auto saved = ctx->get_saved_variables();
    const std::array<bool, 2> output_mask{ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
    const auto [grad_input, grad_codebooks] = op(grads[0], saved[0], saved[1], output_mask);
    return {grad_input, grad_codebooks};
  }
};

at::Tensor pq_loss_autograd(const at::Tensor& input, const at::Tensor& codebooks) {
  refuse_tangents("pq_loss", {input, codebooks});
  if (any_requires_grad({input, codebooks})) {
    return PqLoss::apply(input, codebooks);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return torchops::pq_loss(input, codebooks);
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("pq_loss", pq_loss_meta);
  m.impl("_pq_loss_backward", pq_loss_backward_meta);
}

TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("pq_loss", pq_loss_autograd);
  m.impl("_pq_loss_backward", torch::autograd::autogradNotImplementedFallback());
}

// ---- C++ API ----------------------------------------------------------------------------------

at::Tensor pq_loss(const at::Tensor& input, const at::Tensor& codebooks) {
  static const auto op = find_operator<decltype(pq_loss_meta)>("pq_loss");
  return op(input, codebooks);
}

}  // namespace torchops
