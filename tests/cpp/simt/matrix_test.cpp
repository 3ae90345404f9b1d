// ldmatrix and mma of device.cuh, against plain indexing and a plain matrix product.

#include <vector>

#include "catch.h"
#include "core/cuda/launch.h"
#include "numbers.h"
#include "orders.h"
#include "samples/wrappers.cuh"

using namespace torchops;
using namespace torchops::kernels::samples;

namespace {

// c + a b for a [16, depth], b [depth, 8].
std::vector<float> product(const std::vector<float>& a, const std::vector<float>& b, std::vector<float> c, int depth) {
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      for (int k = 0; k < depth; ++k) {
        c[row * 8 + column] += a[row * depth + k] * b[k * 8 + column];
      }
    }
  }
  return c;
}

template <typename T>
void check_multiply() {
  const auto a = simt::whole_numbers(16 * 16, 1);
  const auto b = simt::whole_numbers(16 * 8, 2);
  const auto c = simt::whole_numbers(16 * 8, 3);
  const auto a_narrow = simt::narrowed<T>(a);
  const auto b_narrow = simt::narrowed<T>(b);
  const auto actual = simt::same_in_every_order([&] {
    auto out = c;
    device::launch({1, 32}, multiply<T>, a_narrow.data(), b_narrow.data(), out.data());
    return out;
  });
  CHECK(actual == product(a, b, c, 16));
}

std::vector<float> run_multiply_tf32(const std::vector<float>& a, const std::vector<float>& b,
                                     const std::vector<float>& c) {
  return simt::same_in_every_order([&] {
    auto out = c;
    device::launch({1, 32}, multiply_tf32, a.data(), b.data(), out.data());
    return out;
  });
}

__global__ void load_from(const char* row) {
  uint32_t fragment[4];
  device::ldmatrix(fragment, row);
}

}  // namespace

TEST_CASE("mma_m16n8k16 of bfloat16 is a matrix product") {
  check_multiply<kernels::bfloat16>();
}

TEST_CASE("mma_m16n8k16 of float16 is a matrix product") {
  check_multiply<kernels::float16>();
}

TEST_CASE("mma_m16n8k8_tf32 is a matrix product of rounded numbers") {
  const auto a = simt::whole_numbers(16 * 8, 4);
  const auto b = simt::whole_numbers(8 * 8, 5);
  const auto c = simt::whole_numbers(16 * 8, 6);
  CHECK(run_multiply_tf32(a, b, c) == product(a, b, c, 8));

  // 10 bits of fraction; ties away from zero.
  std::vector<float> fine(16 * 8);
  fine[0] = 1 + 0x1p-10F;
  fine[8] = 1 + 0x1p-11F;
  fine[16] = -(1 + 0x1p-11F);
  fine[24] = 1 + 0x1p-12F;
  std::vector<float> one(8 * 8);
  one[0] = 1;
  const auto rounded = run_multiply_tf32(fine, one, std::vector<float>(16 * 8));
  CHECK(rounded[0] == 1 + 0x1p-10F);
  CHECK(rounded[8] == 1 + 0x1p-10F);
  CHECK(rounded[16] == -(1 + 0x1p-10F));
  CHECK(rounded[24] == 1);
}

TEST_CASE("ldmatrix gives each lane its elements") {
  std::vector<uint16_t> input(256);
  for (size_t i = 0; i < input.size(); ++i) {
    input[i] = static_cast<uint16_t>(i * 259);
  }
  const auto output = simt::same_in_every_order([&] {
    std::vector<uint32_t> out(12 * 32);
    device::launch({1, 32, 512}, fragments, input.data(), out.data());
    return out;
  });
  for (int slot = 0; slot < 12; ++slot) {
    const int matrix = slot < 8 ? slot % 4 : slot % 2;
    const bool transposed = slot < 8 ? slot >= 4 : slot >= 10;
    for (int lane = 0; lane < 32; ++lane) {
      const auto element = [&](int column) {
        const int row = lane / 4;
        return input[matrix * 64 + (transposed ? column * 8 + row : row * 8 + column)];
      };
      const int column = lane % 4 * 2;
      INFO("slot " << slot << ", lane " << lane);
      REQUIRE(output[slot * 32 + lane] == (element(column) | static_cast<uint32_t>(element(column + 1)) << 16));
    }
  }
}

TEST_CASE("ldmatrix reads shared memory only") {
  alignas(16) const char memory[16] = {};
  CHECK_THROWS_WITH(device::launch({1, 32}, load_from, memory), Catch::Matchers::Contains("not in shared memory"));
}
