#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "sparse_attention/nearest_codeword.h"
#include "sparse_attention/partition.h"

// What pq_encode does on every device.

namespace torchops {

inline at::Tensor empty_codes(const at::Tensor& input, const at::Tensor& codebooks) {
  auto sizes = input.sym_sizes().vec();
  sizes.back() = codebooks.sym_size(0);
  return at::empty_symint(sizes, input.options().dtype(at::kByte));
}

// Calls launch(args) with the kernel's arguments.
template <typename Launch>
at::Tensor pq_encode_on_device(const at::Tensor& input, const at::Tensor& codebooks, const Launch& launch) {
  check_partition("pq_encode", input, codebooks);
  const auto codes = empty_codes(input, codebooks);
  const Partition partition(input, codebooks);
  for_dtype(input.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(kernels::sparse_attention::NearestCodeword<T>{partition.parts<T>(),
                                                         codes.template mutable_data_ptr<uint8_t>()});
  });
  return codes;
}

}  // namespace torchops
