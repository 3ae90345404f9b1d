#include "stf/cpu/dense_code.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "core/cpu/dense_product.h"
#include "core/cpu/level.h"
#include "core/parallel.h"
#include "stf/cpu/wrong_index.h"
#include "stf/linear.h"

namespace torchops {
namespace {

// visit(row, its indices) for the rows and blocks from begin to end, or the position of an index that is out of range,
// or -1.
template <typename Index, typename Visit>
int64_t for_each_list(const Index* indices, int64_t nnz, int64_t basis_size, int64_t begin, int64_t end,
                      const Visit& visit) {
  using Unsigned = std::make_unsigned_t<Index>;
  const auto is_wrong = [&](Index column) { return static_cast<Unsigned>(column) >= basis_size; };
  for (int64_t row = begin; row < end; ++row) {
    const Index* const columns = indices + row * nnz;
    // All of them, for the compiler to make vectors of the loop.
    bool any_wrong = false;
    for (int64_t e = 0; e < nnz; ++e) {
      any_wrong |= is_wrong(columns[e]);
    }
    if (any_wrong) {
      return std::find_if(columns, columns + nnz, is_wrong) - indices;
    }
    visit(row, columns);
  }
  return -1;
}

template <typename Visit>
void for_each_list(const char* op, const at::Tensor& indices, int64_t basis_size, const Visit& visit) {
  const auto nnz = indices.size(2);
  WrongIndex wrong;
  parallel_units(indices.size(0) * indices.size(1), nnz, [&](int64_t begin, int64_t end) {
    wrong.found(indices.scalar_type() == at::kByte
                    ? for_each_list(indices.const_data_ptr<uint8_t>(), nnz, basis_size, begin, end, visit)
                    : for_each_list(indices.const_data_ptr<int16_t>(), nnz, basis_size, begin, end, visit));
  });
  wrong.check(op, indices, basis_size);
}

// One that stands twice counts twice: its sum is rounded once.
template <typename T, typename Index>
void write_nonzeros(const T* values, const Index* columns, int64_t nnz, int64_t basis_size, T* to) {
  bool ascending = true;
  for (int64_t e = 1; e < nnz; ++e) {
    ascending &= columns[e - 1] < columns[e];
  }
  if (ascending) {
    for (int64_t e = 0; e < nnz; ++e) {
      to[columns[e]] = values[e];
    }
    return;
  }
  std::vector<float> sums(static_cast<size_t>(basis_size));
  for (int64_t e = 0; e < nnz; ++e) {
    sums[static_cast<size_t>(columns[e])] += static_cast<float>(values[e]);
  }
  std::copy(sums.begin(), sums.end(), to);
}

// A number of each dtype that dense_code_pays for, to be told apart by.
template <typename Work>
void for_dtype_of_code(at::ScalarType dtype, const Work& work) {
  dtype == at::kFloat ? work(float()) : work(at::BFloat16());
}

}  // namespace

bool dense_code_pays(at::ScalarType dtype, int64_t num_tokens) {
  constexpr int64_t fewest_tokens = 64;
  static const bool has_tiles = cpu_capability() == "amx";
  static const bool multiplies_pairs = has_tiles || cpu_capability() == "avx512_bf16";
  const bool dense_is_fast = dtype == at::kBFloat16 ? multiplies_pairs : dtype == at::kFloat && has_tiles;
  return dense_is_fast && num_tokens >= fewest_tokens;
}

at::Tensor dense_code(const char* op, const at::Tensor& values, const at::Tensor& indices, int64_t basis_size) {
  auto code = at::zeros({values.size(0), values.size(1), basis_size}, values.options());
  const auto nnz = values.size(2);
  for_dtype_of_code(values.scalar_type(), [&](auto number) {
    using T = decltype(number);
    const auto* const from = values.const_data_ptr<T>();
    auto* const to = code.mutable_data_ptr<T>();
    for_each_list(op, indices, basis_size, [&](int64_t row, const auto* columns) {
      write_nonzeros(from + row * nnz, columns, nnz, basis_size, to + row * basis_size);
    });
  });
  return code;
}

at::Tensor take_nonzeros(const char* op, const at::Tensor& code, const at::Tensor& indices) {
  auto values = at::empty(indices.sizes(), code.options());
  const auto nnz = indices.size(2), basis_size = code.size(2);
  for_dtype_of_code(code.scalar_type(), [&](auto number) {
    using T = decltype(number);
    const auto* const from = code.const_data_ptr<T>();
    auto* const to = values.mutable_data_ptr<T>();
    for_each_list(op, indices, basis_size, [&](int64_t row, const auto* columns) {
      for (int64_t e = 0; e < nnz; ++e) {
        to[row * nnz + e] = from[row * basis_size + columns[e]];
      }
    });
  });
  return values;
}

at::Tensor dense_atoms_to_rows(const at::Tensor& code, const at::Tensor& atoms, const std::optional<at::Tensor>& bias) {
  auto output = at::empty({atoms.size(1), code.size(0)}, code.options());
  // Blocks are parts of one depth.
  dense_product(join_blocks(atoms).unsqueeze(0), code.flatten(1).t().unsqueeze(0), output.unsqueeze(0),
                bias ? std::optional(bias->unsqueeze(0)) : std::nullopt);
  return output;
}

at::Tensor dense_rows_to_atoms(const at::Tensor& code, const at::Tensor& rows) {
  const auto num_blocks = code.size(1);
  auto output = at::empty({num_blocks, rows.size(0), code.size(2)}, code.options());
  dense_product(rows.unsqueeze(0).expand({num_blocks, -1, -1}), code.transpose(0, 1), output, std::nullopt);
  return output;
}

}  // namespace torchops
