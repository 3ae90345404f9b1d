// Conversions and arithmetic of device.cuh.

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "catch.h"
#include "core/cuda/launch.h"
#include "format16.h"
#include "orders.h"
#include "samples/wrappers.cuh"

using namespace torchops;
using namespace torchops::kernels::samples;
using kernels::bfloat16;
using kernels::float16;

namespace {

template <typename T>
std::vector<float> widened(const std::vector<T>& input) {
  std::vector<float> output(input.size());
  device::launch({1, 64}, widen_all<T>, input.data(), output.data(), static_cast<int>(input.size()));
  return output;
}

template <typename T>
std::vector<T> narrowed(const std::vector<float>& input) {
  std::vector<T> output(input.size());
  device::launch({1, 64}, narrow_all<T>, input.data(), output.data(), static_cast<int>(input.size()));
  return output;
}

template <typename T>
void check_all_bit_patterns(const Format16& format) {
  std::vector<T> patterns(65536);
  for (size_t i = 0; i < patterns.size(); ++i) {
    patterns[i].bits = static_cast<uint16_t>(i);
  }
  const auto wide = widened(patterns);
  const auto back = narrowed<T>(wide);
  // Between each number and the next one away from zero: below, at and above the middle.
  std::vector<float> between(3 * patterns.size());
  for (size_t i = 0; i < patterns.size(); ++i) {
    const double next = format.meaning(static_cast<uint16_t>(i + 1));
    const auto middle = static_cast<float>((static_cast<double>(wide[i]) + next) / 2);
    between[3 * i] = std::nextafterf(middle, wide[i]);
    between[3 * i + 1] = middle;
    between[3 * i + 2] = std::nextafterf(middle, static_cast<float>(next));
  }
  const auto rounded = narrowed<T>(between);
  for (size_t i = 0; i < patterns.size(); ++i) {
    const auto bits = static_cast<uint16_t>(i);
    const double expected = format.meaning(bits);
    INFO("bits " << bits);
    if (std::isnan(expected)) {
      REQUIRE(std::isnan(wide[i]));
      REQUIRE(back[i].bits == 0x7fff);
      continue;
    }
    REQUIRE(std::bit_cast<uint32_t>(wide[i]) == std::bit_cast<uint32_t>(static_cast<float>(expected)));
    REQUIRE(back[i].bits == bits);
    if (std::isfinite(expected) && std::isfinite(format.meaning(static_cast<uint16_t>(bits + 1)))) {
      REQUIRE(rounded[3 * i].bits == bits);
      REQUIRE(rounded[3 * i + 1].bits == bits + bits % 2);
      REQUIRE(rounded[3 * i + 2].bits == bits + 1);
    }
  }
}

}  // namespace

TEST_CASE("bfloat16 converts on the device in every bit pattern and rounds to nearest even") {
  check_all_bit_patterns<bfloat16>(bfloat16_format);
}

TEST_CASE("float16 converts on the device in every bit pattern and rounds to nearest even") {
  check_all_bit_patterns<float16>(float16_format);
}

TEST_CASE("conversion to float16 overflows from 65520 on, and to bfloat16 near the largest float") {
  const auto half = narrowed<float16>({65519.99F, 65520.0F, -1e30F, 1e-30F, -1e-30F});
  const uint16_t expected[] = {0x7bff, 0x7c00, 0xfc00, 0x0000, 0x8000};
  for (size_t i = 0; i < half.size(); ++i) {
    CHECK(half[i].bits == expected[i]);
  }
  CHECK(narrowed<bfloat16>({std::numeric_limits<float>::max()})[0].bits == 0x7f80);
}

TEST_CASE("float and double are their own wide types") {
  const std::vector<double> input = {1.0 / 3, -0.0};
  std::vector<double> wide(2);
  std::vector<double> back(2);
  device::launch({1, 32}, widen_all<double>, input.data(), wide.data(), 2);
  device::launch({1, 32}, narrow_all<double>, wide.data(), back.data(), 2);
  CHECK(back == input);
  const std::vector<float> numbers = {1.0F / 3, -0.0F};
  CHECK(narrowed<float>(widened(numbers)) == numbers);
}

TEMPLATE_TEST_CASE("pack puts the first number into the low half", "", bfloat16, float16) {
  const std::vector<float> input = {1, -2, 0.5F, 3};
  std::vector<uint32_t> output(2);
  std::vector<float2> sorted(2);
  device::launch({1, 32}, pack_all<TestType>, input.data(), output.data(), sorted.data(), 2);
  constexpr bool is_bfloat16 = std::is_same_v<TestType, bfloat16>;
  CHECK(output ==
        (is_bfloat16 ? std::vector<uint32_t>{0xc0003f80, 0x40403f00} : std::vector<uint32_t>{0xc0003c00, 0x42003800}));
  CHECK((sorted[0].x == -2 && sorted[0].y == 1));
  CHECK((sorted[1].x == 0.5F && sorted[1].y == 3));
}

TEST_CASE("fast functions") {
  std::vector<float> input(32);
  for (int i = 0; i < 32; ++i) {
    input[i] = static_cast<float>(i + 1) * 0.37F;
  }
  std::vector<float> output(4 * 32);
  device::launch({1, 32}, functions, input.data(), output.data());
  for (int i = 0; i < 32; ++i) {
    CHECK(output[i] == Approx(std::exp2(input[i])).epsilon(1e-6));
    CHECK(output[32 + i] == Approx(std::log2(input[i])).epsilon(1e-6).margin(1e-6));
    CHECK(output[64 + i] == Approx(3 / input[i]).epsilon(1e-6));
    CHECK(output[96 + i] == Approx(1 / std::sqrt(input[i])).epsilon(1e-6));
  }
  std::fill(input.begin(), input.end(), -INFINITY);
  input[1] = -140;
  device::launch({1, 32}, functions, input.data(), output.data());
  CHECK(output[0] == 0);
  CHECK(output[1] == 0);
}

TEST_CASE("the fast functions of doubles are exact ones") {
  const std::vector<double> input(32, 2.7182818284590452);
  std::vector<double> output(2 * 32);
  device::launch({1, 32}, functions_of_doubles, input.data(), output.data());
  CHECK(output[0] == Approx(6.5808859910179210).epsilon(1e-15));
  CHECK(output[32] == Approx(1.4426950408889634).epsilon(1e-15));
}

TEST_CASE("bits are counted and found") {
  std::vector<uint32_t> input(32, 0);
  input[1] = 1;
  input[2] = 0x80000000;
  input[3] = 0x00f00000;
  input[4] = 0xffffffff;
  std::vector<int> output(3 * 32);
  device::launch({1, 32}, bits, input.data(), output.data());
  const int expected[3][5] = {{0, 1, 1, 4, 32}, {0, 1, 32, 21, 1}, {32, 31, 0, 8, 0}};
  for (int operation = 0; operation < 3; ++operation) {
    for (int i = 0; i < 5; ++i) {
      CHECK(output[operation * 32 + i] == expected[operation][i]);
    }
  }
}
