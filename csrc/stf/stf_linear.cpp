#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include "core/autograd.h"
#include "core/checks.h"
#include "core/forward_mode.h"
#include "core/library.h"
#include "stf/linear.h"
#include "stf/stf.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def(
      "stf_linear(Tensor input, Tensor basis, Tensor values, Tensor indices, Tensor? bias=None, *, bool "
      "transpose=False)"
      " -> Tensor");
  m.def(
      "_stf_linear_with_atoms(Tensor input, Tensor basis, Tensor values, Tensor indices, Tensor? bias=None, *,"
      " bool transpose=False) -> (Tensor output, Tensor atoms)");
  m.def(
      "_stf_linear_backward(Tensor grad_output, Tensor? input, Tensor? basis, Tensor? values, Tensor? indices,"
      " Tensor? atoms, *, SymInt[] basis_sizes, bool transpose, bool to_latent, bool[4] output_mask)"
      " -> (Tensor grad_input, Tensor grad_basis, Tensor grad_values, Tensor grad_bias)");
}

// ---- checks -----------------------------------------------------------------------------------

at::ScalarType index_dtype(const c10::SymInt& basis_size) {
  return TORCH_GUARD_OR_FALSE(basis_size.sym_le(256)) ? at::kByte : at::kShort;
}

c10::SymDimVector output_sizes(const at::Tensor& input, const at::Tensor& basis, const c10::SymInt& num_rows,
                               bool transpose) {
  c10::SymDimVector sizes(input.sym_sizes());
  sizes.back() = transpose ? basis.sym_size(0) * basis.sym_size(2) : num_rows;
  return sizes;
}

// What a layer's input and basis have to be, whatever holds the sparse factor of num_rows rows.
void check_layer(const char* op, const at::Tensor& input, const at::Tensor& basis, const c10::SymInt& num_rows,
                 const std::optional<at::Tensor>& bias, bool transpose) {
  const Checks check(op);
  check.not_scalar("input", input, "[..., in]");
  check.floating("input", input);
  check.rank("basis", basis, "[blocks, K, cols / blocks]");
  check.same_dtype("basis", basis, "input", input);
  check.same_device("basis", basis, "input", input);
  check.between("basis's second dimension K", basis.sym_size(1), 1, largest_basis_size);
  const auto cols = basis.sym_size(0) * basis.sym_size(2);
  const auto& in = transpose ? num_rows : cols;
  const auto& out = transpose ? cols : num_rows;
  check.equal("input's last dimension", input.sym_size(-1), transpose ? "rows" : "cols", in);
  if (bias) {
    check.shape("bias", *bias, "[out]", {{out}});
    check.same_dtype("bias", *bias, "input", input);
    check.same_device("bias", *bias, "input", input);
  }
}

void check_stf_linear(const char* op, const at::Tensor& input, const at::Tensor& basis, const at::Tensor& values,
                      const at::Tensor& indices, const std::optional<at::Tensor>& bias, bool transpose) {
  const Checks check(op);
  check.rank("values", values, "[rows, blocks, nnz]");
  check_layer(op, input, basis, values.sym_size(0), bias, transpose);
  check.shape("values", values, "[rows, blocks, nnz]", {{values.sym_size(0), basis.sym_size(0), values.sym_size(2)}});
  check.same_dtype("values", values, "input", input);
  check.same_device("values", values, "input", input);
  check.at_most("values' last dimension nnz", values.sym_size(2), "K", basis.sym_size(1));
  check.shape("indices", indices, "[rows, blocks, nnz]", values.sym_sizes());
  check.index_dtype("indices", indices);
  check.same_device("indices", indices, "input", input);
}

void check_stf_linear_backward(const StfBackward& args) {
  const auto& [grad_output, input, basis, values, indices, atoms, basis_sizes, transpose, to_latent, output_mask] =
      args;
  constexpr const char* op = "_stf_linear_backward";
  const Checks check(op);
  if (input && basis && values && indices) {
    check_stf_linear(op, *input, *basis, *values, *indices, std::nullopt, transpose);
    check.sizes("grad_output", grad_output, output_sizes(*input, *basis, values->sym_size(0), transpose));
  }
  check.not_scalar("grad_output", grad_output, "[..., out]");
  check.floating("grad_output", grad_output);
  check.equal("basis_sizes' length", static_cast<int64_t>(basis_sizes.size()), "that of [blocks, K, cols / blocks]", 3);
  const auto needs = args.needs();
  for (const auto& [name, needed, tensor] :
       {std::tuple{"input", needs.input, &input}, std::tuple{"basis", needs.basis, &basis},
        std::tuple{"values", needs.values, &values}, std::tuple{"indices", needs.indices, &indices},
        std::tuple{"atoms", needs.atoms, &atoms}}) {
    if (needed) {
      check.given(name, *tensor, "a gradient that is asked for takes it");
    }
    if (*tensor && tensor != &indices) {
      const bool has_input = input.has_value();
      check.same_dtype(name, **tensor, has_input ? "input" : "grad_output", has_input ? *input : grad_output);
    }
    if (*tensor) {
      check.same_device(name, **tensor, "grad_output", grad_output);
    }
  }
  if (input) {
    check.same_dtype("grad_output", grad_output, "input", *input);
  }
  const auto &num_blocks = basis_sizes[0], &basis_size = basis_sizes[1];
  const auto cols = num_blocks * basis_sizes[2];
  if (transpose) {
    check.equal("grad_output's last dimension", grad_output.sym_size(-1), "cols", cols);
  }
  if (basis) {
    check.shape("basis", *basis, "[blocks, K, cols / blocks]", basis_sizes);
  }
  // On the input's side rows are the input's last dimension, which nobody may have given.
  auto num_rows = grad_output.sym_size(-1);
  if (transpose && indices) {
    check.rank("indices", *indices, "[rows, blocks, nnz]");
    num_rows = indices->sym_size(0);
  } else if (transpose && input) {
    check.not_scalar("input", *input, "[..., in]");
    num_rows = input->sym_size(-1);
  }
  if (indices) {
    check.rank("indices", *indices, "[rows, blocks, nnz]");
    check.shape("indices", *indices, "[rows, blocks, nnz]", {{num_rows, num_blocks, indices->sym_size(2)}});
    check.index_dtype("indices", *indices);
  }
  if (values && indices) {
    check.shape("values", *values, "[rows, blocks, nnz]", indices->sym_sizes());
  }
  if (input) {
    c10::SymDimVector sizes(grad_output.sym_sizes());
    sizes.back() = transpose ? num_rows : cols;
    check.sizes("input", *input, sizes);
  }
  if (atoms) {
    check.shape("atoms", *atoms, "[blocks, T, K]", {{num_blocks, num_tokens(grad_output), basis_size}});
  }
}

namespace {

// ---- shapes -----------------------------------------------------------------------------------

at::Tensor stf_linear_meta(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& values,
                           const at::Tensor& indices, const std::optional<at::Tensor>& bias, bool transpose) {
  check_stf_linear("stf_linear", input, basis, values, indices, bias, transpose);
  return at::empty_symint(output_sizes(input, basis, values.sym_size(0), transpose), input.options());
}

std::tuple<at::Tensor, at::Tensor> stf_linear_with_atoms_meta(const at::Tensor& input, const at::Tensor& basis,
                                                              const at::Tensor& values, const at::Tensor& indices,
                                                              const std::optional<at::Tensor>& bias, bool transpose) {
  check_stf_linear("_stf_linear_with_atoms", input, basis, values, indices, bias, transpose);
  return {at::empty_symint(output_sizes(input, basis, values.sym_size(0), transpose), input.options()),
          at::empty_symint({basis.sym_size(0), num_tokens(input), basis.sym_size(1)}, input.options())};
}

StfGradients stf_linear_backward_meta(const StfBackward& args) {
  check_stf_linear_backward(args);
  const auto& [grad_output, input, basis, values, indices, atoms, basis_sizes, transpose, to_latent, output_mask] =
      args;
  const auto empty = [&args](c10::SymIntArrayRef sizes) { return at::empty_symint(sizes, args.grad_output.options()); };
  StfGradients grads;
  if (output_mask[0]) {
    c10::SymDimVector sizes(grad_output.sym_sizes());
    sizes.back() = transpose ? indices->sym_size(0) : basis_sizes[0] * basis_sizes[2];
    std::get<0>(grads) = empty(sizes);
  }
  if (output_mask[1]) {
    std::get<1>(grads) = empty(basis_sizes);
  }
  if (output_mask[2]) {
    const auto num_rows = transpose ? input->sym_size(-1) : grad_output.sym_size(-1);
    std::get<2>(grads) = empty({num_rows, basis_sizes[0], to_latent ? basis_sizes[1] : indices->sym_size(2)});
  }
  if (output_mask[3]) {
    std::get<3>(grads) = empty({grad_output.sym_size(-1)});
  }
  return grads;
}

// ---- gradient ---------------------------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

}  // namespace

std::tuple<at::Tensor, at::Tensor> stf_linear_with_atoms(const at::Tensor& input, const at::Tensor& basis,
                                                         const at::Tensor& values, const at::Tensor& indices,
                                                         const std::optional<at::Tensor>& bias, bool transpose) {
  static const auto op = find_operator<decltype(stf_linear_with_atoms)>("_stf_linear_with_atoms");
  return op(input, basis, values, indices, bias, transpose);
}

StfGradients stf_linear_backward(const StfBackward& args) {
  static const auto op = find_operator<decltype(stf_linear_backward)>("_stf_linear_backward");
  return op(args);
}

void save_for_stf_backward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& basis,
                           const at::Tensor& values, const at::Tensor& indices, const at::Tensor& atoms, bool transpose,
                           bool to_latent, std::array<bool, 4> output_mask) {
  const StfGradientNeeds needs(transpose, to_latent, output_mask);
  const auto if_needed = [](bool needed, const at::Tensor& tensor) { return needed ? tensor : at::Tensor(); };
  ctx->save_for_backward({if_needed(needs.input, input), if_needed(needs.basis, basis), if_needed(needs.values, values),
                          if_needed(needs.indices, indices), if_needed(needs.atoms, atoms)});
  ctx->set_materialize_grads(false);
  ctx->saved_data["basis_sizes"] = basis.sym_sizes();
  ctx->saved_data["transpose"] = transpose;
  ctx->saved_data["to_latent"] = to_latent;
}

StfGradients gradients_of_saved(AutogradContext* ctx, const at::Tensor& grad_output, std::array<bool, 4> output_mask) {
  if (!grad_output.defined()) {
    return {};
  }
  const auto saved = ctx->get_saved_variables();
  const auto basis_sizes = ctx->saved_data["basis_sizes"].toSymIntVector();
  return stf_linear_backward({grad_output, optional_tensor(saved[0]), optional_tensor(saved[1]),
                              optional_tensor(saved[2]), optional_tensor(saved[3]), optional_tensor(saved[4]),
                              basis_sizes, ctx->saved_data["transpose"].toBool(), ctx->saved_data["to_latent"].toBool(),
                              output_mask});
}

namespace {

struct StfLinearFunction : torch::autograd::Function<StfLinearFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& basis,
                            const at::Tensor& values, const at::Tensor& indices, const std::optional<at::Tensor>& bias,
                            bool transpose) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [output, atoms] = stf_linear_with_atoms(input, basis, values, indices, bias, transpose);
    save_for_stf_backward(ctx, input, basis, values, indices, atoms, transpose, /*to_latent=*/false,
                          {input.requires_grad(), basis.requires_grad(), values.requires_grad(), false});
    GivenTensors::save(ctx, {input, basis, values, indices, value_or_undefined(bias)});
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto [grad_input, grad_basis, grad_values, grad_bias] =
        gradients_of_saved(ctx, grads[0],
                           {GivenTensors::needs_grad(ctx, 0), GivenTensors::needs_grad(ctx, 1),
                            GivenTensors::needs_grad(ctx, 2), GivenTensors::needs_grad(ctx, 4)});
    return {grad_input, grad_basis, grad_values, {}, grad_bias, {}};
  }
};

// Linear in the input, the basis and the values, each by itself, and in the bias.
at::Tensor stf_linear_forward_mode(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& values,
                                   const at::Tensor& indices, const std::optional<at::Tensor>& bias, bool transpose) {
  const auto x = without_tangent(input), vectors = without_tangent(basis), numbers = without_tangent(values);
  const auto output = stf_linear(x, vectors, numbers, indices, without_tangent(bias), transpose);
  auto tangent = bias && has_tangent(*bias) ? tangent_or_zeros(*bias).expand_as(output) : at::zeros_like(output);
  if (has_tangent(input)) {
    tangent = tangent + stf_linear(tangent_or_zeros(input), vectors, numbers, indices, std::nullopt, transpose);
  }
  if (has_tangent(basis)) {
    tangent = tangent + stf_linear(x, tangent_or_zeros(basis), numbers, indices, std::nullopt, transpose);
  }
  if (has_tangent(values)) {
    tangent = tangent + stf_linear(x, vectors, tangent_or_zeros(values), indices, std::nullopt, transpose);
  }
  return with_tangent(output, tangent);
}

// The check comes first, for errors name the operator.
at::Tensor stf_linear_autograd(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& values,
                               const at::Tensor& indices, const std::optional<at::Tensor>& bias, bool transpose) {
  if (any_has_tangent({input, basis, values, value_or_undefined(bias)})) {
    return stf_linear_forward_mode(input, basis, values, indices, bias, transpose);
  }
  if (any_requires_grad({input, basis, values, value_or_undefined(bias)})) {
    check_stf_linear("stf_linear", input, basis, values, indices, bias, transpose);
    return StfLinearFunction::apply(input, basis, values, indices, bias, transpose);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return stf_linear(input, basis, values, indices, bias, transpose);
}

// ---- autocast ---------------------------------------------------------------------------------

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor stf_linear_autocast(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& values,
                               const at::Tensor& indices, const std::optional<at::Tensor>& bias, bool transpose) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto lower = [dtype = at::autocast::get_autocast_dtype(device)](const at::Tensor& tensor) {
    return at::autocast::cached_cast(dtype, tensor, device);
  };
  return stf_linear(lower(input), lower(basis), lower(values), indices,
                    bias ? std::optional(lower(*bias)) : std::nullopt, transpose);
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("stf_linear", stf_linear_meta);
  m.impl("_stf_linear_with_atoms", stf_linear_with_atoms_meta);
  m.impl("_stf_linear_backward", flattened<stf_linear_backward_meta>);
}

TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("stf_linear", stf_linear_autograd);
  m.impl("_stf_linear_with_atoms", torch::autograd::autogradNotImplementedFallback());
  m.impl("_stf_linear_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCHOPS_LIBRARY_IMPL(AutocastCPU, m) {
  m.impl("stf_linear", stf_linear_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCHOPS_LIBRARY_IMPL(AutocastCUDA, m) {
  m.impl("stf_linear", stf_linear_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

// ---- C++ API ----------------------------------------------------------------------------------

at::Tensor stf_linear(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& values,
                      const at::Tensor& indices, const std::optional<at::Tensor>& bias, bool transpose) {
  static const auto op = find_operator<decltype(stf_linear)>("stf_linear");
  return op(input, basis, values, indices, bias, transpose);
}

}  // namespace torchops
