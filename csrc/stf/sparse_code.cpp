#include "stf/sparse_code.h"

#include <ATen/ATen.h>

#include <limits>

#include "stf/stf.h"

namespace torchops {
namespace {

// The distance from 1 to the next number.
double rounding_of(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                             : std::numeric_limits<float>::epsilon();
}

// Least squares for the nonzeros of every row on their support, by conjugate gradients: each row is a system of
// its own. A row rests where its residual, or the curvature along its direction, is no more than rounding leaves: a
// step would then be of any length. Atoms have length 1.
at::Tensor refit(const at::Tensor& weight, const at::Tensor& products, const at::Tensor& gram, at::Tensor code,
                 int64_t nnz) {
  constexpr int64_t steps = 8;
  const double rounding = rounding_of(products), least_curvature = 4 * rounding * static_cast<double>(nnz);
  const auto least_norm = weight.square().sum(1, true).mul_(16 * rounding * rounding * static_cast<double>(nnz));
  const auto support = code.ne(0).to(code.scalar_type());
  auto residual = (products - code.matmul(gram)).mul_(support);
  auto direction = residual.clone();
  auto norm = residual.square().sum(1, true);
  for (int64_t step = 0; step < steps; ++step) {
    const auto image = direction.matmul(gram).mul_(support);
    const auto curvature = (direction * image).sum(1, true);
    const auto moves =
        norm.gt(least_norm).logical_and_(curvature.gt(direction.square().sum(1, true) * least_curvature));
    const auto if_moving = [&](const at::Tensor& quotient) { return quotient.masked_fill(moves.logical_not(), 0); };
    const auto length = if_moving(norm / curvature);
    code = code + length * direction;
    residual = residual.addcmul(length, image, -1);
    const auto next = residual.square().sum(1, true);
    direction = residual.addcmul(if_moving(next / norm), direction);
    norm = next;
  }
  return code;
}

// Orthogonal matching pursuit of all rows at once: the atom that explains most of what is left joins the support,
// and the code is solved for anew. Where atoms depend on each other so much that this fails, the row's code stays
// without the new one.
at::Tensor matching_pursuit(const at::Tensor& products, const at::Tensor& gram, int64_t nnz) {
  const double relative_ridge = products.scalar_type() == at::kDouble ? 1e-14 : 1e-6;
  const auto inverse_norm = gram.diagonal().clamp_min(1e-20).rsqrt();
  auto correlation = products;
  auto used = at::zeros_like(products, at::kBool);
  at::Tensor support, code = at::zeros_like(products);
  for (int64_t size = 1; size <= nnz; ++size) {
    const auto best = (correlation * inverse_norm).abs().masked_fill(used, -1).argmax(1, true);
    used = used.scatter(1, best, true);
    support = size == 1 ? best : at::cat({support, best}, 1);
    const auto system = gram.index({support.unsqueeze(2), support.unsqueeze(1)});
    const auto ridge = system.diagonal(0, 1, 2).mean(1).view({-1, 1, 1}) * relative_ridge + 1e-30;
    const auto solution = std::get<0>(
        at::linalg_solve_ex(system + ridge * at::eye(size, gram.options()), products.gather(1, support).unsqueeze(2)));
    const auto solved = at::isfinite(solution).all(1);
    code = at::where(solved, at::zeros_like(products).scatter(1, support, solution.squeeze(2)), code);
    correlation = products - code.matmul(gram);
  }
  return code;
}

// Gradient steps to the dense code, of which the largest entries are kept.
at::Tensor thresholded(const at::Tensor& weight, const at::Tensor& products, const at::Tensor& gram, at::Tensor code,
                       int64_t nnz) {
  constexpr int64_t steps = 2;
  const auto step_length = at::linalg_eigvalsh(gram)[-1].clamp_min(1e-30).reciprocal();
  for (int64_t step = 0; step < steps; ++step) {
    code = keep_largest(code + (products - code.matmul(gram)) * step_length, nnz);
  }
  return refit(weight, products, gram, code, nnz);
}

}  // namespace

at::Tensor keep_largest(const at::Tensor& code, int64_t nnz) {
  const auto [values, indices] = stf_select(code.unsqueeze(1), nnz);
  return at::zeros_like(code).scatter_(1, indices.squeeze(1).to(at::kLong), values.squeeze(1));
}

at::Tensor row_errors(const at::Tensor& weight, const at::Tensor& basis, const at::Tensor& code) {
  return (weight - code.matmul(basis)).square().sum(1);
}

at::Tensor better_rows(const at::Tensor& weight, const at::Tensor& basis, const at::Tensor& code,
                       const at::Tensor& fresh, double slack) {
  const auto better = row_errors(weight, basis, fresh).lt(row_errors(weight, basis, code) * (1 + slack));
  return at::where(better.unsqueeze(1), fresh, code);
}

at::Tensor next_code(const at::Tensor& weight, const at::Tensor& basis, const at::Tensor& code, int64_t nnz) {
  const auto products = weight.matmul(basis.t()), gram = basis.matmul(basis.t());
  return nnz <= few_nonzeros ? matching_pursuit(products, gram, nnz) : thresholded(weight, products, gram, code, nnz);
}

at::Tensor first_code(const at::Tensor& weight, const at::Tensor& basis, int64_t nnz) {
  const auto gram = basis.matmul(basis.t());
  const auto ridge = gram.diagonal().mean() * 1e-4 + 1e-30;
  const auto dense =
      std::get<0>(at::linalg_solve_ex(gram + ridge * at::eye(gram.size(0), gram.options()), basis.matmul(weight.t())));
  const auto largest = keep_largest(dense.nan_to_num(0, 0, 0).t(), nnz);
  const auto start = better_rows(weight, basis, at::zeros_like(largest), largest);
  // Around least squares errors are flat: rounding would choose between a code and one that the ridge bends.
  constexpr double slack = 1e-5;
  return better_rows(weight, basis, start, next_code(weight, basis, start, nnz), slack);
}

}  // namespace torchops
