// core/cpu/tile.h and what softmax on tiles takes for exp. Built twice: in plain C++, and with the instructions.

#include "core/cpu/tile.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "catch.h"
#include "core/cpu/short_exponential.h"

namespace {

using torchops::kernels::Tiles;

float value_of(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
uint16_t bfloat16_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}
bool same_bits(const std::vector<float>& one, const std::vector<float>& other) {
  return std::memcmp(one.data(), other.data(), one.size() * sizeof(float)) == 0;
}

// Rows that lie further apart than they are long.
struct Matrix {
  static constexpr int64_t stride = 40;
  std::vector<uint16_t> numbers = std::vector<uint16_t>(16 * stride);
  uint16_t& at(int row, int column) { return numbers[static_cast<size_t>(row * stride + column)]; }
};

// As the instruction adds up; products are exact, and no number is near the denormal ones.
std::vector<float> expected(std::vector<float> sums, Matrix& left, Matrix& right) {
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 16; ++column) {
      float parts[2] = {};
      for (int d = 0; d < 32; ++d) {
        const volatile float product = value_of(left.at(row, d)) * value_of(right.at(d / 2, 2 * column + d % 2));
        parts[d % 2] += product;
      }
      sums[static_cast<size_t>(16 * row + column)] += parts[0] + parts[1];
    }
  }
  return sums;
}

}  // namespace

TEST_CASE("tiles multiply as rows and columns of pairs, from 0 and from sums, with any stride") {
  std::mt19937 generator(0);
  std::normal_distribution<float> normal;
  Matrix left[2], right[2];
  for (auto* const matrix : {&left[0], &left[1], &right[0], &right[1]}) {
    for (auto& number : matrix->numbers) {
      number = bfloat16_of(normal(generator));
    }
  }
  std::vector<float> first(256), again(256), others(256);
  {
    Tiles tiles;
    tiles.zero<0>();
    tiles.zero<3>();
    tiles.load<4>(left[0].numbers.data(), 2 * Matrix::stride);
    tiles.load<5>(left[1].numbers.data(), 2 * Matrix::stride);
    tiles.load<6>(right[0].numbers.data(), 2 * Matrix::stride);
    tiles.load<7>(right[1].numbers.data(), 2 * Matrix::stride);
    tiles.multiply_add<0, 4, 6>();
    tiles.multiply_add<3, 5, 7>();
    tiles.store<0>(first.data(), 64);
    tiles.store<3>(others.data(), 64);
  }
  {
    Tiles tiles;
    tiles.load<2>(first.data(), 64);
    tiles.load<4>(left[1].numbers.data(), 2 * Matrix::stride);
    tiles.load<6>(right[1].numbers.data(), 2 * Matrix::stride);
    tiles.multiply_add<2, 4, 6>();
    tiles.store<2>(again.data(), 64);
  }
  const std::vector<float> zeros(256);
  CHECK(same_bits(first, expected(zeros, left[0], right[0])));
  CHECK(same_bits(others, expected(zeros, left[1], right[1])));
  CHECK(same_bits(again, expected(first, left[1], right[1])));
}

TEST_CASE("a store leaves what lies between rows") {
  std::vector<float> rows(16 * 20, 7);
  {
    Tiles tiles;
    tiles.zero<1>();
    tiles.store<1>(rows.data(), 80);
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    CHECK(rows[i] == (i % 20 < 16 ? 0 : 7));
  }
}

TEST_CASE("a NaN and an infinity stay in their row and column, and denormal numbers are zeros") {
  Matrix left, right;
  for (auto* const matrix : {&left, &right}) {
    for (auto& number : matrix->numbers) {
      number = bfloat16_of(1);
    }
  }
  left.at(2, 31) = bfloat16_of(NAN);
  right.at(5, 2 * 9) = bfloat16_of(INFINITY);
  for (int d = 0; d < 32; ++d) {
    left.at(4, d) = 1;  // the smallest denormal number
  }
  std::vector<float> sums(256, 0x1p-149F);
  {
    Tiles tiles;
    tiles.load<0>(sums.data(), 64);
    tiles.load<1>(left.numbers.data(), 2 * Matrix::stride);
    tiles.load<2>(right.numbers.data(), 2 * Matrix::stride);
    tiles.multiply_add<0, 1, 2>();
    tiles.store<0>(sums.data(), 64);
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 16; ++column) {
      const float sum = sums[static_cast<size_t>(16 * row + column)];
      CAPTURE(row, column, sum);
      if (row == 2 || (row == 4 && column == 9)) {
        CHECK(std::isnan(sum));
      } else if (column == 9) {
        CHECK(std::isinf(sum));
      } else {
        CHECK(sum == (row == 4 ? 0 : 32));
      }
    }
  }
}

TEST_CASE("the short exponential is 2 to the power, exactly 1 for 0, and 0 where that is no normal number") {
  const auto exp2 = [](float power) {
    using namespace torchops::kernels;
    return exp2_of_negative(broadcast(power))[3];
  };
  CHECK(exp2(0) == 1);
  CHECK(exp2(-0.0F) == 1);
  CHECK(exp2(-126) == 0x1p-126F);
  for (const float power : {-126.00001F, -140.0F, -1e5F, -3e38F, -INFINITY}) {
    CHECK(exp2(power) == 0);
  }
  CHECK(std::isnan(exp2(NAN)));
  for (int step = 1; step <= 126 * 64; ++step) {
    const float power = static_cast<float>(-step) / 64 + 0x1p-20F;
    const double error = exp2(power) / std::exp2(static_cast<double>(power)) - 1;
    CAPTURE(power, error);
    REQUIRE(std::abs(error) < 4e-6);
  }
}
