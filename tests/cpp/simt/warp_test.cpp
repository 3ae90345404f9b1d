// Shuffles and votes of device.cuh.

#include <cmath>
#include <numeric>
#include <vector>

#include "catch.h"
#include "core/cuda/launch.h"
#include "orders.h"
#include "samples/wrappers.cuh"

using namespace torchops;
using namespace torchops::kernels::samples;

namespace {

// The lane whose value a lane gets, as the CUDA programming guide says.
enum class Shuffle { lane, up, down, bits };
int source(Shuffle kind, int lane, int argument, int width) {
  const int first = lane / width * width;
  switch (kind) {
    case Shuffle::lane:
      return first + argument % width;
    case Shuffle::up:
      return lane - argument >= first ? lane - argument : lane;
    case Shuffle::down:
      return lane + argument < first + width ? lane + argument : lane;
    default:
      return (lane ^ argument) < first + width ? lane ^ argument : lane;
  }
}

template <typename T>
void check_shuffles() {
  std::vector<T> input(32);
  for (int lane = 0; lane < 32; ++lane) {
    // Different bits in both halves of 8 bytes.
    input[lane] = static_cast<T>(lane * 1000003) * static_cast<T>(sizeof(T) == 8 ? 1000003 : 1) + 1;
  }
  std::vector<int> arguments(32 * 32);
  for (int i = 0; i < 32 * 32; ++i) {
    arguments[i] = i / 32;
  }
  for (const int width : {32, 16, 8, 2}) {
    const auto output = simt::same_in_every_order([&] {
      std::vector<T> out(32 * 4 * 32);
      device::launch({1, 32}, shuffles<T>, input.data(), arguments.data(), out.data(), 32, width);
      return out;
    });
    for (int i = 0; i < 32 * 4 * 32; ++i) {
      const int argument = i / 128;
      const auto kind = static_cast<Shuffle>(i / 32 % 4);
      const int lane = i % 32;
      INFO("kind " << i / 32 % 4 << ", lane " << lane << ", argument " << argument << ", width " << width);
      REQUIRE(output[i] == input[source(kind, lane, argument, width)]);
    }
  }
}

__global__ void read_outside_of_mask(float* output) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < 16) {
    output[lane] = device::shuffle(1.0F, lane + 8, 32, 0x0000ffff);
  }
}

__global__ void leave_out_the_caller() {
  device::syncwarp(0xfffffffe);
}

__global__ void different_masks() {
  device::syncwarp(threadIdx.x == 0 ? 0x00000003 : 0xffffffff);
}

__global__ void one_half_only(int half) {
  if (static_cast<int>(threadIdx.x) / 16 == half) {
    device::any(true);
  }
}

}  // namespace

TEMPLATE_TEST_CASE("shuffles of every kind", "", int32_t, uint32_t, float, double, int64_t, uint64_t) {
  check_shuffles<TestType>();
}

TEST_CASE("lanes may shuffle with arguments of their own") {
  std::vector<float> input(32);
  std::iota(input.begin(), input.end(), 0.0F);
  std::vector<int> reversed(32);
  std::iota(reversed.rbegin(), reversed.rend(), 0);
  std::vector<float> output(4 * 32);
  device::launch({1, 32}, shuffles<float>, input.data(), reversed.data(), output.data(), 1, 32);
  for (int lane = 0; lane < 32; ++lane) {
    CHECK(output[lane] == static_cast<float>(31 - lane));
  }
}

TEST_CASE("a shuffle from a lane that does not take part gives NaN") {
  std::vector<float> output(16);
  device::launch({1, 32}, read_outside_of_mask, output.data());
  for (int lane = 0; lane < 16; ++lane) {
    CHECK(std::isnan(output[lane]) == (lane + 8 >= 16));
  }
}

TEST_CASE("votes") {
  for (const uint32_t pattern : {0U, 1U, 0x80000000U, 0x0f0f0f0fU, 0xfffffffeU, 0xffffffffU}) {
    std::vector<int> input(32);
    for (int lane = 0; lane < 32; ++lane) {
      input[lane] = pattern >> lane & 1;
    }
    const auto output = simt::same_in_every_order([&] {
      std::vector<uint32_t> out(3 * 32);
      device::launch({1, 32}, votes, input.data(), out.data());
      return out;
    });
    for (int lane = 0; lane < 32; ++lane) {
      CHECK(output[lane] == pattern);
      CHECK(output[32 + lane] == (pattern != 0));
      CHECK(output[64 + lane] == (pattern == 0xffffffff));
    }
  }
}

TEST_CASE("groups of lanes vote and shuffle by themselves") {
  const std::vector<int> steps = {3, 0, 8, 1};
  const auto output = simt::same_in_every_order([&] {
    std::vector<uint32_t> out(32);
    device::launch({1, 32}, masked_votes, steps.data(), out.data());
    return out;
  });
  for (int lane = 0; lane < 32; ++lane) {
    uint32_t sum = 0;
    for (int step = 0; step < steps[lane / 8]; ++step) {
      sum += (2U << step) - 1;
    }
    CHECK(output[lane] == 2 * sum);
  }
}

TEST_CASE("lanes that do not meet are reported") {
  CHECK_THROWS_WITH(device::launch({1, 32}, leave_out_the_caller),
                    Catch::Matchers::Contains("warp_test.cpp") && Catch::Matchers::Contains("leaves out"));
  CHECK_THROWS_WITH(device::launch({1, 32}, different_masks), Catch::Matchers::Contains("masks ffffffff and 00000003"));
  CHECK_THROWS_WITH(device::launch({1, 32}, one_half_only, 1),
                    Catch::Matchers::Contains("threads 0-15 returned, threads 16-31 in any at warp_test.cpp"));
}
