// The CUDA kernels that select by product quantization on the host, next to the CPU kernels of the lowest level.

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "catch.h"
#include "numbers.h"
#include "orders.h"
#include "sparse_attention/cpu/nearest_codeword_kernel.h"
#include "sparse_attention/cpu/quantization_loss_kernel.h"
#include "sparse_attention/cuda/launches.cuh"

// A race does not depend on the type, and ThreadSanitizer takes its time for every fiber.
#if defined(SIMT_THREAD_SANITIZER) || defined(SIMT_MUTATION)
#define KERNEL_TYPES float
#else
#define KERNEL_TYPES double, float, bfloat16, float16
#define EVERY_SHAPE
#endif

namespace torchops::kernels::sparse_attention {
namespace {

struct Shape {
  std::string name;
  int64_t num_rows, num_subspaces, subspace, num_codewords;
};
const std::vector<Shape> shapes = {
    {"several groups of codewords", 130, 3, 5, 41},
    {"no rows", 0, 2, 3, 16},
#if defined(EVERY_SHAPE)
    {"codes of 16", 7, 8, 8, 16},
    {"fewer codewords than lanes", 40, 2, 19, 5},
    {"a channel a subspace", 140, 2, 1, 256},
    {"no channels", 5, 2, 0, 16},
#else
    {"codes of 16", 7, 3, 3, 16},
    {"a channel a subspace", 20, 2, 1, 20},
#endif
};

// Codewords from whole numbers, with copies of the last one behind it.
template <typename A>
std::vector<A> padded_codewords(const Shape& shape, const std::vector<float>& numbers) {
  const int64_t padded = Parts<float>{nullptr, nullptr, 0, 0, 0, shape.num_codewords}.padded();
  std::vector<A> codewords;
  for (int64_t row = 0; row < shape.num_subspaces * shape.subspace; ++row) {
    for (int64_t e = 0; e < padded; ++e) {
      const int64_t own = std::min(e, shape.num_codewords - 1);
      codewords.push_back(static_cast<A>(numbers[static_cast<size_t>(row * shape.num_codewords + own)]));
    }
  }
  codewords.shrink_to_fit();
  return codewords;
}

std::vector<float> whole_codewords(const Shape& shape) {
  return simt::whole_numbers(static_cast<size_t>(shape.num_subspaces * shape.subspace * shape.num_codewords), 2);
}

template <typename T>
std::vector<T> whole_rows(const Shape& shape) {
  return simt::narrowed<T>(
      simt::whole_numbers(static_cast<size_t>(shape.num_rows * shape.num_subspaces * shape.subspace), 1));
}

template <typename T>
Parts<T> parts_of(const Shape& shape, const std::vector<T>& input, const std::vector<accumulate_t<T>>& codewords) {
  return {input.data(), codewords.data(), shape.num_rows, shape.num_subspaces, shape.subspace, shape.num_codewords};
}

}  // namespace

TEMPLATE_TEST_CASE("nearest_codeword", "", KERNEL_TYPES) {
  using T = TestType;
  using A = accumulate_t<T>;
  for (const Shape& shape : shapes) {
    CAPTURE(shape.name);
    // Whole numbers, so that many codewords are as near as the nearest.
    const auto input = whole_rows<T>(shape);
    auto numbers = whole_codewords(shape);
    if (!numbers.empty()) {
      numbers[0] = std::numeric_limits<float>::quiet_NaN();
      numbers.back() = std::numeric_limits<float>::infinity();
    }
    const auto codewords = padded_codewords<A>(shape, numbers);
    const auto encode = [&](const auto& kernel) {
      std::vector<uint8_t> codes(static_cast<size_t>(shape.num_rows * shape.num_subspaces), 255);
      kernel(NearestCodeword<T>{parts_of(shape, input, codewords), codes.data()});
      return codes;
    };
    const auto expected =
        encode([&](const NearestCodeword<T>& args) { baseline::nearest_codeword(args, 0, shape.num_rows); });
    REQUIRE(simt::same_in_every_order([&] {
              return encode([](const NearestCodeword<T>& args) { launch_nearest_codeword(args); });
            }) == expected);
  }
}

namespace {

constexpr int64_t num_pieces = 9;

// Which gradients are wanted, and whether the input has a NaN and an infinity.
struct Wanted {
  bool to_input, to_codewords, is_odd;
};
const std::vector<Wanted> every_wanted = {
    {true, true, false},
#if defined(EVERY_SHAPE)
    {true, true, true},
    {true, false, false},
    {false, true, false},
#endif
};

// Relative to the largest.
template <typename Numbers>
bool close(const Numbers& actual, const Numbers& expected, double tolerance) {
  double largest = 0;
  for (const auto number : expected) {
    largest = std::max(largest, std::abs(static_cast<double>(number)));
  }
  REQUIRE(actual.size() == expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    const auto one = static_cast<double>(actual[i]), other = static_cast<double>(expected[i]);
    if (!(std::abs(one - other) <= tolerance * largest) && !(std::isnan(one) && std::isnan(other))) {
      return false;
    }
  }
  return true;
}

template <typename T>
constexpr double rounding = sizeof(accumulate_t<T>) == 8 ? 1e-13 : 1e-5;

// Parts that are codewords, and others; with a NaN and an infinity on request.
template <typename T>
std::vector<T> rows_near(const Shape& shape, bool is_odd) {
  auto numbers = simt::whole_numbers(static_cast<size_t>(shape.num_rows * shape.num_subspaces * shape.subspace), 1);
  for (size_t i = 0; i < numbers.size(); ++i) {
    numbers[i] /= 4;
  }
  if (is_odd && numbers.size() > 40) {
    numbers[1] = std::numeric_limits<float>::quiet_NaN();
    numbers[numbers.size() - 1] = std::numeric_limits<float>::infinity();
  }
  return simt::narrowed<T>(numbers);
}

}  // namespace

TEMPLATE_TEST_CASE("quantization_loss", "", KERNEL_TYPES) {
  using T = TestType;
  using A = accumulate_t<T>;
  for (const Shape& shape : shapes) {
    CAPTURE(shape.name);
    const auto input = rows_near<T>(shape, false);
    const auto codewords = padded_codewords<A>(shape, whole_codewords(shape));
    const auto compute = [&](const auto& kernel) {
      const int64_t pieces = shape.num_rows == 0 ? 0 : num_pieces;
      std::vector<double> sums(static_cast<size_t>(pieces * shape.num_subspaces), -1);
      std::vector<A> loss(1, A(-1));
      kernel(
          QuantizationLoss<T>{parts_of(shape, input, codewords), {shape.num_rows, pieces}, sums.data(), loss.data()});
      return loss;
    };
    const auto expected = compute([](const QuantizationLoss<T>& args) {
      baseline::quantization_loss(args, 0, args.num_units());
      double sum = 0;
      for (int64_t unit = 0; unit < args.num_units(); ++unit) {
        sum += args.sums[unit];
      }
      *args.loss = args.mean(sum);
    });
    const auto actual = simt::same_in_every_order(
        [&] { return compute([](const QuantizationLoss<T>& args) { launch_quantization_loss(args); }); });
    CHECK(close(actual, expected, rounding<T>));
  }
}

TEMPLATE_TEST_CASE("quantization_gradient", "", KERNEL_TYPES) {
  using T = TestType;
  using A = accumulate_t<T>;
  for (const Shape& shape : shapes) {
    if (shape.num_rows == 0 || shape.subspace == 0) {
      continue;  // no gradient is computed there
    }
    for (const auto& [to_input, to_codewords, is_odd] : every_wanted) {
      CAPTURE(shape.name, to_input, to_codewords, is_odd);
      const auto input = rows_near<T>(shape, is_odd);
      const auto codewords = padded_codewords<A>(shape, whole_codewords(shape));
      const A grad = 3;
      const size_t of_input = to_input ? input.size() : 0, of_codewords = to_codewords ? codewords.size() : 0;
      const auto compute = [&](const auto& kernel) {
        std::vector<T> grad_input(of_input);
        std::vector<A> piece_gradients(num_pieces * of_codewords, A(-1)), grad_codewords(of_codewords, A(-1));
        kernel(QuantizationGradient<T>{parts_of(shape, input, codewords),
                                       {shape.num_rows, num_pieces},
                                       &grad,
                                       to_input ? grad_input.data() : nullptr,
                                       to_codewords ? piece_gradients.data() : nullptr,
                                       to_codewords ? grad_codewords.data() : nullptr});
        std::vector<A> both;
        for (const T number : grad_input) {
          both.push_back(device::widen(number));
        }
        both.insert(both.end(), grad_codewords.begin(), grad_codewords.end());
        return both;
      };
      const auto expected = compute([](const QuantizationGradient<T>& args) {
        baseline::quantization_gradient(args, 0, args.num_units());
        if (args.piece_gradients != nullptr) {
          baseline::sum_piece_gradients(args, 0, args.num_sums());
        }
      });
      const auto actual = simt::same_in_every_order(
          [&] { return compute([](const QuantizationGradient<T>& args) { launch_quantization_gradient(args); }); });
      const std::span both(actual), both_expected(expected);
      CHECK(close(both.first(of_input), both_expected.first(of_input), sizeof(T) == 2 ? 1e-2 : rounding<T>));
      CHECK(close(both.last(of_codewords), both_expected.last(of_codewords), rounding<T>));
    }
  }
}

}  // namespace torchops::kernels::sparse_attention
