// The vectors of csrc/core/cpu at the level this file is compiled for.

#include "core/cpu/simd.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "catch.h"
#include "core/cpu/exponential.h"
#include "core/cpu/matrix_product.h"
#include "format16.h"

using namespace torchops::kernels;

namespace {

template <typename T>
float widened(uint16_t bits) {
  T in[lanes<T>] = {};
  in[lanes<T> - 1].bits = bits;
  return load(in)[lanes<T> - 1];
}

template <typename T>
uint16_t narrowed(float value) {
  T out[lanes<T>];
  store(out, broadcast(value));
  return out[0].bits;
}

template <typename T>
void check_all_bit_patterns(const Format16& format) {
  for (uint32_t pattern = 0; pattern < 65536; ++pattern) {
    const auto bits = static_cast<uint16_t>(pattern);
    const double expected = format.meaning(bits);
    const float wide = widened<T>(bits);
    INFO("bits " << bits);
    if (std::isnan(expected)) {
      REQUIRE(std::isnan(wide));
      REQUIRE(std::isnan(widened<T>(narrowed<T>(wide))));
      continue;
    }
    REQUIRE(std::bit_cast<uint32_t>(wide) == std::bit_cast<uint32_t>(static_cast<float>(expected)));
    REQUIRE(narrowed<T>(wide) == bits);
    // Between this number and the next one upwards: below, at and above the middle.
    const double next = format.meaning(static_cast<uint16_t>(bits + 1));
    if (std::isfinite(expected) && std::isfinite(next) && std::signbit(expected) == std::signbit(next)) {
      const auto middle = static_cast<float>((expected + next) / 2);
      const auto even = static_cast<uint16_t>(bits & 1 ? bits + 1 : bits);
      REQUIRE(narrowed<T>(middle) == even);
      REQUIRE(narrowed<T>(std::nextafterf(middle, wide)) == bits);
      REQUIRE(narrowed<T>(std::nextafterf(middle, static_cast<float>(next))) == bits + 1);
    }
  }
}

}  // namespace

TEST_CASE("bfloat16 converts in every bit pattern and rounds to nearest even") {
  check_all_bit_patterns<bfloat16>(bfloat16_format);
}

TEST_CASE("float16 converts in every bit pattern and rounds to nearest even") {
  check_all_bit_patterns<float16>(float16_format);
}

TEST_CASE("float16 overflows to infinity from 65520 on") {
  CHECK(narrowed<float16>(65519.99F) == 0x7bff);
  CHECK(narrowed<float16>(65520.0F) == 0x7c00);
  CHECK(narrowed<float16>(-1e30F) == 0xfc00);
  CHECK(narrowed<float16>(1e-30F) == 0x0000);
  CHECK(narrowed<float16>(-1e-30F) == 0x8000);
}

TEST_CASE("broadcast keeps a negative zero") {
  CHECK(std::signbit(broadcast(-0.0F)[0]));
}

TEST_CASE("partial loads and stores touch the counted lanes only") {
  for (int count = 1; count <= lanes<float>; ++count) {
    // Exactly as long as allowed, so that a sanitizer sees one element too many.
    std::vector<float> from(static_cast<size_t>(count), 3.0F);
    std::vector<float> to(static_cast<size_t>(count), 0.0F);
    const vfloat value = load_partial(from.data(), count);
    for (int lane = 0; lane < lanes<float>; ++lane) {
      CHECK(value[lane] == (lane < count ? 3.0F : 0.0F));
    }
    store_partial(to.data(), value, count);
    CHECK(to == from);
  }
}

TEST_CASE("for_each_vector covers a row once, in order") {
  for (int64_t size = 0; size <= 3 * lanes<double> + 1; ++size) {
    int64_t next = 0;
    for_each_vector<double>(size, [&](int64_t first, int count) {
      REQUIRE(first == next);
      REQUIRE(count == std::min<int64_t>(lanes<double>, size - first));
      next += count;
    });
    REQUIRE(next == size);
  }
}

TEST_CASE("sum_lanes adds every lane once") {
  vfloat value;
  for (int lane = 0; lane < lanes<float>; ++lane) {
    value[lane] = static_cast<float>(1 << lane);
  }
  CHECK(sum_lanes<float>(value) == static_cast<float>((1 << lanes<float>)-1));
}

TEST_CASE("sums_of_lanes adds the lanes of every vector by themselves") {
  vfloat rows[lanes<float>];
  for (int row = 0; row < lanes<float>; ++row) {
    for (int lane = 0; lane < lanes<float>; ++lane) {
      rows[row][lane] = static_cast<float>((row + 1) << lane);
    }
  }
  const vfloat sums = sums_of_lanes(rows);
  for (int row = 0; row < lanes<float>; ++row) {
    CHECK(sums[row] == static_cast<float>((row + 1) * ((1 << lanes<float>)-1)));
  }
}

TEST_CASE("largest_lane and smallest_lane find every lane") {
  for (int lane = 0; lane < lanes<float>; ++lane) {
    vfloat value = {};
    value[lane] = 3;
    CHECK(largest_lane<float>(value) == 3);
    CHECK(smallest_lane<float>(-value) == -3);
  }
}

TEST_CASE("matrix_product is the product of matrices, wherever their elements lie") {
  constexpr int64_t depth = 37;
  constexpr int64_t rows = 2 * tile_rows;
  constexpr int64_t most_vectors = 2 * tile_vectors + 1;
  constexpr int64_t columns = most_vectors * lanes<float>;
  // Small integers: every order of summation gives the same float.
  std::vector<float> a(rows * depth), b(depth * columns);
  for (size_t i = 0; i < a.size(); ++i) {
    a[i] = static_cast<float>(static_cast<int>(i * 7 % 13) - 6);
  }
  for (size_t i = 0; i < b.size(); ++i) {
    b[i] = static_cast<float>(static_cast<int>(i * 5 % 11) - 5);
  }
  const bool transposed = GENERATE(false, true);
  const Operand<float> left{a.data(), transposed ? 1 : depth, transposed ? rows : 1};
  for (int64_t vectors = 1; vectors <= most_vectors; ++vectors) {
    std::vector<float> product(rows * columns, 0.5F);
    matrix_product(rows, vectors, depth, left, b.data(), columns, [&](int64_t row, int64_t vector, auto& sums) {
      for (const vfloat& sum : sums) {
        store(product.data() + row * columns + vector++ * lanes<float>, sum);
      }
    });
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        float expected = column < vectors * lanes<float> ? 0 : 0.5F;
        for (int64_t d = 0; d < depth && column < vectors * lanes<float>; ++d) {
          expected += left.data[row * left.stride + d * left.step] * b[d * columns + column];
        }
        CHECK(product[row * columns + column] == expected);
      }
    }
  }
}

TEST_CASE("exp is e to the power") {
  CHECK(exp_of(0.0F) == 1);
  CHECK(exp_of(-0.0F) == 1);
  CHECK(exp_of(-INFINITY) == 0);
  CHECK(exp_of(-3e38F) == 0);
  CHECK(exp_of(-88.0F) == 0);
  CHECK(std::isnan(exp_of(NAN)));
  for (float x = -87.3F; x <= 88; x += 0.0173F) {
    const double expected = std::exp(static_cast<double>(x));
    CHECK(std::abs(exp_of(x) / expected - 1) < 3e-7 + 1e-7 * std::abs(x));
  }
}
