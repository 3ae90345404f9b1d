#pragma once

#include <ATen/core/Tensor.h>

// Products that multiply the zeros of a sparse factor make a NaN of each that meets an infinity or a NaN: an atom that
// overflows would reach rows that do not have it. Tokens with such atoms are computed anew, nonzero by nonzero.

namespace torchops {

// The tokens of contiguous atoms [blocks, T, K] that have a NaN or an infinity, as int64; undefined where there is
// none.
at::Tensor nonfinite_tokens(const at::Tensor& atoms);

// Overwrites output [T, rows] for these tokens with by_nonzeros(their atoms).
template <typename Product>
void repair_nonfinite_tokens(const at::Tensor& output, const at::Tensor& atoms, const Product& by_nonzeros) {
  if (const auto tokens = nonfinite_tokens(atoms); tokens.defined()) {
    output.index_copy_(0, tokens, by_nonzeros(atoms.index_select(1, tokens)));
  }
}

}  // namespace torchops
