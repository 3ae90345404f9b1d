#pragma once

#include "sparse_attention/parts.h"

// The loss that brings codewords to where parts are. For a part x with distances d_e to the codewords c_e of its
// subspace, w_e = 1 / max(d_e, least_distance), a_e = w_e / sum of w, y = sum of a_e c_e and z the nearest codeword, it
// is the mean over all numbers of (y - z)^2 + (x - z)^2.

namespace torchops::kernels::sparse_attention {

inline constexpr double least_distance = 1e-5;

// Rows are cut into pieces, each of which has sums of its own, so that sums keep their order whatever the threads.
struct RowPieces {
  int64_t num_rows;
  int64_t num_pieces;

  constexpr int64_t length() const { return num_pieces == 0 ? 0 : (num_rows + num_pieces - 1) / num_pieces; }
  constexpr int64_t begin(int64_t piece) const { return smaller(piece * length()); }
  constexpr int64_t end(int64_t piece) const { return smaller((piece + 1) * length()); }

 private:
  constexpr int64_t smaller(int64_t row) const { return row < num_rows ? row : num_rows; }
};

template <typename T>
struct QuantizationLoss {
  Parts<T> parts;
  RowPieces pieces;
  double* sums;  // [pieces, M]: of squares
  accumulate_t<T>* loss;

  constexpr int64_t num_units() const { return pieces.num_pieces * parts.num_subspaces; }
  constexpr accumulate_t<T> mean(double sum) const {
    return static_cast<accumulate_t<T>>(sum /
                                        static_cast<double>(parts.num_rows * parts.num_subspaces * parts.subspace));
  }
};

// Both gradients are half of what they are times the number of numbers and the loss's gradient, until `factor` makes
// them whole.
template <typename T>
struct QuantizationGradient {
  using A = accumulate_t<T>;

  Parts<T> parts;
  RowPieces pieces;
  const A* grad;       // of the loss
  T* grad_input;       // [R, M S]; null where nobody asks for it
  A* piece_gradients;  // [pieces, M, S, E padded]: to the codewords, without the factor; null as well
  A* grad_codewords;   // [M, S, E padded]: their sum, with it

  constexpr int64_t num_units() const { return pieces.num_pieces * parts.num_subspaces; }
  constexpr int64_t codebook_size() const { return parts.subspace * parts.padded(); }
  constexpr int64_t num_sums() const { return parts.num_subspaces * codebook_size(); }
  constexpr A* piece_gradient(int64_t unit) const { return piece_gradients + unit * codebook_size(); }
  constexpr A factor() const {
    return 2 * *grad / static_cast<A>(parts.num_rows * parts.num_subspaces * parts.subspace);
  }
};

}  // namespace torchops::kernels::sparse_attention
