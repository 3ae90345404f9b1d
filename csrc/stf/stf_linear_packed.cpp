#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>

#include "core/autograd.h"
#include "core/checks.h"
#include "core/forward_mode.h"
#include "core/library.h"
#include "stf/linear.h"
#include "stf/packed_factor.h"
#include "stf/stf.h"

namespace torchops {

using kernels::stf::rows_per_group;

TORCHOPS_LIBRARY(m) {
  m.def(
      "stf_linear_packed(Tensor input, Tensor basis, Tensor packed_values, Tensor mask, SymInt rows, Tensor? bias=None,"
      " *, bool transpose=False) -> Tensor");
}

// ---- checks -----------------------------------------------------------------------------------

void check_stf_linear_packed(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& packed_values,
                             const at::Tensor& mask, const c10::SymInt& rows, const std::optional<at::Tensor>& bias,
                             bool transpose) {
  constexpr const char* op = "stf_linear_packed";
  const Checks check(op);
  check.at_least("rows", rows, 0);
  check_layer(op, input, basis, rows, bias, transpose);
  const auto groups = (rows + (rows_per_group - 1)) / rows_per_group;
  check.shape("mask", mask, "[ceil(rows / 16), blocks, K]", {{groups, basis.sym_size(0), basis.sym_size(1)}});
  check.dtype("mask", mask, at::kShort);
  check.same_device("mask", mask, "input", input);
  check.rank("packed_values", packed_values, "[ceil(rows / 16), blocks, 16 * nnz]");
  check.shape("packed_values", packed_values, "[ceil(rows / 16), blocks, 16 * nnz]",
              {{groups, basis.sym_size(0), packed_values.sym_size(2)}});
  check.multiple_of("packed_values' last dimension", packed_values.sym_size(2), "rows of a group", rows_per_group);
  check.same_dtype("packed_values", packed_values, "input", input);
  check.same_device("packed_values", packed_values, "input", input);
}

namespace {

// ---- shapes -----------------------------------------------------------------------------------

at::Tensor stf_linear_packed_meta(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& packed_values,
                                  const at::Tensor& mask, c10::SymInt rows, const std::optional<at::Tensor>& bias,
                                  bool transpose) {
  check_stf_linear_packed(input, basis, packed_values, mask, rows, bias, transpose);
  return at::empty_symint(output_sizes(input, basis, rows, transpose), input.options());
}

// ---- gradient ---------------------------------------------------------------------------------

// Of what stands before a packed layer: the layer itself, with the sparse factor on the other side. It has no gradient
// to its factors: training goes by stf_linear or stf_linear_straight_through.
struct StfLinearPacked : torch::autograd::Function<StfLinearPacked> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& input, const at::Tensor& basis,
                            const at::Tensor& packed_values, const at::Tensor& mask, c10::SymInt rows,
                            const std::optional<at::Tensor>& bias, bool transpose) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto output = stf_linear_packed(input, basis, packed_values, mask, rows, bias, transpose);
    if (input.requires_grad()) {
      ctx->save_for_backward({basis, packed_values, mask});
    }
    ctx->set_materialize_grads(false);
    ctx->saved_data["rows"] = std::move(rows);
    ctx->saved_data["transpose"] = transpose;
    GivenTensors::save(ctx, {input, basis, packed_values, mask, value_or_undefined(bias)});
    return output;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !GivenTensors::needs_grad(ctx, 1) && !GivenTensors::needs_grad(ctx, 2),
        "derivative for torchops::stf_linear_packed is not implemented with respect to basis and packed_values");
    torch::autograd::variable_list result(7);
    if (!grads[0].defined()) {
      return result;
    }
    if (GivenTensors::needs_grad(ctx, 0)) {
      const auto saved = ctx->get_saved_variables();
      result[0] = stf_linear_packed(grads[0], saved[0], saved[1], saved[2], ctx->saved_data["rows"].toSymInt(),
                                    std::nullopt, !ctx->saved_data["transpose"].toBool());
    }
    if (GivenTensors::needs_grad(ctx, 4)) {
      result[5] = grads[0].dim() == 1 ? grads[0] : grads[0].flatten(0, -2).sum(0);
    }
    return result;
  }
};

at::Tensor stf_linear_packed_autograd(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& packed_values,
                                      const at::Tensor& mask, c10::SymInt rows, const std::optional<at::Tensor>& bias,
                                      bool transpose) {
  refuse_tangents("stf_linear_packed", {basis, packed_values});
  if (any_has_tangent({input, value_or_undefined(bias)})) {  // linear in both together
    const auto bias_tangent = bias ? std::optional(tangent_or_zeros(*bias)) : std::nullopt;
    return with_tangent(
        stf_linear_packed(without_tangent(input), basis, packed_values, mask, rows, without_tangent(bias), transpose),
        stf_linear_packed(tangent_or_zeros(input), basis, packed_values, mask, rows, bias_tangent, transpose));
  }
  if (any_requires_grad({input, basis, packed_values, value_or_undefined(bias)})) {
    return StfLinearPacked::apply(input, basis, packed_values, mask, std::move(rows), bias, transpose);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return stf_linear_packed(input, basis, packed_values, mask, std::move(rows), bias, transpose);
}

// ---- autocast ---------------------------------------------------------------------------------

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor stf_linear_packed_autocast(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& packed_values,
                                      const at::Tensor& mask, c10::SymInt rows, const std::optional<at::Tensor>& bias,
                                      bool transpose) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto lower = [dtype = at::autocast::get_autocast_dtype(device)](const at::Tensor& tensor) {
    return at::autocast::cached_cast(dtype, tensor, device);
  };
  return stf_linear_packed(lower(input), lower(basis), lower(packed_values), mask, std::move(rows),
                           bias ? std::optional(lower(*bias)) : std::nullopt, transpose);
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("stf_linear_packed", stf_linear_packed_meta);
}

TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("stf_linear_packed", stf_linear_packed_autograd);
}

TORCHOPS_LIBRARY_IMPL(AutocastCPU, m) {
  m.impl("stf_linear_packed", stf_linear_packed_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCHOPS_LIBRARY_IMPL(AutocastCUDA, m) {
  m.impl("stf_linear_packed", stf_linear_packed_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

// ---- C++ API ----------------------------------------------------------------------------------

at::Tensor stf_linear_packed(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& packed_values,
                             const at::Tensor& mask, c10::SymInt rows, const std::optional<at::Tensor>& bias,
                             bool transpose) {
  static const auto op = find_operator<decltype(stf_linear_packed)>("stf_linear_packed");
  return op(input, basis, packed_values, mask, rows, bias, transpose);
}

}  // namespace torchops
