#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <array>
#include <optional>
#include <tuple>

#include "core/tensors.h"
#include "stf/stf.h"

namespace torch::autograd {
struct AutogradContext;
}

// A linear layer with a sparse factor, as every device computes it: dense products with the basis, and sparse
// ones, which are the device's.

namespace torchops {

inline constexpr int64_t largest_basis_size = 32767;

// Gradients to input, basis, values (or the latent) and bias, undefined where nobody asks for them.
using StfGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// What the gradients that are asked for take: a layer that is frozen but for some of its tensors saves no more.
struct StfGradientNeeds {
  bool input, basis, values, indices, atoms;

  StfGradientNeeds(bool transpose, bool to_latent, std::array<bool, 4> output_mask)
      : input(output_mask[transpose ? 2 : 1]),
        basis(output_mask[0] || (transpose && output_mask[2])),
        values(output_mask[0] || (!transpose && output_mask[1])),
        indices(values || (!to_latent && output_mask[2])),
        atoms(output_mask[transpose ? 1 : 2]) {}
};

// The arguments of _stf_linear_backward; absent is what the gradients are not made of. to_latent: every pair of a row
// and an atom has a gradient, not only the nonzeros.
struct StfBackward {
  const at::Tensor& grad_output;             // [..., out]
  const std::optional<at::Tensor>& input;    // [..., in]
  const std::optional<at::Tensor>& basis;    // [blocks, K, cols / blocks]
  const std::optional<at::Tensor>& values;   // [rows, blocks, nnz]
  const std::optional<at::Tensor>& indices;  // [rows, blocks, nnz]
  const std::optional<at::Tensor>& atoms;    // [blocks, T, K]
  c10::SymIntArrayRef basis_sizes;
  bool transpose;
  bool to_latent;
  std::array<bool, 4> output_mask;

  auto members() const {
    return std::tie(grad_output, input, basis, values, indices, atoms, basis_sizes, transpose, to_latent, output_mask);
  }
  StfGradientNeeds needs() const { return {transpose, to_latent, output_mask}; }
};

at::ScalarType index_dtype(const c10::SymInt& basis_size);
c10::SymDimVector output_sizes(const at::Tensor& input, const at::Tensor& basis, const c10::SymInt& num_rows,
                               bool transpose);

void check_layer(const char* op, const at::Tensor& input, const at::Tensor& basis, const c10::SymInt& num_rows,
                 const std::optional<at::Tensor>& bias, bool transpose);
void check_stf_linear(const char* op, const at::Tensor& input, const at::Tensor& basis, const at::Tensor& values,
                      const at::Tensor& indices, const std::optional<at::Tensor>& bias, bool transpose);
void check_stf_linear_backward(const StfBackward& args);
void check_stf_linear_straight_through(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& latent,
                                       const c10::SymInt& nnz, const std::optional<at::Tensor>& bias, bool transpose);
void check_stf_select(const at::Tensor& latent, const c10::SymInt& nnz);
void check_stf_select_backward(const at::Tensor& grad_values, const at::Tensor& indices, const c10::SymInt& basis_size);

void check_stf_pack(const at::Tensor& values, const at::Tensor& indices, const c10::SymInt& basis_size);
void check_stf_linear_packed(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& packed_values,
                             const at::Tensor& mask, const c10::SymInt& rows, const std::optional<at::Tensor>& bias,
                             bool transpose);

// The operators _stf_linear_with_atoms and _stf_linear_backward: the output and what the backward needs besides
// the inputs, and the backward.
std::tuple<at::Tensor, at::Tensor> stf_linear_with_atoms(const at::Tensor& input, const at::Tensor& basis,
                                                         const at::Tensor& values, const at::Tensor& indices,
                                                         const std::optional<at::Tensor>& bias, bool transpose);
StfGradients stf_linear_backward(const StfBackward& args);

// For a Function's forward and backward: keeps what the gradients that may be asked for take, and computes those that
// are. Without a gradient to the output there is none.
void save_for_stf_backward(torch::autograd::AutogradContext* ctx, const at::Tensor& input, const at::Tensor& basis,
                           const at::Tensor& values, const at::Tensor& indices, const at::Tensor& atoms, bool transpose,
                           bool to_latent, std::array<bool, 4> output_mask);
StfGradients gradients_of_saved(torch::autograd::AutogradContext* ctx, const at::Tensor& grad_output,
                                std::array<bool, 4> output_mask);

// [T, blocks * c] -> [blocks, T, c], and back
inline at::Tensor split_blocks(const at::Tensor& tokens, int64_t num_blocks) {
  return tokens.view({tokens.size(0), num_blocks, num_blocks == 0 ? 0 : tokens.size(1) / num_blocks}).transpose(0, 1);
}
inline at::Tensor join_blocks(const at::Tensor& blocks) {
  return blocks.transpose(0, 1).reshape({blocks.size(1), blocks.size(0) * blocks.size(2)});
}
// The sizes of `model` with another last one.
inline at::Tensor with_leading_sizes_of(const at::Tensor& model, const at::Tensor& tokens) {
  auto sizes = model.sizes().vec();
  sizes.back() = tokens.size(-1);
  return tokens.view(sizes);
}

// How torch multiplies dense matrices, output = left right + bias.
inline void product_by_torch(const at::Tensor& left, const at::Tensor& right, at::Tensor output,
                             const std::optional<at::Tensor>& bias) {
  at::bmm_out(output, left, right);
  if (bias) {
    output.add_(bias->unsqueeze(1));
  }
}

// Sparse is a sparse factor on a device, an aggregate of an operator's name, values, indices and K, with
//   atoms_to_rows(atoms [blocks, T, K], bias) -> [T, rows]
//   rows_to_atoms(rows [T, rows]) -> [blocks, T, K]
//   value_gradient(rows [T, rows], atoms [blocks, T, K]) -> [rows, blocks, nnz]
// and the dense product of the device,
//   dense_product(left [blocks, m, d], right [blocks, d, n], output [blocks, m, n], bias [blocks, n] or none),
// whose output may be a view, and whose bits may depend on the strides of left and right: these are always the same.

// [blocks, m, d], [blocks, d, n] -> [blocks, m, n]
template <typename Sparse>
at::Tensor product(const at::Tensor& left, const at::Tensor& right) {
  const auto output = at::empty({left.size(0), left.size(1), right.size(2)}, left.options());
  Sparse::dense_product(left, right, output, std::nullopt);
  return output;
}
// The same with the blocks side by side: [m, blocks * n]
template <typename Sparse>
at::Tensor joined_product(const at::Tensor& left, const at::Tensor& right,
                          const std::optional<at::Tensor>& bias = std::nullopt) {
  const auto num_blocks = left.size(0), size = right.size(2);
  const auto output = at::empty({left.size(1), num_blocks * size}, left.options());
  const auto of_blocks = bias ? std::optional(bias->reshape({num_blocks, size})) : std::nullopt;
  Sparse::dense_product(left, right, split_blocks(output, num_blocks), of_blocks);
  return output;
}

// The output, and the atoms' side of the sparse product, which the backward needs.
template <typename Sparse>
std::tuple<at::Tensor, at::Tensor> stf_linear_forward(const Sparse& sparse, const at::Tensor& input,
                                                      const at::Tensor& basis, const std::optional<at::Tensor>& bias,
                                                      bool transpose) {
  const auto tokens = as_tokens(input), vectors = basis.contiguous();
  if (!transpose) {
    const auto atoms = product<Sparse>(split_blocks(tokens, vectors.size(0)), vectors.transpose(1, 2));
    return {with_leading_sizes_of(input, sparse.atoms_to_rows(atoms, bias)), atoms};
  }
  const auto atoms = sparse.rows_to_atoms(tokens);
  return {with_leading_sizes_of(input, joined_product<Sparse>(atoms, vectors, bias)), atoms};
}

template <typename Sparse>
StfGradients stf_linear_gradients(const Sparse& sparse, const StfBackward& args) {
  const auto num_blocks = args.basis_sizes[0].expect_int();
  const auto& output_mask = args.output_mask;
  const auto grad = as_tokens(args.grad_output);
  const auto tokens = args.input ? as_tokens(*args.input) : at::Tensor();
  const auto vectors = args.basis ? args.basis->contiguous() : at::Tensor();
  const auto atoms = args.atoms ? args.atoms->contiguous() : at::Tensor();
  const auto to_values = [&](const at::Tensor& rows, const at::Tensor& of_atoms) {
    if (!args.to_latent) {
      return sparse.value_gradient(rows, of_atoms);
    }
    const auto row_blocks = rows.t().unsqueeze(0).expand({num_blocks, rows.size(1), rows.size(0)});
    return joined_product<Sparse>(row_blocks, of_atoms).view({rows.size(1), num_blocks, of_atoms.size(2)});
  };
  at::Tensor grad_input, grad_basis, grad_values;
  if (!args.transpose) {
    if (output_mask[0] || output_mask[1]) {
      const auto grad_atoms = sparse.rows_to_atoms(grad);
      if (output_mask[0]) {
        grad_input = with_leading_sizes_of(args.grad_output, joined_product<Sparse>(grad_atoms, vectors));
      }
      if (output_mask[1]) {
        grad_basis = product<Sparse>(grad_atoms.transpose(1, 2), split_blocks(tokens, num_blocks));
      }
    }
    if (output_mask[2]) {
      grad_values = to_values(grad, atoms);
    }
  } else {
    const auto blocks = split_blocks(grad, num_blocks);
    if (output_mask[0] || output_mask[2]) {
      const auto grad_atoms = product<Sparse>(blocks, vectors.transpose(1, 2));
      if (output_mask[0]) {
        grad_input = with_leading_sizes_of(args.grad_output, sparse.atoms_to_rows(grad_atoms, std::nullopt));
      }
      if (output_mask[2]) {
        grad_values = to_values(tokens, grad_atoms);
      }
    }
    if (output_mask[1]) {
      grad_basis = product<Sparse>(atoms.transpose(1, 2), blocks);
    }
  }
  return {grad_input, grad_basis, grad_values, output_mask[3] ? grad.sum(0) : at::Tensor()};
}

// ---- operators ----------------------------------------------------------------------------------

template <typename Sparse>
at::Tensor stf_linear_on(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& values,
                         const at::Tensor& indices, const std::optional<at::Tensor>& bias, bool transpose) {
  check_stf_linear("stf_linear", input, basis, values, indices, bias, transpose);
  const c10::DeviceGuard guard(input.device());
  return std::get<0>(
      stf_linear_forward(Sparse{"stf_linear", values, indices, basis.size(1)}, input, basis, bias, transpose));
}

template <typename Sparse>
std::tuple<at::Tensor, at::Tensor> stf_linear_with_atoms_on(const at::Tensor& input, const at::Tensor& basis,
                                                            const at::Tensor& values, const at::Tensor& indices,
                                                            const std::optional<at::Tensor>& bias, bool transpose) {
  check_stf_linear("_stf_linear_with_atoms", input, basis, values, indices, bias, transpose);
  const c10::DeviceGuard guard(input.device());
  return stf_linear_forward(Sparse{"stf_linear", values, indices, basis.size(1)}, input, basis, bias, transpose);
}

template <typename Sparse>
StfGradients stf_linear_backward_on(const StfBackward& args) {
  check_stf_linear_backward(args);
  const c10::DeviceGuard guard(args.grad_output.device());
  const auto values = args.values.value_or(at::Tensor()), indices = args.indices.value_or(at::Tensor());
  return stf_linear_gradients(Sparse{"_stf_linear_backward", values, indices, args.basis_sizes[1].expect_int()}, args);
}

template <typename Sparse>
at::Tensor stf_linear_straight_through_on(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& latent,
                                          int64_t nnz, const std::optional<at::Tensor>& bias, bool transpose) {
  check_stf_linear_straight_through(input, basis, latent, nnz, bias, transpose);
  const auto [values, indices] = stf_select(latent, nnz);
  return stf_linear_on<Sparse>(input, basis, values, indices, bias, transpose);
}

}  // namespace torchops
