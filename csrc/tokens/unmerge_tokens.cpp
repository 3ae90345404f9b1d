#include "tokens/unmerge_tokens.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>

#include "core/autograd.h"
#include "core/checks.h"
#include "core/forward_mode.h"
#include "core/library.h"
#include "tokens/assignment.h"
#include "tokens/tokens.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def("unmerge_tokens(Tensor merged, Tensor assign, Tensor? residual=None) -> Tensor");
  m.def("_unmerge_tokens_backward(Tensor grad, Tensor assign, SymInt num_groups) -> Tensor");
}

// ---- checks -----------------------------------------------------------------------------------

void check_unmerge_tokens(const at::Tensor& merged, const at::Tensor& assign,
                          const std::optional<at::Tensor>& residual) {
  const Checks check("unmerge_tokens");
  check.rank("merged", merged, "[B, M, C]");
  check.floating("merged", merged);
  check.rank("assign", assign, "[B, N]");
  check.shape("assign", assign, "[B, N]", {merged.sym_size(0), assign.sym_size(1)});
  check.dtype("assign", assign, at::kLong);
  check.same_device("assign", assign, "merged", merged);
  check.at_most("N", assign.sym_size(1), "the largest 32-bit integer", largest_num_tokens);
  check.at_most("M", merged.sym_size(1), "the largest 32-bit integer", largest_num_groups);
  if (residual) {
    check.shape("residual", *residual, "[B, N, C]", {merged.sym_size(0), assign.sym_size(1), merged.sym_size(2)});
    check.same_dtype("residual", *residual, "merged", merged);
    check.same_device("residual", *residual, "merged", merged);
  }
}

void check_unmerge_tokens_backward(const at::Tensor& grad, const at::Tensor& assign, const c10::SymInt& num_groups) {
  const Checks check("_unmerge_tokens_backward");
  check.rank("grad", grad, "[B, N, C]");
  check.floating("grad", grad);
  check.shape("assign", assign, "[B, N]", {grad.sym_size(0), grad.sym_size(1)});
  check.dtype("assign", assign, at::kLong);
  check.same_device("assign", assign, "grad", grad);
  check.at_most("N", assign.sym_size(1), "the largest 32-bit integer", largest_num_tokens);
  check.at_most("num_groups", num_groups, "the largest 32-bit integer", largest_num_groups);
}

namespace {

// ---- shapes -----------------------------------------------------------------------------------

at::Tensor unmerge_tokens_meta(const at::Tensor& merged, const at::Tensor& assign,
                               const std::optional<at::Tensor>& residual) {
  // Tensors of the device meta have no autocast key, so what unmerge_tokens_autocast does happens here.
  const bool autocast = at::autocast::is_autocast_enabled(at::kCPU) || at::autocast::is_autocast_enabled(at::kCUDA);
  if (autocast && residual && merged.is_floating_point() && residual->is_floating_point() &&
      merged.scalar_type() != residual->scalar_type()) {
    const auto dtype = at::promote_types(merged.scalar_type(), residual->scalar_type());
    return unmerge_tokens_meta(merged.to(dtype), assign, residual->to(dtype));
  }
  check_unmerge_tokens(merged, assign, residual);
  return at::empty_symint({merged.sym_size(0), assign.sym_size(1), merged.sym_size(2)}, merged.options());
}

at::Tensor unmerge_tokens_backward_meta(const at::Tensor& grad, const at::Tensor& assign, c10::SymInt num_groups) {
  check_unmerge_tokens_backward(grad, assign, num_groups);
  return at::empty_symint({grad.sym_size(0), std::move(num_groups), grad.sym_size(2)}, grad.options());
}

// ---- gradient ---------------------------------------------------------------------------------

struct UnmergeTokens : torch::autograd::Function<UnmergeTokens> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& merged, const at::Tensor& assign,
                            const std::optional<at::Tensor>& residual) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({merged.requires_grad() ? assign : at::Tensor()});
    ctx->set_materialize_grads(false);
    ctx->saved_data["num_groups"] = merged.sym_size(1);
    GivenTensors::save(ctx, {merged, assign, value_or_undefined(residual)});
    return torchops::unmerge_tokens(merged, assign, residual);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    static const auto op = find_operator<decltype(unmerge_tokens_backward_meta)>("_unmerge_tokens_backward");
    at::Tensor grad_merged, grad_residual;
    if (GivenTensors::needs_grad(ctx, 0) && grads[0].defined()) {
      grad_merged = op(grads[0], ctx->get_saved_variables()[0], ctx->saved_data["num_groups"].toSymInt());
    }
    if (GivenTensors::needs_grad(ctx, 2)) {
      grad_residual = grads[0];
    }
    return {grad_merged, {}, grad_residual};
  }
};

at::Tensor unmerge_tokens_autograd(const at::Tensor& merged, const at::Tensor& assign,
                                   const std::optional<at::Tensor>& residual) {
  if (any_has_tangent({merged, value_or_undefined(residual)})) {  // linear in both together
    const auto residual_tangent = residual ? std::optional(tangent_or_zeros(*residual)) : std::nullopt;
    return with_tangent(torchops::unmerge_tokens(without_tangent(merged), assign, without_tangent(residual)),
                        torchops::unmerge_tokens(tangent_or_zeros(merged), assign, residual_tangent));
  }
  if (any_requires_grad({merged, value_or_undefined(residual)})) {
    return UnmergeTokens::apply(merged, assign, residual);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return torchops::unmerge_tokens(merged, assign, residual);
}

// ---- autocast ---------------------------------------------------------------------------------

// The residual stream is often wider than what a lowered block returns: both take the wider dtype.
template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor unmerge_tokens_autocast(const at::Tensor& merged, const at::Tensor& assign,
                                   const std::optional<at::Tensor>& residual) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  if (!residual) {
    return torchops::unmerge_tokens(merged, assign, residual);
  }
  const auto dtype = at::promote_types(merged.scalar_type(), residual->scalar_type());
  return torchops::unmerge_tokens(at::autocast::cached_cast(dtype, merged, device), assign,
                                  at::autocast::cached_cast(dtype, *residual, device));
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("unmerge_tokens", unmerge_tokens_meta);
  m.impl("_unmerge_tokens_backward", unmerge_tokens_backward_meta);
}

TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("unmerge_tokens", unmerge_tokens_autograd);
  m.impl("_unmerge_tokens_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCHOPS_LIBRARY_IMPL(AutocastCPU, m) {
  m.impl("unmerge_tokens", unmerge_tokens_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCHOPS_LIBRARY_IMPL(AutocastCUDA, m) {
  m.impl("unmerge_tokens", unmerge_tokens_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

// ---- C++ API ----------------------------------------------------------------------------------

at::Tensor unmerge_tokens(const at::Tensor& merged, const at::Tensor& assign,
                          const std::optional<at::Tensor>& residual) {
  static const auto op = find_operator<decltype(unmerge_tokens)>("unmerge_tokens");
  return op(merged, assign, residual);
}

}  // namespace torchops
