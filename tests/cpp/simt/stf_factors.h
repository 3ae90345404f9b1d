#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/cuda/launch.h"
#include "numbers.h"
#include "stf/cuda/add_parts.cuh"
#include "stf/packed_factor.h"
#include "stf/sparse_factor.h"

// Sparse factors for the kernels of the stf family, next to the factor written out as a dense matrix of float64. All
// numbers are whole, so that sums are exact and the bits equal.

namespace torchops::kernels::stf::cuda {

constexpr int64_t divide_up(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

inline std::vector<float> numbers(int64_t count, uint32_t seed) {
  return simt::whole_numbers(static_cast<size_t>(count), seed);
}

// What a kernel has to have written: exact sums, rounded once.
template <typename T>
std::vector<float> rounded(const std::vector<double>& sums) {
  return simt::widened(simt::narrowed<T>(std::vector<float>(sums.begin(), sums.end())));
}

enum class Indices { increasing, repeated, out_of_range };

struct Shape {
  int64_t num_rows, num_blocks, nnz, basis_size, num_tokens;
  Indices kind;
};

// The sparse factor and what it means.
template <typename T>
struct Factor {
  Shape shape;
  std::vector<T> values;
  std::vector<uint8_t> bytes;
  std::vector<int16_t> shorts;
  std::vector<int64_t> indices;  // -1 where out of range
  std::vector<double> dense;     // [rows, blocks, K]

  explicit Factor(const Shape& shape) : shape(shape) {
    const int64_t count = shape.num_rows * shape.num_blocks * shape.nnz;
    const auto whole = numbers(count, 1);
    values = simt::narrowed<T>(whole);
    dense.resize(static_cast<size_t>(shape.num_rows * shape.num_blocks * shape.basis_size));
    uint32_t state = 7;
    const auto random = [&] { return static_cast<int64_t>((state = state * 1664525U + 1013904223U) >> 16); };
    std::vector<int64_t> row(static_cast<size_t>(shape.basis_size));
    for (int64_t unit = 0; unit < shape.num_rows * shape.num_blocks; ++unit) {
      std::iota(row.begin(), row.end(), int64_t{0});
      for (size_t i = row.size() - 1; i > 0; --i) {
        std::swap(row[i], row[static_cast<size_t>(random()) % (i + 1)]);
      }
      std::sort(row.begin(), row.begin() + shape.nnz);
      for (int64_t e = 0; e < shape.nnz; ++e) {
        const bool changed = shape.kind != Indices::increasing && random() % 4 == 0;
        int64_t given = row[static_cast<size_t>(e)];
        if (changed && shape.kind == Indices::repeated) {
          given = row[static_cast<size_t>(e / 2)];
        } else if (changed) {
          given = byte_indices() ? shape.basis_size + random() % (256 - shape.basis_size)
                  : random() % 2 ? -1 - random() % 100
                                 : 32767;
        }
        bytes.push_back(static_cast<uint8_t>(given));
        shorts.push_back(static_cast<int16_t>(given));
        const bool in_range = 0 <= given && given < shape.basis_size;
        indices.push_back(in_range ? given : -1);
        if (in_range) {
          dense[unit * shape.basis_size + given] += whole[unit * shape.nnz + e];
        }
      }
    }
    // AddressSanitizer does not see the spare capacity of a vector.
    bytes.shrink_to_fit();
    shorts.shrink_to_fit();
  }

  bool byte_indices() const { return shape.basis_size <= 256; }
  SparseFactor<T> pointers() const {
    return {values.data(),    byte_indices() ? static_cast<const void*>(bytes.data()) : shorts.data(),
            byte_indices(),   shape.num_rows,
            shape.num_blocks, shape.nnz,
            shape.basis_size};
  }
};

// The packed factor and what it means: a mask may have more or fewer bits than there are values.
template <typename T>
struct Packed {
  Shape shape;
  std::vector<T> values;
  std::vector<uint16_t> mask;
  std::vector<double> dense;  // [rows, blocks, K]

  Packed(const Shape& shape, bool right_masks) : shape(shape) {
    const int64_t groups = divide_up(shape.num_rows, rows_per_group), size = rows_per_group * shape.nnz;
    const auto whole = numbers(groups * shape.num_blocks * size, 1);
    values = simt::narrowed<T>(whole);
    const Factor<T> factor(
        {groups * rows_per_group, shape.num_blocks, shape.nnz, shape.basis_size, 0, Indices::increasing});
    mask.resize(static_cast<size_t>(groups * shape.num_blocks * shape.basis_size));
    for (size_t i = 0; i < factor.indices.size(); ++i) {
      const int64_t row = static_cast<int64_t>(i) / shape.nnz / shape.num_blocks;
      const int64_t block = static_cast<int64_t>(i) / shape.nnz % shape.num_blocks;
      mask[((row / rows_per_group) * shape.num_blocks + block) * shape.basis_size + factor.indices[i]] |=
          static_cast<uint16_t>(1 << row % rows_per_group);
    }
    if (!right_masks) {
      for (size_t i = 0; i < mask.size(); i += 2) {
        mask[i] = 0xffff;
      }
    }
    dense.resize(static_cast<size_t>(shape.num_rows * shape.num_blocks * shape.basis_size));
    for (int64_t unit = 0; unit < groups * shape.num_blocks; ++unit) {
      int64_t at = 0;
      for (int64_t column = 0; column < shape.basis_size; ++column) {
        for (int64_t r = 0; r < rows_per_group; ++r) {
          if ((mask[unit * shape.basis_size + column] >> r & 1) != 0) {
            const int64_t row = unit / shape.num_blocks * rows_per_group + r;
            if (at < size && row < shape.num_rows) {
              dense[(row * shape.num_blocks + unit % shape.num_blocks) * shape.basis_size + column] =
                  whole[unit * size + at];
            }
            ++at;
          }
        }
      }
    }
  }

  PackedFactor<T> pointers() const {
    return {values.data(), mask.data(), shape.num_rows, shape.num_blocks, shape.nnz, shape.basis_size};
  }
};

// [T, rows]
inline std::vector<double> expected_rows(const Shape& shape, const std::vector<double>& dense,
                                         const std::vector<float>& atoms, const std::vector<float>* bias) {
  std::vector<double> output(static_cast<size_t>(shape.num_tokens * shape.num_rows));
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    for (int64_t r = 0; r < shape.num_rows; ++r) {
      double& sum = output[t * shape.num_rows + r] = bias == nullptr ? 0.0 : (*bias)[r];
      for (int64_t b = 0; b < shape.num_blocks; ++b) {
        for (int64_t k = 0; k < shape.basis_size; ++k) {
          sum += dense[(r * shape.num_blocks + b) * shape.basis_size + k] *
                 atoms[(b * shape.num_tokens + t) * shape.basis_size + k];
        }
      }
    }
  }
  return output;
}

// [blocks, T, K]
inline std::vector<double> expected_atoms(const Shape& shape, const std::vector<double>& dense,
                                          const std::vector<float>& rows) {
  std::vector<double> output(static_cast<size_t>(shape.num_blocks * shape.num_tokens * shape.basis_size));
  for (int64_t b = 0; b < shape.num_blocks; ++b) {
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      for (int64_t k = 0; k < shape.basis_size; ++k) {
        double& sum = output[(b * shape.num_tokens + t) * shape.basis_size + k];
        for (int64_t r = 0; r < shape.num_rows; ++r) {
          sum += dense[(r * shape.num_blocks + b) * shape.basis_size + k] * rows[t * shape.num_rows + r];
        }
      }
    }
  }
  return output;
}

inline std::vector<float> atoms_of(const Shape& shape) {
  return numbers(shape.num_blocks * shape.num_tokens * shape.basis_size, 2);
}
inline std::vector<float> rows_of(const Shape& shape) {
  return numbers(shape.num_tokens * shape.num_rows, 3);
}

// add_parts of what fill(sums) writes.
template <typename T, typename Fill>
std::vector<T> sum_of_parts(size_t size, int64_t num_parts, const Fill& fill, const T* bias = nullptr,
                            int64_t bias_size = 1) {
  std::vector<accumulate_t<T>> sums(static_cast<size_t>(num_parts) * size, accumulate_t<T>(NAN));
  std::vector<T> output(size);
  fill(sums.data());
  const auto count = static_cast<int64_t>(size);
  device::launch({divide_up(count, 64), 64}, add_parts<T>,
                 AddParts<T>{sums.data(), num_parts, count, output.data(), bias, bias_size});
  return output;
}

}  // namespace torchops::kernels::stf::cuda
