// The product of dense matrices on the CPU: its kernels at every level, and the host side at the one in use.

#include "core/cpu/dense_product.h"

#include <ATen/Parallel.h>
#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

#include "catch.h"
#include "core/cpu/aligned_buffer.h"
#include "core/cpu/dense_product_kernel.h"
#include "core/tensors.h"

using torchops::kernels::core::DenseProduct;

namespace {

const auto float_dtypes = {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf};

// Batches, rows, columns, depth: around registers, panels, blocks and tiles, few rows and many.
using Shape = std::array<int64_t, 4>;
const std::vector<Shape> shapes = {{1, 1, 1, 1},      {2, 3, 5, 7},     {1, 4, 64, 32},    {3, 5, 42, 129},
                                   {2, 16, 17, 33},   {1, 17, 65, 31},  {2, 48, 130, 70},  {1, 49, 100, 513},
                                   {1, 53, 66, 1030}, {1, 530, 70, 40}, {1, 1030, 9, 300}, {2, 60, 1, 20},
                                   {1, 7, 1, 300},    {1, 100, 600, 2}, {1, 1, 300, 1}};

// The same matrices with gaps of `gap` behind every row and batch, the columns one below the other if transposed.
at::Tensor spread(const at::Tensor& matrices, bool transposed, double gap = NAN) {
  const auto stored = transposed ? matrices.transpose(1, 2) : matrices;
  auto room = at::full({stored.size(0), stored.size(1) + 1, stored.size(2) + 3}, gap, stored.options());
  auto view = room.narrow(1, 0, stored.size(1)).narrow(2, 0, stored.size(2));
  view.copy_(stored);
  return transposed ? view.transpose(1, 2) : view;
}

// Nothing was written to the gaps of what spread made.
bool gaps_are(double gap, const at::Tensor& view) {
  const auto rows = view.size(1), columns = view.size(2);
  const auto room = view.as_strided({view.size(0), rows + 1, columns + 3}, view.strides());
  return (room.narrow(1, rows, 1) == gap).all().item<bool>() && (room.narrow(2, columns, 3) == gap).all().item<bool>();
}

struct Expected {
  at::Tensor product;    // in float64
  at::Tensor magnitude;  // the same sums of magnitudes
};

Expected expected_product(const at::Tensor& left, const at::Tensor& right, const std::optional<at::Tensor>& bias) {
  const auto wide_left = left.to(at::kDouble), wide_right = right.to(at::kDouble);
  const auto size = std::vector<int64_t>{left.size(0), left.size(1), right.size(2)};
  auto product = at::zeros(size, at::kDouble), magnitude = at::zeros(size, at::kDouble);
  if (bias) {
    product += bias->to(at::kDouble).unsqueeze(1);
    magnitude += bias->to(at::kDouble).abs().unsqueeze(1);
  }
  const auto l = wide_left.accessor<double, 3>(), r = wide_right.accessor<double, 3>();
  auto p = product.accessor<double, 3>(), m = magnitude.accessor<double, 3>();
  for (int64_t b = 0; b < size[0]; ++b) {
    for (int64_t row = 0; row < size[1]; ++row) {
      for (int64_t d = 0; d < left.size(2); ++d) {
        for (int64_t column = 0; column < size[2]; ++column) {
          p[b][row][column] += l[b][row][d] * r[b][d][column];
          m[b][row][column] += std::abs(l[b][row][d] * r[b][d][column]);
        }
      }
    }
  }
  return {product, magnitude};
}

// The largest error, as a part of the sum of magnitudes, is no more than that of rounding.
bool is_close(const at::Tensor& output, const Expected& expected) {
  const auto dtype = output.scalar_type();
  const double tolerance = dtype == at::kDouble ? 1e-14 : dtype == at::kFloat ? 1e-6 : dtype == at::kHalf ? 6e-4 : 5e-3;
  const auto error = (output.to(at::kDouble) - expected.product).abs();
  return (error <= tolerance * expected.magnitude + 1e-30).all().item<bool>();
}

template <typename T>
struct Kernel {
  std::string level;
  int64_t (*units)(const DenseProduct<T>&);
  int64_t (*scratch_bytes)(const DenseProduct<T>&);
  void (*run)(const DenseProduct<T>&, void*, int64_t, int64_t);
};

template <typename T>
std::vector<Kernel<T>> kernels_here() {
  const auto levels = torchops::cpu_capabilities();
  std::vector<Kernel<T>> kernels;
#define TORCHOPS_ADD(level)                                                             \
  if (std::find(levels.begin(), levels.end(), #level) != levels.end()) {                \
    kernels.push_back({#level, &torchops::kernels::core::level::dense_product_units<T>, \
                       &torchops::kernels::core::level::dense_product_scratch_bytes<T>, \
                       &torchops::kernels::core::level::dense_product<T>});             \
  }
  TORCHOPS_FOR_EACH_LEVEL_NAME(TORCHOPS_ADD)
#undef TORCHOPS_ADD
  if (!std::is_same_v<T, torchops::kernels::bfloat16>) {
    // On tiles there are products of bfloat16 only, the others are avx512_bf16's.
    std::erase_if(kernels, [](const auto& kernel) { return kernel.level == "amx"; });
  }
  return kernels;
}

template <typename T>
torchops::kernels::core::Matrices<T> matrices(const at::Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// As `threads` threads would split the units among them.
template <typename T>
void run(const Kernel<T>& kernel, const DenseProduct<T>& args, int64_t threads) {
  const auto units = kernel.units(args);
  const auto bytes = static_cast<size_t>(kernel.scratch_bytes(args));
  const auto share = (units + threads - 1) / threads;
  for (int64_t begin = 0; begin < units; begin += share) {
    torchops::AlignedBuffer<char> scratch(bytes);
    std::fill_n(scratch.data(), bytes, static_cast<char>(0xff));  // NaNs
    kernel.run(args, scratch.data(), begin, std::min(begin + share, units));
  }
}

}  // namespace

TEST_CASE("the dense product is the sum of products at every level, split among any number of threads") {
  torch::manual_seed(0);
  for (const auto dtype : float_dtypes) {
    for (const auto& [batches, rows, columns, depth] : shapes) {
      const auto left = at::randn({batches, rows, depth}, dtype), right = at::randn({batches, depth, columns}, dtype);
      const auto bias = at::randn({batches, columns}, dtype);
      for (const bool with_bias : {false, true}) {
        const auto expected = expected_product(left, right, with_bias ? std::optional(bias) : std::nullopt);
        for (const bool left_transposed : {false, true}) {
          for (const bool right_transposed : {false, true}) {
            if (columns == 1 && !right_transposed) {
              continue;  // a single column lies along the depth
            }
            const auto l = spread(left, left_transposed), r = spread(right, right_transposed);
            torchops::for_dtype(dtype, [&](auto tag) {
              using T = typename decltype(tag)::type;
              for (const auto& kernel : kernels_here<T>()) {
                CAPTURE(dtype, batches, rows, columns, depth, left_transposed, right_transposed, kernel.level);
                at::Tensor first;
                for (const int64_t threads : {1, 2, 3, 1000}) {
                  const auto output = spread(at::zeros({batches, rows, columns}, dtype), false, 7);
                  DenseProduct<T> args{batches,
                                       rows,
                                       columns,
                                       depth,
                                       matrices<T>(l),
                                       matrices<T>(r),
                                       with_bias ? static_cast<const T*>(bias.const_data_ptr()) : nullptr,
                                       columns,
                                       static_cast<T*>(output.mutable_data_ptr()),
                                       output.stride(0),
                                       output.stride(1)};
                  args.right.column_stride = columns == 1 ? 0 : args.right.column_stride;
                  run(kernel, args, threads);
                  if (!first.defined()) {
                    first = output;
                    REQUIRE(is_close(output, expected));
                  }
                  REQUIRE(torch::equal(output, first));
                  REQUIRE(gaps_are(7, output));
                }
              }
            });
          }
        }
      }
    }
  }
}

TEST_CASE("lines that an index names give the bits of a copy of them, and sums go unrounded to a wide output") {
  torch::manual_seed(0);
  for (const auto dtype : float_dtypes) {
    for (const auto& [batches, rows, columns, depth] :
         {Shape{2, 3, 5, 7}, {3, 5, 42, 129}, {2, 48, 130, 70}, {1, 60, 70, 530}, {1, 530, 9, 40}}) {
      for (const bool left_transposed : {false, true}) {
        for (const bool right_transposed : {false, true}) {
          torchops::for_dtype(dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            using A = torchops::kernels::accumulate_t<T>;
            const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
            // Every line of memory stands somewhere in a longer matrix, in an order without a rule.
            const auto gathered = [](const at::Tensor& matrix, int64_t dim, at::Tensor& index) {
              const auto count = matrix.size(dim);
              index = at::randperm(3 * count, at::kLong).slice(0, 0, count);
              auto sizes = matrix.sizes().vec();
              sizes[static_cast<size_t>(dim)] = 3 * count;
              return at::full(sizes, NAN, matrix.options()).index_copy_(dim, index, matrix);
            };
            const auto left = at::randn({batches, rows, depth}, dtype),
                       right = at::randn({batches, depth, columns}, dtype);
            at::Tensor left_index, right_index;
            const auto l = spread(gathered(left, left_transposed ? 2 : 1, left_index), left_transposed);
            const auto r = spread(gathered(right, right_transposed ? 2 : 1, right_index), right_transposed);
            const auto left_lines = left_index.to(at::kInt), right_lines = right_index.to(at::kInt);
            const auto l_copy = spread(left, left_transposed), r_copy = spread(right, right_transposed);
            const auto start = at::randn({batches, rows, columns}, wide);
            for (const auto& kernel : kernels_here<T>()) {
              for (const bool adds : {false, true}) {
                CAPTURE(dtype, batches, rows, columns, depth, left_transposed, right_transposed, kernel.level, adds);
                auto expected = expected_product(left, right, std::nullopt);
                if (adds) {
                  expected.product += start;
                  expected.magnitude += start.abs();
                }
                const auto product = [&](bool gathers) {
                  const auto output = spread(adds ? start : at::full({batches, rows, columns}, NAN, wide), false, 7);
                  DenseProduct<T> args{batches,
                                       rows,
                                       columns,
                                       depth,
                                       matrices<T>(gathers ? l : l_copy),
                                       matrices<T>(gathers ? r : r_copy),
                                       nullptr,
                                       0,
                                       nullptr,
                                       output.stride(0),
                                       output.stride(1),
                                       static_cast<A*>(output.mutable_data_ptr()),
                                       adds};
                  if (gathers) {
                    args.left.lines = left_lines.const_data_ptr<int32_t>();
                    args.right.lines = right_lines.const_data_ptr<int32_t>();
                  }
                  run(kernel, args, 3);
                  REQUIRE(gaps_are(7, output));
                  return output;
                };
                const auto of_lines = product(true);
                REQUIRE(torch::equal(of_lines, product(false)));
                // Products of 16-bit numbers are exact in 32: nothing but the additions is rounded.
                const auto error = (of_lines.to(at::kDouble) - expected.product).abs();
                const double tolerance = dtype == at::kDouble ? 1e-14 : 2e-6;
                REQUIRE((error <= tolerance * expected.magnitude + 1e-30).all().template item<bool>());
              }
            }
          });
        }
      }
    }
  }
}

TEST_CASE("dense_product takes any strides, and the left ones do not change a bit") {
  torch::manual_seed(0);
  for (const auto dtype : float_dtypes) {
    for (const auto& [batches, rows, columns, depth] : shapes) {
      CAPTURE(dtype, batches, rows, columns, depth);
      const auto left = at::randn({batches, rows, depth}, dtype), right = at::randn({batches, depth, columns}, dtype);
      const auto bias = at::randn({batches, columns}, dtype);
      const auto expected = expected_product(left, right, bias);
      const auto every_second = [](const at::Tensor& tensor) {
        return tensor.repeat_interleave(2, 1).repeat_interleave(2, 2).slice(1, 0, {}, 2).slice(2, 0, {}, 2);
      };
      for (const auto& r : {right, spread(right, true), every_second(right)}) {
        at::Tensor first;
        for (const auto& l : {left, spread(left, false), spread(left, true), every_second(left)}) {
          for (const auto& b : {bias, every_second(bias.unsqueeze(0)).squeeze(0)}) {
            // A view whose batches lie side by side.
            auto output = at::empty({rows, batches, columns}, left.options()).transpose(0, 1);
            torchops::dense_product(l, r, output, b);
            if (!first.defined()) {
              first = output;
              REQUIRE(is_close(output, expected));
            }
            REQUIRE(torch::equal(output, first));
          }
        }
      }
    }
  }
}

TEST_CASE("dense_product has the same bits for any number of threads") {
  torch::manual_seed(0);
  const auto threads_before = at::get_num_threads();
  for (const auto dtype : float_dtypes) {
    for (const auto& [batches, rows, columns, depth] :
         {Shape{1, 1, 341, 1024}, {1, 5, 1024, 341}, {3, 60, 200, 300}, {1, 600, 300, 600}}) {
      CAPTURE(dtype, batches, rows, columns, depth);
      const auto left = at::randn({batches, rows, depth}, dtype), right = at::randn({batches, depth, columns}, dtype);
      at::Tensor first;
      for (const int threads : {1, 2, 3}) {
        at::set_num_threads(threads);
        const auto output = at::empty({batches, rows, columns}, dtype);
        torchops::dense_product(left, right, output);
        first = first.defined() ? first : output;
        CHECK(torch::equal(output, first));
      }
    }
  }
  at::set_num_threads(threads_before);
}

TEST_CASE("dense_product of nothing is zero, or the bias") {
  for (const auto dtype : float_dtypes) {
    const auto bias = at::randn({2, 4}, dtype);
    const auto output = at::full({2, 3, 4}, 7, dtype);
    torchops::dense_product(at::empty({2, 3, 0}, dtype), at::empty({2, 0, 4}, dtype), output, bias);
    CHECK(torch::equal(output, bias.unsqueeze(1).expand({2, 3, 4})));
    torchops::dense_product(at::empty({2, 3, 0}, dtype), at::empty({2, 0, 4}, dtype), output);
    CHECK(torch::equal(output, at::zeros({2, 3, 4}, dtype)));
    for (const auto& [batches, rows, columns] : {std::array<int64_t, 3>{0, 3, 4}, {2, 0, 4}, {2, 3, 0}}) {
      torchops::dense_product(at::ones({batches, rows, 5}, dtype), at::ones({batches, 5, columns}, dtype),
                              at::empty({batches, rows, columns}, dtype));
    }
  }
}

TEST_CASE("a NaN or an infinity stays in its row and column") {
  for (const auto dtype : float_dtypes) {
    for (const int64_t rows : {3, 60}) {
      for (const bool transposed : {false, true}) {
        auto left = at::ones({1, rows, 33}, dtype), right = at::ones({1, 33, 37}, dtype);
        left[0][2][32] = NAN;
        right[0][32][5] = INFINITY;
        const auto output = at::empty({1, rows, 37}, dtype);
        torchops::dense_product(left, spread(right, transposed), output);
        CHECK(output[0][2].isnan().all().item<bool>());
        CHECK(output.isnan().sum().item<int64_t>() == 37);
        CHECK(output.select(2, 5).isinf().sum().item<int64_t>() == rows - 1);
        CHECK(output.eq(33).sum().item<int64_t>() == (rows - 1) * 36);
      }
    }
  }
}
