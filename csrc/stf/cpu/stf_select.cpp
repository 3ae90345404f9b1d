#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <bit>
#include <vector>

#include "core/library.h"
#include "core/parallel.h"
#include "core/tensors.h"
#include "stf/linear.h"

namespace torchops {
namespace {

// Magnitudes as integers of the same order, a NaN above all numbers.
uint64_t magnitude(double value) {
  return std::bit_cast<uint64_t>(value) & ~(uint64_t{1} << 63);
}
uint64_t magnitude(float value) {
  return std::bit_cast<uint32_t>(value) & ~(uint32_t{1} << 31);
}
uint64_t magnitude(kernels::bfloat16 value) {
  return value.bits & 0x7fff;
}
uint64_t magnitude(kernels::float16 value) {
  return value.bits & 0x7fff;
}

// The positions of the `nnz` largest magnitudes of row[0..size-1] in ascending order; the lower one among equals.
template <typename T>
void select_row(const T* row, int64_t size, int64_t nnz, std::vector<int32_t>& positions) {
  positions.resize(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) {
    positions[i] = static_cast<int32_t>(i);
  }
  std::nth_element(positions.begin(), positions.begin() + nnz, positions.end(), [&](int32_t one, int32_t other) {
    const auto first = magnitude(row[one]), second = magnitude(row[other]);
    return first != second ? first > second : one < other;
  });
  std::sort(positions.begin(), positions.begin() + nnz);
}

std::tuple<at::Tensor, at::Tensor> stf_select_cpu(const at::Tensor& latent, int64_t nnz) {
  check_stf_select(latent, nnz);
  const auto size = latent.size(2);
  const auto rows = latent.contiguous();
  auto values = at::empty({latent.size(0), latent.size(1), nnz}, latent.options());
  auto indices = at::empty(values.sizes(), latent.options().dtype(index_dtype(size)));
  for_dtype(latent.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* const from = static_cast<const T*>(rows.const_data_ptr());
    auto* const to = static_cast<T*>(values.mutable_data_ptr());
    auto* const bytes = static_cast<uint8_t*>(indices.mutable_data_ptr());
    auto* const shorts = static_cast<int16_t*>(indices.mutable_data_ptr());
    const bool byte_indices = indices.scalar_type() == at::kByte;
    parallel_units(latent.size(0) * latent.size(1), 8 * size, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> positions;
      for (int64_t unit = begin; unit < end; ++unit) {
        select_row(from + unit * size, size, nnz, positions);
        for (int64_t e = 0; e < nnz; ++e) {
          to[unit * nnz + e] = from[unit * size + positions[e]];
          if (byte_indices) {
            bytes[unit * nnz + e] = static_cast<uint8_t>(positions[e]);
          } else {
            shorts[unit * nnz + e] = static_cast<int16_t>(positions[e]);
          }
        }
      }
    });
  });
  return {values, indices};
}

at::Tensor stf_select_backward_cpu(const at::Tensor& grad_values, const at::Tensor& indices, int64_t basis_size) {
  check_stf_select_backward(grad_values, indices, basis_size);
  return at::zeros({grad_values.size(0), grad_values.size(1), basis_size}, grad_values.options())
      .scatter_(2, indices.to(at::kLong), grad_values);
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("stf_select", stf_select_cpu);
  m.impl("_stf_select_backward", stf_select_backward_cpu);
}

}  // namespace torchops
