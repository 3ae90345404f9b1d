#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>

#include "core/tensors.h"
#include "sparse_attention/parts.h"

namespace torchops {

// input [..., D] and codebooks [M, E, D / M], of the operator with this name.
void check_partition(const char* op, const at::Tensor& input, const at::Tensor& codebooks);

// Inputs that passed the check, as kernels read them.
struct Partition {
  at::Tensor rows;       // [..., D], contiguous
  at::Tensor codewords;  // [M, D / M, E padded], in the accumulation dtype
  int64_t num_subspaces, subspace, num_codewords;

  Partition(const at::Tensor& input, const at::Tensor& codebooks)
      : rows(input.contiguous()),
        codewords(codebooks.to(at::toOpMathType(input.scalar_type())).transpose(1, 2)),
        num_subspaces(codebooks.size(0)),
        subspace(codebooks.size(2)),
        num_codewords(codebooks.size(1)) {
    constexpr auto group = kernels::sparse_attention::codeword_group;
    if (const int64_t missing = (group - num_codewords % group) % group; missing != 0) {
      const auto last = codewords.narrow(2, num_codewords - 1, 1);
      codewords = at::cat({codewords, last.expand({num_subspaces, subspace, missing})}, 2);
    }
    codewords = codewords.contiguous();
  }

  int64_t num_rows() const {
    const auto sizes = rows.sizes();
    return c10::multiply_integers(sizes.begin(), sizes.end() - 1);
  }

  template <typename T>
  kernels::sparse_attention::Parts<T> parts() const {
    return {static_cast<const T*>(rows.const_data_ptr()),
            codewords.const_data_ptr<kernels::accumulate_t<T>>(),
            num_rows(),
            num_subspaces,
            subspace,
            num_codewords};
  }
};

}  // namespace torchops
