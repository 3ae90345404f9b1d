#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

#include <limits>

#include "core/tensors.h"
#include "sparse_attention/nearest_codeword.h"

// What pq_encode does on every device.

namespace torchops {

void check_pq_encode(const at::Tensor& input, const at::Tensor& codebooks);

inline at::Tensor empty_codes(const at::Tensor& input, const at::Tensor& codebooks) {
  auto sizes = input.sym_sizes().vec();
  sizes.back() = codebooks.sym_size(0);
  return at::empty_symint(sizes, input.options().dtype(at::kByte));
}

// Calls launch(args) with the kernel's arguments.
template <typename Launch>
at::Tensor pq_encode_on_device(const at::Tensor& input, const at::Tensor& codebooks, const Launch& launch) {
  using kernels::sparse_attention::codeword_group;
  check_pq_encode(input, codebooks);
  const auto codes = empty_codes(input, codebooks);
  const int64_t num_subspaces = codebooks.size(0), subspace = codebooks.size(2);
  const auto rows = input.contiguous();
  for_dtype(input.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    const int64_t num_codewords = (codebooks.size(1) + codeword_group - 1) / codeword_group * codeword_group;
    const auto codewords =
        at::constant_pad_nd(codebooks.to(c10::CppTypeToScalarType<A>::value).transpose(1, 2).contiguous(),
                            {0, num_codewords - codebooks.size(1)}, std::numeric_limits<double>::infinity());
    launch(kernels::sparse_attention::NearestCodeword<T>{
        static_cast<const T*>(rows.const_data_ptr()), codewords.template const_data_ptr<A>(),
        codes.template mutable_data_ptr<uint8_t>(), num_subspaces == 0 ? 0 : codes.numel() / num_subspaces,
        num_subspaces, subspace, num_codewords});
  });
  return codes;
}

}  // namespace torchops
