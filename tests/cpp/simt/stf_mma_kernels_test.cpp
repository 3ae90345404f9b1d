// The kernels of the stf family that multiply on matrix units, on the host.

#include "catch.h"
#include "orders.h"
#include "stf/cuda/packed_atoms_to_rows_mma.cuh"
#include "stf/cuda/packed_rows_to_atoms_mma.cuh"
#include "stf_factors.h"

// A race does not depend on the type, and ThreadSanitizer takes its time for every fiber.
#if defined(SIMT_THREAD_SANITIZER) || defined(SIMT_MUTATION)
#define MMA_TYPES bfloat16
#else
#define MMA_TYPES bfloat16, float16
#endif

namespace torchops::kernels::stf::cuda {
namespace {

#if defined(SIMT_THREAD_SANITIZER)
const std::vector<Shape> shapes = {{72, 2, 5, 16, 20, Indices::increasing}};
const std::vector<bool> whether_masks_are_right = {true};
#else
// More than one tile of rows, of columns and of tokens, copied at once and number by number, and the ends of all.
const std::vector<Shape> shapes = {
    {72, 2, 37, 264, 20, Indices::increasing}, {35, 1, 40, 300, 66, Indices::increasing},
    {64, 1, 6, 12, 64, Indices::increasing},   {0, 2, 3, 5, 2, Indices::increasing},
    {7, 2, 0, 5, 2, Indices::increasing},      {9, 2, 3, 5, 0, Indices::increasing},
};
const std::vector<bool> whether_masks_are_right = {false, true};
#endif

}  // namespace

TEMPLATE_TEST_CASE("packed_atoms_to_rows_mma", "", MMA_TYPES) {
  const simt::ReleaseBuild release_build;  // goes on where a mask is too full
  for (const Shape& shape : shapes) {
    for (const bool right_masks : whether_masks_are_right) {
      const Packed<TestType> packed(shape, right_masks);
      const auto atoms = atoms_of(shape), bias = numbers(shape.num_rows, 4);
      const auto narrow_atoms = simt::narrowed<TestType>(atoms), narrow_bias = simt::narrowed<TestType>(bias);
      const auto expected = rounded<TestType>(expected_rows(shape, packed.dense, atoms, right_masks ? &bias : nullptr));
      const int64_t tiles = shape.num_blocks * divide_up(shape.basis_size, packed_gather_tile_columns);
      for (const int64_t part_size : {1, 3}) {
        CAPTURE(shape.num_rows, shape.basis_size, shape.nnz, right_masks, part_size);
        const int64_t parts = divide_up(tiles, part_size);
        const auto actual = simt::same_in_every_order([&] {
          return sum_of_parts<TestType>(
              expected.size(), parts,
              [&](float* sums) {
                device::launch({{divide_up(shape.num_rows, packed_tile_rows),
                                 divide_up(shape.num_tokens, packed_tile_tokens), parts},
                                packed_tile_threads,
                                packed_gather_mma_shared_bytes<TestType>},
                               packed_atoms_to_rows_mma<TestType>,
                               PackedAtomsToRowsMma<TestType>{packed.pointers(), narrow_atoms.data(), sums,
                                                              shape.num_tokens, part_size, shape.basis_size % 8 == 0});
              },
              right_masks ? narrow_bias.data() : nullptr, shape.num_rows);
        });
        CHECK(simt::widened(actual) == expected);
      }
    }
  }
}

TEMPLATE_TEST_CASE("packed_rows_to_atoms_mma", "", MMA_TYPES) {
  const simt::ReleaseBuild release_build;
  for (const Shape& shape : shapes) {
    for (const bool right_masks : whether_masks_are_right) {
      const Packed<TestType> packed(shape, right_masks);
      const auto rows = rows_of(shape);
      const auto narrow_rows = simt::narrowed<TestType>(rows);
      const auto expected = rounded<TestType>(expected_atoms(shape, packed.dense, rows));
      for (const int64_t part_size : {1, 2}) {
        CAPTURE(shape.num_rows, shape.basis_size, shape.nnz, right_masks, part_size);
        const int64_t parts = std::max<int64_t>(divide_up(divide_up(shape.num_rows, packed_tile_rows), part_size), 1);
        const auto actual = simt::same_in_every_order([&] {
          return sum_of_parts<TestType>(expected.size(), parts, [&](float* sums) {
            device::launch({{shape.num_blocks * divide_up(shape.basis_size, packed_scatter_tile_columns),
                             divide_up(shape.num_tokens, packed_tile_tokens), parts},
                            packed_tile_threads,
                            packed_scatter_mma_shared_bytes<TestType>},
                           packed_rows_to_atoms_mma<TestType>,
                           PackedRowsToAtomsMma<TestType>{packed.pointers(), narrow_rows.data(), sums, shape.num_tokens,
                                                          part_size, shape.num_rows % 8 == 0});
          });
        });
        CHECK(simt::widened(actual) == expected);
      }
    }
  }
}

}  // namespace torchops::kernels::stf::cuda
