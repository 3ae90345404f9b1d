#include "stf/sparse_code.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

#include "stf/stf.h"

namespace torchops {
namespace {

// The distance from 1 to the next number.
double rounding_of(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                             : std::numeric_limits<float>::epsilon();
}

// The normal equations of a code for a basis: products = weighed(code gram).
struct Equations {
  const Target& target;
  at::Tensor products;  // [rows, K], of weight and basis, weighed
  at::Tensor gram;      // [K, K], of the basis

  Equations(const Target& of, const at::Tensor& basis)
      : target(of), products(of.weighed(of.weight.matmul(basis.t()))), gram(basis.matmul(basis.t())) {}

  at::Tensor image(const at::Tensor& code) const { return target.weighed(code.matmul(gram)); }

  // Of each system of equations: [rows, 1] where every row is one, and one number where all are coupled.
  at::Tensor sum(const at::Tensor& numbers) const { return target.row_gram ? numbers.sum() : numbers.sum(1, true); }
};

// Towards least squares for a code's entries on its support, 1 or 0, by conjugate gradients. A system rests where its
// residual, or the curvature along its direction, is no more than rounding leaves: a step would then be of any length.
// Atoms have length 1.
at::Tensor refit(const Equations& equations, at::Tensor code, const at::Tensor& support, int64_t nnz, int64_t steps) {
  const double rounding = rounding_of(equations.products), least_curvature = 4 * rounding * static_cast<double>(nnz);
  const auto weight = equations.target.weight;
  const auto least_norm = equations.sum(weight.square()).mul_(16 * rounding * rounding * static_cast<double>(nnz));
  auto residual = (equations.products - equations.image(code)).mul_(support);
  auto direction = residual.clone();
  auto norm = equations.sum(residual.square());
  for (int64_t step = 0; step < steps; ++step) {
    const auto image = equations.image(direction).mul_(support);
    const auto curvature = equations.sum(direction * image);
    const auto moves =
        norm.gt(least_norm).logical_and_(curvature.gt(equations.sum(direction.square()) * least_curvature));
    const auto if_moving = [&](const at::Tensor& quotient) { return quotient.masked_fill(moves.logical_not(), 0); };
    const auto length = if_moving(norm / curvature);
    code = code + length * direction;
    residual = residual.addcmul(length, image, -1);
    const auto next = equations.sum(residual.square());
    direction = residual.addcmul(if_moving(next / norm), direction);
    norm = next;
  }
  return code;
}

// The code that is least squares on the support, [rows, nnz] positions; not finite in rows whose atoms depend too much
// on each other.
at::Tensor solved_on(const at::Tensor& support, const at::Tensor& products, const at::Tensor& gram) {
  constexpr int64_t numbers_at_once = int64_t{1} << 24;
  const double relative_ridge = products.scalar_type() == at::kDouble ? 1e-14 : 1e-6;
  const int64_t nnz = support.size(1), rows_at_once = std::max<int64_t>(1, numbers_at_once / (nnz * nnz));
  auto code = at::zeros_like(products);
  for (int64_t first = 0; first < support.size(0); first += rows_at_once) {
    const auto rows = std::min(rows_at_once, support.size(0) - first);
    const auto positions = support.narrow(0, first, rows);
    const auto system = gram.index({positions.unsqueeze(2), positions.unsqueeze(1)});
    const auto ridge = system.diagonal(0, 1, 2).mean(1).view({-1, 1, 1}) * relative_ridge + 1e-30;
    const auto solution =
        std::get<0>(at::linalg_solve_ex(system + ridge * at::eye(nnz, gram.options()),
                                        products.narrow(0, first, rows).gather(1, positions).unsqueeze(2)));
    code.narrow(0, first, rows).scatter_(1, positions, solution.squeeze(2));
  }
  return code;
}

// Orthogonal matching pursuit of all rows at once: the atom that explains most of what is left joins the support,
// and the code is solved for anew. Where atoms depend on each other so much that this fails, the row's code stays
// without the new one.
at::Tensor matching_pursuit(const at::Tensor& products, const at::Tensor& gram, int64_t nnz) {
  const auto inverse_norm = gram.diagonal().clamp_min(1e-20).rsqrt();
  auto correlation = products;
  auto used = at::zeros_like(products, at::kBool);
  at::Tensor support, code = at::zeros_like(products);
  for (int64_t size = 1; size <= nnz; ++size) {
    const auto best = (correlation * inverse_norm).abs().masked_fill(used, -1).argmax(1, true);
    used = used.scatter(1, best, true);
    support = size == 1 ? best : at::cat({support, best}, 1);
    const auto solution = solved_on(support, products, gram);
    code = at::where(at::isfinite(solution).all(1, true), solution, code);
    correlation = products - code.matmul(gram);
  }
  return code;
}

at::Tensor support_of(const at::Tensor& code) {
  return code.ne(0).to(code.scalar_type());
}

// What the error of each row R adds to the target's: their sum is tr(R^T row_gram R).
at::Tensor row_errors(const Target& target, const at::Tensor& basis, const at::Tensor& code) {
  const auto missed = target.weight - code.matmul(basis);
  return (missed * target.weighed(missed)).sum(1);
}

// Entries of the largest gradients join a row's support, and the least ones of the fit to all of them leave it.
at::Tensor swapped(const Equations& equations, const at::Tensor& code, int64_t nnz) {
  const int64_t joining = std::min((nnz + 9) / 10, code.size(1) - nnz);
  const auto infinity = std::numeric_limits<double>::infinity();
  const auto gradient = (equations.products - equations.image(code)).masked_fill(code.ne(0), infinity);
  constexpr int64_t steps_to_choose = 4, steps_to_fit = 8;
  const auto candidates = support_of(keep_largest(gradient, nnz + joining));
  const auto kept = keep_largest(refit(equations, code, candidates, nnz + joining, steps_to_choose), nnz);
  return refit(equations, kept, support_of(kept), nnz, steps_to_fit);
}

at::Tensor next_code(const Equations& equations, const at::Tensor& code, int64_t nnz) {
  return nnz <= few_nonzeros && !equations.target.row_gram ? matching_pursuit(equations.products, equations.gram, nnz)
                                                           : swapped(equations, code, nnz);
}

}  // namespace

at::Tensor Target::weighed(const at::Tensor& rows) const {
  return row_gram ? row_gram->matmul(rows) : rows;
}

at::Tensor keep_largest(const at::Tensor& code, int64_t nnz) {
  const auto [values, indices] = stf_select(code.unsqueeze(1), nnz);
  return at::zeros_like(code).scatter_(1, indices.squeeze(1).to(at::kLong), values.squeeze(1));
}

double total_error(const Target& target, const at::Tensor& basis, const at::Tensor& code) {
  return row_errors(target, basis, code).sum().item<double>();
}

at::Tensor better_rows(const Target& target, const at::Tensor& basis, const at::Tensor& code, const at::Tensor& fresh,
                       double slack) {
  const auto error_of = [&](const at::Tensor& rows) {
    const auto errors = row_errors(target, basis, rows);
    return target.row_gram ? errors.sum().unsqueeze(0) : errors;
  };
  const auto better = error_of(fresh).lt(error_of(code) * (1 + slack));
  return at::where(better.unsqueeze(1), fresh, code);
}

at::Tensor next_code(const Target& target, const at::Tensor& basis, const at::Tensor& code, int64_t nnz) {
  return next_code(Equations(target, basis), code, nnz);
}

at::Tensor fitted_code(const Target& target, const at::Tensor& basis, const at::Tensor& code, int64_t nnz) {
  const Equations equations(target, basis);
  if (target.row_gram) {
    // One system of rows * nnz unknowns.
    constexpr int64_t steps = 32;
    return better_rows(target, basis, code, refit(equations, code, support_of(code), nnz, steps));
  }
  const auto support = std::get<1>(stf_select(code.unsqueeze(1), nnz)).squeeze(1).to(at::kLong);
  return better_rows(target, basis, code, solved_on(support, equations.products, equations.gram));
}

at::Tensor first_code(const at::Tensor& weight, const at::Tensor& basis, int64_t nnz) {
  const Target target{weight, {}};
  const Equations equations(target, basis);
  const auto& gram = equations.gram;
  const auto ridge = gram.diagonal().mean() * 1e-4 + 1e-30;
  const auto dense =
      std::get<0>(at::linalg_solve_ex(gram + ridge * at::eye(gram.size(0), gram.options()), basis.matmul(weight.t())));
  const auto largest = keep_largest(dense.nan_to_num(0, 0, 0).t(), nnz);
  const auto start = better_rows(target, basis, at::zeros_like(largest), largest);
  // Around least squares errors are flat: rounding would choose between a code and one that the ridge bends.
  constexpr double slack = 1e-5;
  auto code = better_rows(target, basis, start, next_code(equations, start, nnz), slack);
  for (int64_t round = 0; round < 3 && nnz > few_nonzeros; ++round) {
    code = better_rows(target, basis, code, next_code(equations, code, nnz));
  }
  return code;
}

}  // namespace torchops
