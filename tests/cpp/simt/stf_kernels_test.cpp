// The CUDA kernels of the stf family on the host, but for those on matrix units (stf_mma_kernels_test.cpp).

#include <cstring>

#include "catch.h"
#include "orders.h"
#include "stf/cuda/atoms_to_rows.cuh"
#include "stf/cuda/expand_factor.cuh"
#include "stf/cuda/expand_packed_factor.cuh"
#include "stf/cuda/pack_factor.cuh"
#include "stf/cuda/packed_atoms_to_rows.cuh"
#include "stf/cuda/packed_rows_to_atoms.cuh"
#include "stf/cuda/repair_tokens.cuh"
#include "stf/cuda/rows_to_atoms.cuh"
#include "stf/cuda/select.cuh"
#include "stf/cuda/take_nonzeros.cuh"
#include "stf/cuda/value_gradient.cuh"
#include "stf_factors.h"

// A race does not depend on the type, and ThreadSanitizer takes its time for every fiber.
#if defined(SIMT_THREAD_SANITIZER) || defined(SIMT_MUTATION)
#define KERNEL_TYPES float
#else
#define KERNEL_TYPES double, float, bfloat16, float16
#endif

namespace torchops::kernels::stf::cuda {
namespace {

const std::vector<Shape> shapes = {
#if !defined(SIMT_THREAD_SANITIZER)
    {35, 1, 40, 300, 9, Indices::increasing}, {20, 2, 70, 290, 3, Indices::out_of_range},
    {0, 2, 3, 5, 2, Indices::increasing},     {7, 2, 0, 5, 2, Indices::increasing},
    {9, 2, 3, 5, 0, Indices::increasing},
#endif
    {17, 1, 2, 290, 2, Indices::increasing},  {37, 2, 5, 11, 3, Indices::increasing},
    {19, 2, 35, 40, 2, Indices::repeated},    {18, 1, 6, 12, 5, Indices::out_of_range},
    {1, 1, 1, 1, 1, Indices::increasing},
};

// The number of tokens that a block takes.
template <typename Body>
void for_each_token_tile(const Body& body) {
  body(std::integral_constant<int, 4>{});
#if !defined(SIMT_THREAD_SANITIZER) && !defined(SIMT_MUTATION)
  body(std::integral_constant<int, 1>{});
  body(std::integral_constant<int, 8>{});
#endif
}

}  // namespace

TEMPLATE_TEST_CASE("expand_factor", "", KERNEL_TYPES) {
  const simt::ReleaseBuild release_build;  // goes on where an index is out of range or a mask too full
  for (const Shape& shape : shapes) {
    const Factor<TestType> factor(shape);
    for (const int64_t chunk : {divide_up(shape.basis_size, 3), shape.basis_size}) {
      CAPTURE(shape.num_rows, shape.basis_size, shape.nnz, chunk);
      const auto actual = simt::same_in_every_order([&] {
        std::vector<TestType> dense(factor.dense.size());
        device::launch({divide_up(shape.num_rows * shape.num_blocks, expand_rows), expand_threads,
                        expand_shared_bytes<TestType>(chunk)},
                       expand_factor<TestType>, ExpandFactor<TestType>{factor.pointers(), dense.data(), chunk});
        return dense;
      });
      CHECK(simt::widened(actual) == rounded<TestType>(factor.dense));
    }
  }
}

TEMPLATE_TEST_CASE("atoms_to_rows", "", KERNEL_TYPES) {
  const simt::ReleaseBuild release_build;  // goes on where an index is out of range or a mask too full
  for (const Shape& shape : shapes) {
    const Factor<TestType> factor(shape);
    const auto atoms = atoms_of(shape), bias = numbers(shape.num_rows, 4);
    const auto narrow_atoms = simt::narrowed<TestType>(atoms), narrow_bias = simt::narrowed<TestType>(bias);
    for (const bool with_bias : {false, true}) {
      const auto expected = rounded<TestType>(expected_rows(shape, factor.dense, atoms, with_bias ? &bias : nullptr));
      const int64_t chunk = with_bias ? shape.basis_size : divide_up(shape.basis_size, 3);
      for_each_token_tile([&](auto tokens) {
        CAPTURE(shape.num_rows, shape.basis_size, shape.nnz, with_bias, chunk, tokens.value);
        const auto actual = simt::same_in_every_order([&] {
          std::vector<TestType> output(expected.size());
          device::launch(
              {{divide_up(shape.num_rows, gather_rows), divide_up(shape.num_tokens, tokens)},
               gather_threads,
               gather_shared_bytes<TestType>(chunk, tokens)},
              atoms_to_rows<decltype(tokens)::value, TestType>,
              AtomsToRows<TestType>{factor.pointers(), narrow_atoms.data(), with_bias ? narrow_bias.data() : nullptr,
                                    output.data(), shape.num_tokens, chunk});
          return output;
        });
        CHECK(simt::widened(actual) == expected);
      });
    }
  }
}

// Every second token has an infinity in the last atom of the last block: what it has to become, where has_atom(row)
// says which rows have the atom. Tokens of numbers stay as they are.
template <typename T, typename HasAtom, typename Repair>
void check_repair(const Shape& shape, const std::vector<double>& dense, const HasAtom& has_atom, const Repair& repair) {
  constexpr float untouched = 77;
  auto atoms = atoms_of(shape);
  const auto bias = numbers(shape.num_rows, 4);
  const auto is_bad = [](int64_t token) { return token % 2 == 1; };
  const auto last_atom = [&](int64_t token) -> float& {
    return atoms[((shape.num_blocks - 1) * shape.num_tokens + token) * shape.basis_size + shape.basis_size - 1];
  };
  for (int64_t token = 0; token < shape.num_tokens; ++token) {
    last_atom(token) = 0;
  }
  const auto expected = rounded<T>(expected_rows(shape, dense, atoms, &bias));
  for (int64_t token = 0; token < shape.num_tokens; ++token) {
    last_atom(token) = is_bad(token) ? INFINITY : 1;
  }
  const auto narrow_atoms = simt::narrowed<T>(atoms), narrow_bias = simt::narrowed<T>(bias);
  const auto actual = simt::widened(simt::same_in_every_order([&] {
    auto output = simt::narrowed<T>(std::vector<float>(expected.size(), untouched));
    repair(narrow_atoms.data(), narrow_bias.data(), output.data());
    return output;
  }));
  for (int64_t token = 0; token < shape.num_tokens; ++token) {
    for (int64_t row = 0; row < shape.num_rows; ++row) {
      CAPTURE(shape.num_rows, shape.basis_size, shape.nnz, token, row);
      const auto i = static_cast<size_t>(token * shape.num_rows + row);
      if (!is_bad(token)) {
        CHECK(actual[i] == untouched);
      } else if (has_atom(row)) {
        CHECK_FALSE(std::isfinite(actual[i]));
      } else {
        CHECK(actual[i] == expected[i]);
      }
    }
  }
}

TEMPLATE_TEST_CASE("repair_tokens", "", KERNEL_TYPES) {
  const simt::ReleaseBuild release_build;  // goes on where an index is out of range or a mask too full
  for (const Shape& shape : shapes) {
    const Factor<TestType> factor(shape);
    const int64_t last_block = shape.num_blocks - 1;
    check_repair<TestType>(
        shape, factor.dense,
        [&](int64_t row) {
          const auto first = factor.indices.begin() + (row * shape.num_blocks + last_block) * shape.nnz;
          return std::find(first, first + shape.nnz, shape.basis_size - 1) != first + shape.nnz;
        },
        [&](const TestType* atoms, const TestType* bias, TestType* output) {
          device::launch(
              {shape.num_tokens, repair_threads}, repair_tokens<TestType>,
              RepairTokens<TestType, SparseFactor>{factor.pointers(), atoms, bias, output, shape.num_tokens});
        });
  }
}

TEMPLATE_TEST_CASE("repair_packed_tokens", "", KERNEL_TYPES) {
  for (const Shape& shape : shapes) {
    const Packed<TestType> packed(shape, true);
    const int64_t last_block = shape.num_blocks - 1;
    check_repair<TestType>(
        shape, packed.dense,
        [&](int64_t row) {
          const int64_t list = row / rows_per_group * shape.num_blocks + last_block;
          return (packed.mask[list * shape.basis_size + shape.basis_size - 1] >> row % rows_per_group & 1) != 0;
        },
        [&](const TestType* atoms, const TestType* bias, TestType* output) {
          device::launch(
              {shape.num_tokens, repair_threads}, repair_packed_tokens<TestType>,
              RepairTokens<TestType, PackedFactor>{packed.pointers(), atoms, bias, output, shape.num_tokens});
        });
  }
}

TEMPLATE_TEST_CASE("rows_to_atoms", "", KERNEL_TYPES) {
  const simt::ReleaseBuild release_build;  // goes on where an index is out of range or a mask too full
  for (const Shape& shape : shapes) {
    const Factor<TestType> factor(shape);
    const auto rows = rows_of(shape);
    const auto narrow_rows = simt::narrowed<TestType>(rows);
    const auto expected = rounded<TestType>(expected_atoms(shape, factor.dense, rows));
    for (const auto& [threads, part_size] : {std::pair<int64_t, int64_t>{32, tile_rows<TestType>}, {64, 96}}) {
      const int64_t chunks = divide_up(shape.basis_size, threads * columns_of_thread);
      const int64_t parts = std::max<int64_t>(divide_up(shape.num_rows, part_size), 1);
      for_each_token_tile([&](auto tokens) {
        CAPTURE(shape.num_rows, shape.basis_size, shape.nnz, threads, part_size, tokens.value);
        const auto actual = simt::same_in_every_order([&] {
          return sum_of_parts<TestType>(expected.size(), parts, [&](accumulate_t<TestType>* sums) {
            device::launch(
                {{chunks * shape.num_blocks, parts, divide_up(shape.num_tokens, tokens)},
                 static_cast<unsigned>(threads),
                 scatter_shared_bytes<TestType>(threads, tokens)},
                rows_to_atoms<decltype(tokens)::value, TestType>,
                RowsToAtoms<TestType>{factor.pointers(), narrow_rows.data(), sums, shape.num_tokens, part_size});
          });
        });
        CHECK(simt::widened(actual) == expected);
      });
    }
  }
}

TEMPLATE_TEST_CASE("value_gradient and take_nonzeros", "", KERNEL_TYPES) {
  const simt::ReleaseBuild release_build;  // goes on where an index is out of range or a mask too full
  for (const Shape& shape : shapes) {
    CAPTURE(shape.num_rows, shape.basis_size, shape.nnz);
    const Factor<TestType> factor(shape);
    const auto atoms = atoms_of(shape), rows = rows_of(shape);
    const auto narrow_atoms = simt::narrowed<TestType>(atoms), narrow_rows = simt::narrowed<TestType>(rows);
    std::vector<double> expected, dense(factor.dense.size());  // [blocks, rows, K]
    for (int64_t r = 0; r < shape.num_rows; ++r) {
      for (int64_t b = 0; b < shape.num_blocks; ++b) {
        for (int64_t k = 0; k < shape.basis_size; ++k) {
          for (int64_t t = 0; t < shape.num_tokens; ++t) {
            dense[(b * shape.num_rows + r) * shape.basis_size + k] +=
                rows[t * shape.num_rows + r] * atoms[(b * shape.num_tokens + t) * shape.basis_size + k];
          }
        }
        for (int64_t e = 0; e < shape.nnz; ++e) {
          const int64_t index = factor.indices[(r * shape.num_blocks + b) * shape.nnz + e];
          expected.push_back(index < 0 ? 0.0 : dense[(b * shape.num_rows + r) * shape.basis_size + index]);
        }
      }
    }
    auto pointers = factor.pointers();
    pointers.values = nullptr;
    const int64_t blocks = divide_up(static_cast<int64_t>(expected.size()), 64);

    const auto gradient = simt::same_in_every_order([&] {
      std::vector<TestType> result(expected.size());
      device::launch(
          {blocks, 64}, value_gradient<TestType>,
          ValueGradient<TestType>{pointers, narrow_rows.data(), narrow_atoms.data(), result.data(), shape.num_tokens});
      return result;
    });
    CHECK(simt::widened(gradient) == rounded<TestType>(expected));

    const auto narrow_dense = simt::narrowed<TestType>(std::vector<float>(dense.begin(), dense.end()));
    const auto taken = simt::same_in_every_order([&] {
      std::vector<TestType> result(expected.size());
      device::launch({blocks, 64}, take_nonzeros<TestType>, pointers, narrow_dense.data(), result.data());
      return result;
    });
    CHECK(simt::widened(taken) == rounded<TestType>(expected));
  }
}

TEMPLATE_TEST_CASE("packed_atoms_to_rows", "", KERNEL_TYPES) {
  const simt::ReleaseBuild release_build;  // goes on where an index is out of range or a mask too full
  for (const Shape& shape : shapes) {
    for (const bool right_masks : {false, true}) {
      const Packed<TestType> packed(shape, right_masks);
      const auto atoms = atoms_of(shape), bias = numbers(shape.num_rows, 4);
      const auto narrow_atoms = simt::narrowed<TestType>(atoms), narrow_bias = simt::narrowed<TestType>(bias);
      const auto expected = rounded<TestType>(expected_rows(shape, packed.dense, atoms, right_masks ? &bias : nullptr));
      for_each_token_tile([&](auto tokens) {
        CAPTURE(shape.num_rows, shape.basis_size, shape.nnz, right_masks, tokens.value);
        const auto actual = simt::same_in_every_order([&] {
          std::vector<TestType> output(expected.size());
          device::launch(
              {{divide_up(shape.num_rows, rows_per_group), divide_up(shape.num_tokens, tokens)},
               packed_gather_threads,
               packed_gather_shared_bytes<TestType>(tokens)},
              packed_atoms_to_rows<decltype(tokens)::value, TestType>,
              PackedAtomsToRows<TestType>{packed.pointers(), narrow_atoms.data(),
                                          right_masks ? narrow_bias.data() : nullptr, output.data(), shape.num_tokens});
          return output;
        });
        CHECK(simt::widened(actual) == expected);
      });
    }
  }
}

TEMPLATE_TEST_CASE("packed_rows_to_atoms", "", KERNEL_TYPES) {
  const simt::ReleaseBuild release_build;  // goes on where an index is out of range or a mask too full
  for (const Shape& shape : shapes) {
    for (const bool right_masks : {false, true}) {
      const Packed<TestType> packed(shape, right_masks);
      const auto rows = rows_of(shape);
      const auto narrow_rows = simt::narrowed<TestType>(rows);
      const auto expected = rounded<TestType>(expected_atoms(shape, packed.dense, rows));
      const int64_t groups = packed.pointers().num_groups();
      for (const auto& [threads, part_size] : {std::pair<int64_t, int64_t>{32, 2}, {64, 1}}) {
        const int64_t chunks = divide_up(shape.basis_size, threads * packed_columns_of_thread);
        const int64_t parts = std::max<int64_t>(divide_up(groups, part_size), 1);
        for_each_token_tile([&](auto tokens) {
          CAPTURE(shape.num_rows, shape.basis_size, shape.nnz, right_masks, threads, part_size, tokens.value);
          const auto actual = simt::same_in_every_order([&] {
            return sum_of_parts<TestType>(expected.size(), parts, [&](accumulate_t<TestType>* sums) {
              device::launch({{chunks * shape.num_blocks, parts, divide_up(shape.num_tokens, tokens)},
                              static_cast<unsigned>(threads),
                              packed_scatter_shared_bytes<TestType>(tokens)},
                             packed_rows_to_atoms<decltype(tokens)::value, TestType>,
                             PackedRowsToAtoms<TestType>{packed.pointers(), narrow_rows.data(), sums, shape.num_tokens,
                                                         part_size});
            });
          });
          CHECK(simt::widened(actual) == expected);
        });
      }
    }
  }
}

TEMPLATE_TEST_CASE("expand_packed_factor", "", KERNEL_TYPES) {
  const simt::ReleaseBuild release_build;  // goes on where an index is out of range or a mask too full
  for (const Shape& shape : shapes) {
    for (const bool right_masks : {false, true}) {
      CAPTURE(shape.num_rows, shape.basis_size, shape.nnz, right_masks);
      const Packed<TestType> packed(shape, right_masks);
      const auto actual = simt::same_in_every_order([&] {
        std::vector<TestType> dense(packed.dense.size());
        device::launch(
            {packed.pointers().num_groups() * shape.num_blocks, 64, device::shared_size<int32_t>(device::max_warps)},
            expand_packed_factor<TestType>, packed.pointers(), dense.data());
        return dense;
      });
      CHECK(simt::widened(actual) == rounded<TestType>(packed.dense));
    }
  }
}

TEMPLATE_TEST_CASE("pack_factor", "", KERNEL_TYPES) {
  const simt::ReleaseBuild release_build;
  for (const Shape& shape : shapes) {
    CAPTURE(shape.num_rows, shape.basis_size, shape.nnz);
    const Factor<TestType> factor(shape);
    const int64_t groups = divide_up(shape.num_rows, rows_per_group), size = rows_per_group * shape.nnz;
    std::vector<uint16_t> masks;
    const auto actual = simt::same_in_every_order([&] {
      std::vector<TestType> values(static_cast<size_t>(groups * shape.num_blocks * size),
                                   device::narrow<TestType>(NAN));
      masks.assign(static_cast<size_t>(groups * shape.num_blocks * shape.basis_size), 0xffff);
      device::launch({groups * shape.num_blocks, pack_threads, device::shared_size<int32_t>(device::max_warps)},
                     pack_factor<TestType>, PackFactor<TestType>{factor.pointers(), values.data(), masks.data()});
      return values;
    });
    const auto packed = simt::widened(actual);
    if (shape.kind != Indices::increasing) {
      // Which nonzeros are missed is nobody's business, but every place has been written.
      CHECK(std::none_of(packed.begin(), packed.end(), [](float value) { return std::isnan(value); }));
      continue;
    }
    // In the order of columns and then rows, where rows that complete the last group have zeros in front.
    std::vector<float> expected;
    std::vector<uint16_t> expected_masks;
    const auto values = simt::widened(factor.values);
    for (int64_t unit = 0; unit < groups * shape.num_blocks; ++unit) {
      for (int64_t column = 0; column < shape.basis_size; ++column) {
        uint16_t& mask = expected_masks.emplace_back(uint16_t{0});
        for (int64_t r = 0; r < rows_per_group; ++r) {
          const int64_t row = unit / shape.num_blocks * rows_per_group + r;
          const int64_t begin = (row * shape.num_blocks + unit % shape.num_blocks) * shape.nnz;
          for (int64_t e = 0; e < shape.nnz; ++e) {
            const bool is_row = row < shape.num_rows;
            if ((is_row ? factor.indices[begin + e] : e) == column) {
              expected.push_back(is_row ? values[begin + e] : 0.0F);
              mask = static_cast<uint16_t>(mask | 1 << r);
            }
          }
        }
      }
    }
    CHECK(packed == expected);
    CHECK(masks == expected_masks);
  }
}

TEST_CASE("indices that do not increase, or are out of range, stop a debug build of pack_factor") {
  const std::vector<float> values(3);
  std::vector<float> packed(48);
  std::vector<uint16_t> mask(5);
  const auto reason = Catch::Matchers::Contains("assertion: indices increase in every row and block, up to K-1");
  for (const std::vector<uint8_t>& indices : {std::vector<uint8_t>{0, 2, 2}, {0, 2, 1}, {2, 0, 4}, {0, 2, 5}}) {
    const SparseFactor<float> factor{values.data(), indices.data(), true, 1, 1, 3, 5};
    CHECK_THROWS_WITH(device::launch({1, pack_threads, device::shared_size<int32_t>(device::max_warps)},
                                     pack_factor<float>, PackFactor<float>{factor, packed.data(), mask.data()}),
                      reason);
  }
}

TEMPLATE_TEST_CASE("select", "", KERNEL_TYPES) {
  for (const auto& [units, basis_size] : {std::pair<int64_t, int32_t>{3, 300}, {4, 20}, {2, 129}, {1, 1}}) {
    // Many magnitudes tie.
    auto latent = numbers(units * basis_size, 5);
    for (size_t i = 0; i < latent.size(); i += 7) {
      latent[i] = i % 2 == 0 ? std::copysign(NAN, i % 4 == 0 ? 1.0F : -1.0F) : i % 3 == 0 ? INFINITY : -INFINITY;
    }
    std::replace(latent.begin(), latent.end(), 3.0F, -0.0F);
    std::replace(latent.begin(), latent.end(), 5.0F, 0.125F);
    const auto narrow_latent = simt::narrowed<TestType>(latent);
    const bool byte_indices = basis_size <= 256;
    for (const int32_t nnz : {1, basis_size / 3 + 1, basis_size}) {
      CAPTURE(basis_size, nnz);
      std::vector<int64_t> expected;  // indices and the bits of values
      for (int64_t unit = 0; unit < units; ++unit) {
        const auto magnitude = [&](int64_t i) {
          const float value = std::abs(latent[unit * basis_size + i]);
          return std::isnan(value) ? std::pair{1, 0.0F} : std::pair{0, value};
        };
        std::vector<int64_t> order(static_cast<size_t>(basis_size));
        std::iota(order.begin(), order.end(), int64_t{0});
        std::stable_sort(order.begin(), order.end(),
                         [&](int64_t one, int64_t other) { return magnitude(one) > magnitude(other); });
        std::sort(order.begin(), order.begin() + nnz);
        for (int64_t e = 0; e < nnz; ++e) {
          int64_t bits = 0;
          std::memcpy(&bits, &narrow_latent[unit * basis_size + order[e]], sizeof(TestType));
          expected.push_back(order[e]);
          expected.push_back(bits);
        }
      }
      const auto actual = simt::same_in_every_order([&] {
        std::vector<TestType> values(expected.size() / 2);
        std::vector<uint8_t> bytes(byte_indices ? values.size() : 0);
        std::vector<int16_t> shorts(byte_indices ? 0 : values.size());
        device::launch({units, select_threads, device::BlockMemory::bytes}, select<TestType>,
                       Select<TestType>{narrow_latent.data(), values.data(),
                                        byte_indices ? static_cast<void*>(bytes.data()) : shorts.data(), byte_indices,
                                        basis_size, nnz});
        std::vector<int64_t> result;
        for (size_t i = 0; i < values.size(); ++i) {
          int64_t bits = 0;
          std::memcpy(&bits, &values[i], sizeof(TestType));
          result.push_back(byte_indices ? bytes[i] : shorts[i]);
          result.push_back(bits);
        }
        return result;
      });
      CHECK(actual == expected);
    }
  }
}

}  // namespace torchops::kernels::stf::cuda
