#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "sparse_attention/partition.h"
#include "sparse_attention/quantization_loss.h"

// What pq_loss does on every device. Device is made of the tensors' device and has
//   loss(args): sums of pieces, then their mean
//   gradient(args): gradients of pieces, then the sum of those to codewords where they are asked for

namespace torchops {

void check_pq_loss_backward(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& codebooks);

// As many as occupy a device, as long as each has some rows and what they keep of codebooks stays small.
inline kernels::sparse_attention::RowPieces pieces_of(const Partition& partition) {
  constexpr int64_t least_rows = 32, most_pieces = 1024, most_numbers = int64_t{1} << 24;
  const int64_t num_rows = partition.num_rows(), numbers = std::max<int64_t>(1, partition.codewords.numel());
  const int64_t of_memory = std::max<int64_t>(1, most_numbers / numbers);
  return {num_rows, std::min({(num_rows + least_rows - 1) / least_rows, most_pieces, of_memory})};
}

template <typename Device>
at::Tensor pq_loss_on(const at::Tensor& input, const at::Tensor& codebooks) {
  check_partition("pq_loss", input, codebooks);
  const Device device(input.device());
  const Partition partition(input, codebooks);
  const auto pieces = pieces_of(partition);
  auto loss = at::empty({}, input.options().dtype(partition.codewords.scalar_type()));
  const auto sums = at::empty({pieces.num_pieces, partition.num_subspaces}, input.options().dtype(at::kDouble));
  for_dtype(input.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    device.loss(kernels::sparse_attention::QuantizationLoss<T>{
        partition.parts<T>(), pieces, sums.template mutable_data_ptr<double>(),
        loss.template mutable_data_ptr<kernels::accumulate_t<T>>()});
  });
  return loss;
}

template <typename Device>
std::tuple<at::Tensor, at::Tensor> pq_loss_backward_on(const at::Tensor& grad, const at::Tensor& input,
                                                       const at::Tensor& codebooks, std::array<bool, 2> output_mask) {
  check_pq_loss_backward(grad, input, codebooks);
  const Device device(input.device());
  const Partition partition(input, codebooks);
  const auto pieces = pieces_of(partition);
  at::Tensor grad_input, grad_codewords, piece_gradients;
  if (output_mask[0]) {
    grad_input = at::empty(input.sizes(), input.options());
  }
  if (output_mask[1]) {
    grad_codewords = input.numel() > 0 ? at::empty_like(partition.codewords) : at::zeros_like(partition.codewords);
    piece_gradients = at::empty({pieces.num_pieces, partition.codewords.numel()}, partition.codewords.options());
  }
  if (input.numel() > 0) {
    for_dtype(input.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      using A = kernels::accumulate_t<T>;
      device.gradient(kernels::sparse_attention::QuantizationGradient<T>{
          partition.parts<T>(), pieces, grad.template const_data_ptr<A>(), mutable_data_or_null<T>(grad_input),
          mutable_data_or_null<A>(piece_gradients), mutable_data_or_null<A>(grad_codewords)});
    });
  }
  at::Tensor grad_codebooks;
  if (output_mask[1]) {
    grad_codebooks = at::empty(codebooks.sizes(), codebooks.options());
    grad_codebooks.copy_(grad_codewords.narrow(2, 0, codebooks.size(1)).transpose(1, 2));
  }
  return {grad_input, grad_codebooks};
}

}  // namespace torchops
