#include "stf/factorization.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

namespace torchops {
namespace {

double total_error(const Target& target, const Factorization& f) {
  return total_error(target, f.basis, f.code);
}

at::Tensor one_for_zero(const at::Tensor& numbers) {
  return numbers.masked_fill(numbers.eq(0), 1);
}

// Rows of length 1, and their lengths [rows, 1]; zeros stay, with a length of 1. The largest entry comes first:
// squares of large and of small numbers are no numbers.
std::tuple<at::Tensor, at::Tensor> unit_rows(const at::Tensor& rows) {
  const auto largest = one_for_zero(at::amax(rows.abs(), 1, true));
  const auto moderate = rows / largest;
  const auto norms = one_for_zero(at::linalg_vector_norm(moderate, 2, 1, true));
  return {moderate / norms, largest * norms};
}

// Least squares for the basis. The ridge is on the basis's change: on the basis itself it would raise the error.
Factorization refit_basis(const Target& target, const Factorization& f) {
  const auto weighed = target.weighed(f.code);
  const auto gram = weighed.t().matmul(f.code);
  const auto ridge = (gram.diagonal().mean() * 1e-6).clamp_min(1e-12);
  const auto change = std::get<0>(at::linalg_solve_ex(gram + ridge * at::eye(gram.size(0), gram.options()),
                                                      weighed.t().matmul(target.weight - f.code.matmul(f.basis))));
  return with_unit_atoms({f.basis + change.nan_to_num(0, 0, 0), f.code});
}

// The basis for the code, then a code for the basis, which a row takes only if it is better.
Factorization refine(const Target& target, const Factorization& f, int64_t nnz) {
  const auto kept = refit_basis(target, f);
  const auto fresh = next_code(target, kept.basis, kept.code, nnz);
  return {kept.basis, better_rows(target, kept.basis, kept.code, fresh)};
}

at::Tensor is_zero(const at::Tensor& rows) {
  return rows.eq(0).all(1);
}

// Where rows combine few atoms, a descent is caught with atoms that nobody needs, or that double another, while
// others are missing. The `count` atoms that would be missed least give way to what the worst rows lack.
Factorization replace_atoms(const at::Tensor& weight, const Factorization& f, int64_t nnz, int64_t count) {
  constexpr double alike = 0.7;
  const auto strength = f.code.square().sum(0);
  const auto similarity = std::get<0>(f.basis.matmul(f.basis.t()).abs().fill_diagonal_(0).max(1));
  // Atoms that are zero first of all.
  const auto missed = (strength * (1 - similarity.square())).masked_fill(is_zero(f.basis), -1);
  const auto least_missed = missed.argsort(/*stable=*/true, 0, false).cpu();
  const auto residual = weight - f.code.matmul(f.basis);
  const auto directions = std::get<0>(unit_rows(residual));
  const auto [errors, worst] = residual.square().sum(1).cpu().sort(/*stable=*/true, 0, /*descending=*/true);
  auto basis = f.basis.clone();
  std::vector<at::Tensor> taken;
  for (int64_t row = 0; row < worst.size(0) && static_cast<int64_t>(taken.size()) < count; ++row) {
    if (errors[row].item<double>() == 0) {
      break;
    }
    const auto direction = directions[worst[row].item<int64_t>()];
    if (taken.empty() || at::stack(taken).mv(direction).abs().max().item<double>() < alike) {
      basis[least_missed[static_cast<int64_t>(taken.size())].item<int64_t>()] = direction;
      taken.push_back(direction);
    }
  }
  return {basis, next_code({weight, {}}, basis, f.code, nnz)};
}

// Refined until it does not get better any more, num_iterations times at most.
Factorization refine(const Target& target, Factorization best, int64_t nnz, int64_t num_iterations, bool replacing) {
  constexpr int64_t shares[] = {6, 12, 24, 48};  // of the atoms, that are replaced in turn
  constexpr int64_t most_idle_iterations = std::size(shares);
  constexpr double least_gain = 1e-4;
  // With many nonzeros in a row replacing seldom helps: it is given up after that many attempts without a gain.
  const int64_t most_vain_attempts = nnz <= few_nonzeros ? num_iterations : 2;
  double error = total_error(target, best);
  const auto take_if_better = [&](const Factorization& candidate) {
    const double of_candidate = total_error(target, candidate);
    const bool better = of_candidate < error;
    if (better) {
      best = candidate;
      error = of_candidate;
    }
    return better;
  };
  int64_t idle = 0, vain_attempts = 0;
  for (int64_t iteration = 0; iteration < num_iterations && idle < most_idle_iterations; ++iteration) {
    const double before = error;
    take_if_better(refine(target, best, nnz));
    if (replacing && vain_attempts < most_vain_attempts) {
      const auto count = std::max<int64_t>(1, best.basis.size(0) / shares[iteration % std::size(shares)]);
      auto candidate = replace_atoms(target.weight, best, nnz, count);
      for (int64_t round = 0; round < 2; ++round) {
        candidate = refine(target, candidate, nnz);
      }
      vain_attempts += take_if_better(candidate) ? 0 : 1;
    }
    idle = error < (1 - least_gain) * before ? 0 : idle + 1;
  }
  best.code = fitted_code(target, best.basis, best.code, nnz);
  return best;
}

// An orthonormal basis, for which keeping the largest entries is the best code of a row, turned to its code by rounds.
std::optional<Factorization> orthonormal_start(const Target& target, int64_t basis_size, int64_t nnz) {
  constexpr int64_t rounds = 20;
  const auto& weight = target.weight;
  if (basis_size > std::min(weight.size(0), weight.size(1))) {
    return std::nullopt;
  }
  const auto spanned =
      target.row_gram ? std::get<0>(at::linalg_cholesky_ex(*target.row_gram)).t().matmul(weight) : weight;
  auto basis = std::get<2>(at::linalg_svd(spanned, /*full_matrices=*/false)).narrow(0, 0, basis_size);
  auto code = keep_largest(weight.matmul(basis.t()), nnz);
  const auto weighed = target.weighed(weight);
  for (int64_t round = 0; round < rounds && nnz < basis_size; ++round) {
    const auto [left, values, right] = at::linalg_svd(code.t().matmul(weighed), /*full_matrices=*/false);
    basis = left.matmul(right);
    code = keep_largest(weight.matmul(basis.t()), nnz);
  }
  return Factorization{basis, code};
}

// Rows of the weight as atoms: the longest, and then always the one least like those there are.
Factorization rows_start(const at::Tensor& weight, int64_t basis_size, int64_t nnz) {
  const auto rows = std::get<0>(unit_rows(weight));
  auto next = at::linalg_vector_norm(weight, 2, 1).argmax();
  // Zeros are no atoms: more alike than any.
  auto alike = is_zero(weight).to(weight.scalar_type()).mul_(2);
  std::vector<at::Tensor> atoms;
  for (int64_t atom = 0; atom < basis_size; ++atom) {
    atoms.push_back(rows.index_select(0, next.view({1})));
    alike = at::maximum(alike, rows.mv(atoms.back().squeeze(0)).abs());
    next = alike.argmin();
  }
  const auto basis = at::cat(atoms);
  return {basis, first_code(weight, basis, nnz)};
}

}  // namespace

Factorization with_unit_atoms(const Factorization& f) {
  const auto [basis, lengths] = unit_rows(f.basis);
  return {basis, f.code * lengths.t()};
}

double largest_number(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return std::numeric_limits<double>::max();
    case at::kBFloat16:
      return std::numeric_limits<at::BFloat16>::max();
    case at::kHalf:
      return std::numeric_limits<at::Half>::max();
    default:
      return std::numeric_limits<float>::max();
  }
}

Factorization scaled(const Factorization& f, const at::Tensor& scale, at::ScalarType dtype) {
  double length = 1;
  if (f.code.numel() > 0) {
    const double peak = f.code.abs().max().item<double>(), room = largest_number(dtype) / scale.item<double>();
    while (std::isfinite(peak) && peak / length > room) {
      length *= 2;
    }
  }
  return {f.basis * length, f.code * (scale / length)};
}

at::Tensor scale_of(const at::Tensor& weight) {
  return weight.numel() == 0 ? at::ones({}, weight.options()) : one_for_zero(weight.abs().max());
}

// With a row_gram, rows are of the size in which they count: then a step of conjugate gradients suits all of them.
static Factorization factorize_scaled(const Target& target, int64_t basis_size, int64_t nnz, int64_t num_iterations) {
  const auto& weight = target.weight;
  if (weight.numel() == 0 || nnz == 0 || weight.eq(0).all().item<bool>()) {
    // The best code is zero. Not so the basis: a weight that is trained has to leave zero.
    return {at::eye(basis_size, weight.size(1), weight.options()),
            at::zeros({weight.size(0), basis_size}, weight.options())};
  }
  const bool apart = !target.row_gram;
  std::vector<Factorization> starts;
  if (auto start = orthonormal_start(target, basis_size, nnz)) {
    starts.push_back(*start);
  }
  // With many nonzeros in a row an orthonormal basis always came out better, where there can be one.
  if ((apart && nnz <= few_nonzeros) || starts.empty()) {
    starts.push_back(rows_start(weight, basis_size, nnz));
  }
  constexpr int64_t rounds_to_compare = 3;
  std::optional<Factorization> best;
  for (const auto& start : starts) {
    const auto candidate = starts.size() == 1 ? start : refine(target, start, nnz, rounds_to_compare, true);
    if (!best || total_error(target, candidate) < total_error(target, *best)) {
      best = candidate;
    }
  }
  return refine(target, *best, nnz, num_iterations, /*replacing=*/apart);
}

Factorization factorize(const Target& target, int64_t basis_size, int64_t nnz, int64_t num_iterations) {
  if (!target.row_gram) {
    return factorize_scaled(target, basis_size, nnz, num_iterations);
  }
  const auto scale = target.row_gram->diagonal().sqrt().unsqueeze(1);
  auto factors =
      factorize_scaled({target.weight * scale, *target.row_gram / scale / scale.t()}, basis_size, nnz, num_iterations);
  factors.code = factors.code / scale;
  return factors;
}

Factorization factorize_from(const at::Tensor& weight, const at::Tensor& basis, int64_t nnz, int64_t num_iterations) {
  const Target target{weight, {}};
  const auto [unit, lengths] = unit_rows(basis);
  if (weight.numel() == 0 || nnz == 0) {
    return {basis, at::zeros({weight.size(0), basis.size(0)}, weight.options())};
  }
  Factorization start{unit, first_code(weight, unit, nnz)};
  if (num_iterations == 0) {
    return {basis, fitted_code(target, unit, start.code, nnz) / lengths.t()};
  }
  // Least squares leave a zero where it is.
  if (const auto missing = is_zero(unit).sum().item<int64_t>(); missing > 0) {
    const auto candidate = replace_atoms(weight, start, nnz, missing);
    start = total_error(target, candidate) < total_error(target, start) ? candidate : start;
  }
  return refine(target, start, nnz, num_iterations, false);
}

}  // namespace torchops
