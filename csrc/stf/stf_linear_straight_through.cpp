#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>

#include "core/autograd.h"
#include "core/checks.h"
#include "core/forward_mode.h"
#include "core/library.h"
#include "stf/linear.h"
#include "stf/stf.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def(
      "stf_linear_straight_through(Tensor input, Tensor basis, Tensor latent, SymInt nnz, Tensor? bias=None, *,"
      " bool transpose=False) -> Tensor");
}

// ---- checks -----------------------------------------------------------------------------------

void check_stf_linear_straight_through(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& latent,
                                       const c10::SymInt& nnz, const std::optional<at::Tensor>& bias, bool transpose) {
  constexpr const char* op = "stf_linear_straight_through";
  const Checks check(op);
  check.rank("latent", latent, "[rows, blocks, K]");
  check_layer(op, input, basis, latent.sym_size(0), bias, transpose);
  check.shape("latent", latent, "[rows, blocks, K]", {{latent.sym_size(0), basis.sym_size(0), basis.sym_size(1)}});
  check.same_dtype("latent", latent, "input", input);
  check.same_device("latent", latent, "input", input);
  check.at_most("nnz", nnz, "K", latent.sym_size(2));
}

namespace {

// ---- shapes -----------------------------------------------------------------------------------

at::Tensor stf_linear_straight_through_meta(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& latent,
                                            c10::SymInt nnz, const std::optional<at::Tensor>& bias, bool transpose) {
  check_stf_linear_straight_through(input, basis, latent, nnz, bias, transpose);
  return at::empty_symint(output_sizes(input, basis, latent.sym_size(0), transpose), input.options());
}

// ---- gradient ---------------------------------------------------------------------------------

// The forward goes by the entries that are kept, the gradient to all of them: what was dropped can come back.
struct StraightThrough : torch::autograd::Function<StraightThrough> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& input, const at::Tensor& basis,
                            const at::Tensor& latent, c10::SymInt nnz, const std::optional<at::Tensor>& bias,
                            bool transpose) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [values, indices] = stf_select(latent, std::move(nnz));
    const auto [output, atoms] = stf_linear_with_atoms(input, basis, values, indices, bias, transpose);
    save_for_stf_backward(ctx, input, basis, values, indices, atoms, transpose, /*to_latent=*/true,
                          {input.requires_grad(), basis.requires_grad(), latent.requires_grad(), false});
    GivenTensors::save(ctx, {input, basis, latent, value_or_undefined(bias)});
    return output;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto [grad_input, grad_basis, grad_latent, grad_bias] =
        gradients_of_saved(ctx, grads[0],
                           {GivenTensors::needs_grad(ctx, 0), GivenTensors::needs_grad(ctx, 1),
                            GivenTensors::needs_grad(ctx, 2), GivenTensors::needs_grad(ctx, 3)});
    return {grad_input, grad_basis, grad_latent, {}, grad_bias, {}};
  }
};

at::Tensor stf_linear_straight_through_autograd(const at::Tensor& input, const at::Tensor& basis,
                                                const at::Tensor& latent, c10::SymInt nnz,
                                                const std::optional<at::Tensor>& bias, bool transpose) {
  refuse_tangents("stf_linear_straight_through", {input, basis, latent, value_or_undefined(bias)});
  if (any_requires_grad({input, basis, latent, value_or_undefined(bias)})) {
    check_stf_linear_straight_through(input, basis, latent, nnz, bias, transpose);
    return StraightThrough::apply(input, basis, latent, std::move(nnz), bias, transpose);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return stf_linear_straight_through(input, basis, latent, std::move(nnz), bias, transpose);
}

// ---- autocast ---------------------------------------------------------------------------------

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor stf_linear_straight_through_autocast(const at::Tensor& input, const at::Tensor& basis,
                                                const at::Tensor& latent, c10::SymInt nnz,
                                                const std::optional<at::Tensor>& bias, bool transpose) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto lower = [dtype = at::autocast::get_autocast_dtype(device)](const at::Tensor& tensor) {
    return at::autocast::cached_cast(dtype, tensor, device);
  };
  return stf_linear_straight_through(lower(input), lower(basis), lower(latent), std::move(nnz),
                                     bias ? std::optional(lower(*bias)) : std::nullopt, transpose);
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("stf_linear_straight_through", stf_linear_straight_through_meta);
}

TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("stf_linear_straight_through", stf_linear_straight_through_autograd);
}

TORCHOPS_LIBRARY_IMPL(AutocastCPU, m) {
  m.impl("stf_linear_straight_through", stf_linear_straight_through_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCHOPS_LIBRARY_IMPL(AutocastCUDA, m) {
  m.impl("stf_linear_straight_through",
         stf_linear_straight_through_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

// ---- C++ API ----------------------------------------------------------------------------------

at::Tensor stf_linear_straight_through(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& latent,
                                       c10::SymInt nnz, const std::optional<at::Tensor>& bias, bool transpose) {
  static const auto op = find_operator<decltype(stf_linear_straight_through)>("stf_linear_straight_through");
  return op(input, basis, latent, nnz, bias, transpose);
}

}  // namespace torchops
