// The CUDA kernels of the routed_ffn family that multiply sorted rows, on the host.

#include <algorithm>
#include <vector>

#include "catch.h"
#include "core/cuda/launch.h"
#include "core/cuda/tiles.h"
#include "numbers.h"
#include "orders.h"
#include "routed_ffn/cuda/grouped_gradient.cuh"
#include "routed_ffn/cuda/grouped_product.cuh"

namespace torchops::kernels::routed_ffn {
namespace {

// A race depends neither on the type nor on the size, and ThreadSanitizer takes its time for every fiber.
#if defined(SIMT_THREAD_SANITIZER) || defined(SIMT_MUTATION)
#define FMA_TYPES float
#define MMA_TYPES bfloat16
#else
#define FMA_TYPES float, double
#define MMA_TYPES bfloat16, float16
#endif

struct Shape {
  std::vector<int32_t> offsets;
  int64_t num_rows, num_columns, depth;

  Groups groups() const { return {offsets.data(), static_cast<int64_t>(offsets.size()) - 1, num_rows}; }
  int64_t num_groups() const { return groups().count; }
  int64_t begin(int64_t group) const { return offsets[static_cast<size_t>(group)]; }
};

#if defined(SIMT_THREAD_SANITIZER)
// More steps than there are buffers.
const std::vector<Shape> shapes = {{{0, 5, 5}, 7, 6, 210}};
const std::vector<Shape> gradient_shapes = {{{0, 230}, 230, 7, 6}};
#elif defined(SIMT_MUTATION)
const std::vector<Shape> shapes = {{{0, 70, 70, 135}, 135, 136, 72}, {{0, 3}, 5, 7, 201}};
#else
std::vector<int32_t> small_groups() {
  std::vector<int32_t> offsets = {0};
  for (int32_t group = 0; group < 40; ++group) {
    offsets.push_back(offsets.back() + (group % 8 == 3 ? 2 : 0));
  }
  return offsets;
}

// Tiles that are full and not, copied at once and number by number; groups without rows, rows without a group, and more
// groups than a warp looks at once.
const std::vector<Shape> shapes = {
    {{0, 0, 9, 10}, 12, 10, 5},
    {{0, 130, 136}, 136, 136, 72},
    {{0, 0, 70, 71, 71, 80}, 85, 70, 197},
    {small_groups(), 11, 5, 3},
    {{0, 0}, 3, 4, 2},
    {{0, 2, 4}, 4, 3, 0},
    {{0, 0}, 0, 3, 2},
};
#endif
#if !defined(SIMT_THREAD_SANITIZER)
const std::vector<Shape>& gradient_shapes = shapes;
#endif

// Of the list, in the order of which the first ones matter most. float16 takes the same instructions and barriers as
// bfloat16.
template <typename T>
size_t shapes_of() {
  return std::is_same_v<T, float16> ? 1 : shapes.size();
}

enum class Right { along_depth, along_columns };

size_t count(int64_t rows, int64_t columns) {
  return static_cast<size_t>(rows * columns);
}

// Two rows of a matrix lie further apart than they are long, by a multiple of 16 bytes.
constexpr int64_t gap = 8;

// Numbers and what the kernel reads, for rows of which each has a line of its own.
template <typename T>
struct Rows {
  std::vector<float> numbers;
  std::vector<T> values;
  std::vector<int32_t> lines;
  int64_t stride;

  Rows(int64_t rows, int64_t size, bool gathered, uint32_t seed)
      : numbers(simt::whole_numbers(count(rows, size + gap), seed)),
        values(simt::narrowed<T>(numbers)),
        stride(size + gap) {
    for (int64_t row = 0; gathered && row < rows; ++row) {
      lines.push_back(static_cast<int32_t>((7 * row + 3) % rows));
    }
  }
  float at(int64_t row, int64_t column) const {
    const int64_t line = lines.empty() ? row : lines[static_cast<size_t>(row)];
    return line < 0 ? 0 : numbers[count(line, stride) + static_cast<size_t>(column)];
  }
  SortedRows<T> sorted() const { return {values.data(), stride, lines.empty() ? nullptr : lines.data()}; }
};

template <typename T>
bool is_wide(const T* data, std::initializer_list<int64_t> sizes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size % device::widest<T> == 0; });
}

template <typename T>
std::vector<float> rounded(const std::vector<float>& numbers) {
  return simt::widened(simt::narrowed<T>(numbers));
}

struct Options {
  bool gathered, bias, wide_output, adds;
};

const std::vector<Options> all_options = {
    {true, true, false, false}, {false, false, true, true}, {false, true, false, true}, {true, true, true, false}};

template <typename Tile, Right right, typename T>
void check_product(const Shape& shape, const Options& options) {
  using A = accumulate_t<T>;
  constexpr bool along_depth = right == Right::along_depth;
  CAPTURE(shape.num_rows, shape.num_columns, shape.depth, options.gathered, options.adds, along_depth);
  const Rows<T> left(shape.num_rows, shape.depth, options.gathered, 1);
  const int64_t lines = along_depth ? shape.num_columns : shape.depth;
  const int64_t stride = (along_depth ? shape.depth : shape.num_columns) + gap;
  const int64_t group_stride = lines * stride + gap;
  const auto matrices = simt::whole_numbers(count(shape.num_groups(), group_stride), 2);
  const auto biases = simt::whole_numbers(count(shape.num_groups(), shape.num_columns + 1), 3);
  const int64_t output_stride = shape.num_columns + 2;
  const auto before = simt::whole_numbers(count(shape.num_rows, output_stride), 4);

  auto expected = before;
  for (int64_t group = 0; group <= shape.num_groups(); ++group) {
    const bool is_behind = group == shape.num_groups();
    const int64_t end = is_behind ? shape.num_rows : shape.begin(group + 1);
    for (int64_t row = shape.begin(group); row < end; ++row) {
      for (int64_t column = 0; column < shape.num_columns; ++column) {
        float sum =
            options.bias && !is_behind ? biases[count(group, shape.num_columns + 1) + static_cast<size_t>(column)] : 0;
        for (int64_t d = 0; d < shape.depth && !is_behind; ++d) {
          const int64_t at = along_depth ? column * stride + d : d * stride + column;
          sum += left.at(row, d) * matrices[static_cast<size_t>(group * group_stride + at)];
        }
        float& result = expected[static_cast<size_t>(row * output_stride + column)];
        result = options.adds ? result + sum : sum;
      }
    }
  }

  const auto narrow_matrices = simt::narrowed<T>(matrices), narrow_biases = simt::narrowed<T>(biases);
  GroupedProduct<T> args{shape.groups(),
                         shape.num_columns,
                         shape.depth,
                         left.sorted(),
                         narrow_matrices.data(),
                         group_stride,
                         along_depth ? 1 : stride,
                         along_depth ? stride : 1,
                         options.bias ? narrow_biases.data() : nullptr,
                         shape.num_columns + 1,
                         nullptr,
                         nullptr,
                         output_stride,
                         options.adds};
  const WideOperands wide{
      is_wide(left.values.data(), {left.stride, shape.depth}),
      is_wide(narrow_matrices.data(), {stride, group_stride, along_depth ? shape.depth : shape.num_columns})};
  const auto launch = [&] {
    device::launch({num_slots(shape.groups(), Tile::rows) * device::tiles_of(shape.num_columns, Tile::columns),
                    Tile::threads, tile_stream_bytes<Tile, T>},
                   grouped_product<Tile, along_depth, T>, args, wide);
  };
  if (options.wide_output) {
    CHECK(simt::widened(simt::same_in_every_order([&] {
            std::vector<A> output(before.begin(), before.end());
            args.wide_output = output.data();
            launch();
            return output;
          })) == expected);
  } else {
    CHECK(simt::widened(simt::same_in_every_order([&] {
            auto output = simt::narrowed<T>(before);
            args.output = output.data();
            launch();
            return output;
          })) == rounded<T>(expected));
  }
}

// All options with the smallest shape, and one or another with each.
template <template <bool> typename Tile, typename T>
void check_products(size_t num_shapes = shapes_of<T>()) {
  for (size_t i = 0; i < num_shapes; ++i) {
    check_product<Tile<true>, Right::along_depth, T>(shapes[i], all_options[i % 4]);
    check_product<Tile<false>, Right::along_columns, T>(shapes[i], all_options[(i + 2) % 4]);
  }
#if !defined(SIMT_THREAD_SANITIZER) && !defined(SIMT_MUTATION)
  for (const Options& options : all_options) {
    check_product<Tile<true>, Right::along_depth, T>(shapes[0], options);
    check_product<Tile<false>, Right::along_columns, T>(shapes[0], options);
  }
#endif
}

template <typename Tile, typename T>
void check_gradient(const Shape& shape, bool left_gathered) {
  CAPTURE(shape.num_rows, shape.num_columns, shape.depth, left_gathered);
  // The groups' matrices are [depth, num_columns] here.
  const Rows<T> left(shape.num_rows, shape.depth, left_gathered, 1);
  const Rows<T> right(shape.num_rows, shape.num_columns, !left_gathered, 2);
  const int64_t row_stride = shape.num_columns + 3, group_stride = shape.depth * row_stride + 1;
  const auto before = simt::whole_numbers(count(shape.num_groups(), group_stride), 4);
  auto expected = before;
  for (int64_t group = 0; group < shape.num_groups(); ++group) {
    for (int64_t m = 0; m < shape.depth; ++m) {
      for (int64_t n = 0; n < shape.num_columns; ++n) {
        float sum = 0;
        for (int64_t row = shape.begin(group); row < shape.begin(group + 1); ++row) {
          sum += left.at(row, m) * right.at(row, n);
        }
        expected[static_cast<size_t>(group * group_stride + m * row_stride + n)] = sum;
      }
    }
  }
  const auto actual = simt::same_in_every_order([&] {
    auto output = simt::narrowed<T>(before);
    const GroupedGradient<T> args{shape.groups(), shape.depth,   shape.num_columns, left.sorted(),
                                  right.sorted(), output.data(), group_stride,      row_stride};
    const WideOperands wide{is_wide(left.values.data(), {left.stride, shape.depth}),
                            is_wide(right.values.data(), {right.stride, shape.num_columns})};
    device::launch({shape.num_groups() * device::tiles_of(shape.depth, Tile::rows) *
                        device::tiles_of(shape.num_columns, Tile::columns),
                    Tile::threads, tile_stream_bytes<Tile, T>},
                   grouped_gradient<Tile, T>, args, wide);
    return output;
  });
  CHECK(simt::widened(actual) == rounded<T>(expected));
}

template <typename Tile, typename T>
void check_gradients(size_t num_shapes = shapes_of<T>()) {
  for (size_t i = 0; i < num_shapes; ++i) {
    check_gradient<Tile, T>(gradient_shapes[i], i % 2 == 0);
  }
}

template <typename T>
struct Fma {
  template <bool along_depth>
  using Product = FmaProduct<T, along_depth>;
};

template <typename T, int row_blocks>
struct Mma {
  template <bool along_depth>
  using Product = MmaProduct<T, row_blocks, along_depth>;
};

}  // namespace

TEMPLATE_TEST_CASE("fma products of sorted rows", "", FMA_TYPES) {
  check_products<Fma<TestType>::template Product, TestType>();
}

TEMPLATE_TEST_CASE("mma products of sorted rows", "", MMA_TYPES) {
  check_products<Mma<TestType, 1>::template Product, TestType>();
#if !defined(SIMT_THREAD_SANITIZER) && !defined(SIMT_MUTATION)
  check_products<Mma<TestType, 4>::template Product, TestType>(std::min<size_t>(shapes_of<TestType>(), 2));
#endif
}

TEMPLATE_TEST_CASE("fma gradients of groups", "", FMA_TYPES) {
  check_gradients<FmaGradient<TestType>, TestType>();
}

TEMPLATE_TEST_CASE("mma gradients of groups", "", MMA_TYPES) {
  check_gradients<MmaGradient<TestType, 2>, TestType>();
#if !defined(SIMT_THREAD_SANITIZER) && !defined(SIMT_MUTATION)
  check_gradients<MmaGradient<TestType, 4>, TestType>(std::min<size_t>(shapes_of<TestType>(), 2));
#endif
}

// Nobody looked at offsets and lines before they come here.
TEST_CASE("wrong offsets and lines name nothing out of range") {
  using Tile = FmaProduct<float, true>;
  const auto run = [](std::vector<int32_t> offsets, std::vector<int32_t> lines) {
    const auto rows = static_cast<int64_t>(lines.size());
    const Shape shape{std::move(offsets), rows, 4, 3};
    const std::vector<float> left(count(rows, 3), 1), right(count(shape.num_groups(), 12), 2);
    std::vector<float> output(count(rows, 4), 5), gradient(count(shape.num_groups(), 9), 5);
    const SortedRows<float> sorted{left.data(), 3, lines.data()};
    device::launch({num_slots(shape.groups(), Tile::rows), Tile::threads, tile_stream_bytes<Tile, float>},
                   grouped_product<Tile, true, float>,
                   GroupedProduct<float>{shape.groups(), 4, 3, sorted, right.data(), 12, 1, 3, nullptr, 0,
                                         output.data(), nullptr, 4, false},
                   WideOperands{false, false});
    device::launch({shape.num_groups(), Tile::threads, tile_stream_bytes<FmaGradient<float>, float>},
                   grouped_gradient<FmaGradient<float>, float>,
                   GroupedGradient<float>{shape.groups(), 3, 3, sorted, sorted, gradient.data(), 9, 3},
                   WideOperands{false, false});
    return output;
  };
  using Catch::Matchers::Contains;
  CHECK_THROWS_WITH(run({0, 9}, {0, 1}), Contains("an offset is in 0..M"));
  CHECK_THROWS_WITH(run({0, 2, 1}, {0, 1}), Contains("offsets ascend"));

  const simt::ReleaseBuild release_build;  // where offsets descend, groups share rows, and blocks race for them
  CHECK(run({0, 2}, {1, -1}) == std::vector<float>{6, 6, 6, 6, 0, 0, 0, 0});
#if !defined(SIMT_THREAD_SANITIZER)
  run({0, 2, 1, 700}, {0, 1});
  run({-5, 2, -3}, {0, 1});
  run({2, 1, 0}, {0, 1});
#endif
}

}  // namespace torchops::kernels::routed_ffn
