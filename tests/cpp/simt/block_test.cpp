// Barriers, shared memory, asynchronous copies, atomic operations and launches of device.cuh and launch.h.

#include <numeric>
#include <vector>

#include "catch.h"
#include "core/cuda/launch.h"
#include "orders.h"
#include "samples/wrappers.cuh"

using namespace torchops;
using namespace torchops::kernels::samples;
using Catch::Matchers::Contains;

namespace {

template <int bytes, int groups, int pending>
void check_copies() {
  constexpr int threads = 32;
  std::vector<unsigned char> input(threads * groups * 2 * bytes);
  for (size_t i = 0; i < input.size(); ++i) {
    input[i] = static_cast<unsigned char>(i % 251);
  }
  // The engine shows memory that no copy has reached yet as all ones; 255 is not in the input.
  bool some_copy_was_late = false;
  for (uint32_t seed = 0; seed < 8; ++seed) {
    simt::use_schedule({simt::Order::random, seed});
    std::vector<unsigned char> output(input.size());
    device::launch({1, threads, device::shared_size<char>(input.size())}, copies<bytes, groups, pending>, input.data(),
                   output.data());
    for (size_t i = 0; i < input.size(); ++i) {
      const auto copied = static_cast<unsigned char>(i / bytes % 2 == 0 ? input[i] : 0);
      const bool waited_for = i / (2 * bytes) % groups < groups - pending;
      const bool late = output[i] == 0xff;
      REQUIRE((output[i] == copied || (late && !waited_for)));
      some_copy_was_late |= late;
    }
  }
  simt::use_schedule({});
  CHECK(some_copy_was_late == (pending > 0));
}

__global__ void uncommitted_copy(const float* input, float* output) {
  device::SharedMemory shared;
  auto* copied = shared.take<float>(32);
  device::copy_async<4>(copied + threadIdx.x, input + threadIdx.x);
  device::copy_async_wait<0>();
  output[threadIdx.x] = copied[threadIdx.x];
}

__global__ void copy_from(const char* input) {
  device::SharedMemory shared;
  device::copy_async<16>(shared.take<char>(32), input + 4);
}

__global__ void copy_to(const char* input, char* output) {
  device::copy_async<16>(output, input);
}

__global__ void take_more_than_there_is() {
  device::SharedMemory shared;
  shared.take<float>(32);
  shared.take<float>(1);
}

__global__ void take_different_sizes() {
  device::SharedMemory shared;
  shared.take<float>(threadIdx.x + 1);
}

__global__ void read_uninitialized(float* output) {
  device::SharedMemory shared;
  output[threadIdx.x] = shared.take<float>(32)[threadIdx.x];
}

__global__ void different_barriers() {
  if (threadIdx.x < 32) {
    device::syncthreads();
  } else {
    device::syncthreads();
  }
}

__global__ void indices(int* output)  // [blocks, threads, 6]
{
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  int* own = output + (block * blockDim.x * blockDim.y * blockDim.z + thread) * 6;
  for (const unsigned index : {blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z}) {
    *own++ += static_cast<int>(index) + 1;
  }
}

template <typename T>
void check_atomics() {
  const auto state = simt::same_in_every_order([] {
    std::vector<T> out = {0, 1000, 0, 0, 0, 7};
    device::launch({3, 64}, atomics<T>, out.data());
    return out;
  });
  CHECK(state == std::vector<T>{191 * 192 / 2, 0, 191, 0x7fffffff, 1, 8});
}

}  // namespace

TEST_CASE("barriers count, and, or") {
  for (const int how_many : {0, 1, 63, 64}) {
    std::vector<int> input(64);
    std::fill_n(input.begin(), how_many, 1);
    const auto output = simt::same_in_every_order([&] {
      std::vector<int> out(3 * 64);
      device::launch({1, 64}, block_votes, input.data(), out.data());
      return out;
    });
    for (int thread = 0; thread < 64; ++thread) {
      CHECK(output[thread] == how_many);
      CHECK(output[64 + thread] == (how_many == 64));
      CHECK(output[128 + thread] == (how_many > 0));
    }
  }
}

TEST_CASE("barriers order accesses to shared memory") {
  std::vector<int> input(192);
  std::iota(input.begin(), input.end(), 0);
  const auto output = simt::same_in_every_order([&] {
    std::vector<int> out(192);
    const size_t shared_bytes = device::shared_size<int>(48) + device::shared_size<int>(144);
    device::launch({1, dim3(48, 4), shared_bytes}, pass_on, input.data(), out.data(), 5);
    return out;
  });
  for (int thread = 0; thread < 192; ++thread) {
    CHECK(output[thread] == (thread + 192 - 5) % 192);
  }
}

TEST_CASE("different barriers are reported with both lines") {
  CHECK_THROWS_WITH(device::launch({1, 64}, different_barriers),
                    Contains("divergence") && Contains("syncthreads") && Contains("at block_test.cpp:"));
}

TEST_CASE("assertions stop a debug build, with their line") {
  std::vector<int> input(64, 1);
  device::launch({1, 64}, assert_that_all_hold, input.data());
  input[40] = 0;
  CHECK_THROWS_WITH(
      device::launch({1, 64}, assert_that_all_hold, input.data()),
      Contains("wrappers.cuh:") && Contains("assertion: every number is other than 0 (block [0, 0, 0], thread 40)"));
  const simt::ReleaseBuild release_build;
  device::launch({1, 64}, assert_that_all_hold, input.data());
}

TEST_CASE("shared memory is NaN at first, and limited to what the launch asks for") {
  std::vector<float> output(32);
  device::launch({1, 32, 128}, read_uninitialized, output.data());
  for (const float value : output) {
    CHECK(std::isnan(value));
  }
  CHECK_THROWS_WITH(device::launch({1, 32, 128}, take_more_than_there_is),
                    Contains("takes 144 bytes of shared memory, the launch has 128"));
  CHECK_THROWS_WITH(device::launch({1, 32, 128}, take_different_sizes), Contains("threads disagree on shared array 0"));
}

TEST_CASE("asynchronous copies are there after their wait, and not before by rule") {
  check_copies<4, 3, 0>();
  check_copies<8, 3, 1>();
  check_copies<16, 3, 2>();
}

TEST_CASE("a wait does not wait for a copy without a group") {
  const std::vector<float> input(32, 1.0F);
  std::vector<float> output(32);
  device::launch({1, 32, 128}, uncommitted_copy, input.data(), output.data());
  CHECK(std::any_of(output.begin(), output.end(), [](float value) { return std::isnan(value); }));
}

TEST_CASE("asynchronous copies go to shared memory and keep their alignment") {
  alignas(16) char memory[64] = {};
  CHECK_THROWS_WITH(device::launch({1, 32, 32}, copy_from, memory), Contains("not a multiple of 16"));
  CHECK_THROWS_WITH(device::launch({1, 32, 32}, copy_to, memory, memory + 32), Contains("not in shared memory"));
}

TEST_CASE("atomic operations") {
  check_atomics<int32_t>();
  check_atomics<uint32_t>();
  check_atomics<uint64_t>();
}

TEST_CASE("every block and thread runs once, with its own indices") {
  const auto output = simt::same_in_every_order([] {
    std::vector<int> out(24 * 64 * 6);
    device::launch({{2, 3, 4}, dim3(8, 4, 2)}, indices, out.data());
    return out;
  });
  const int* own = output.data();
  for (int block = 0; block < 24; ++block) {
    for (int thread = 0; thread < 64; ++thread, own += 6) {
      REQUIRE(std::vector<int>(own, own + 6) == std::vector<int>{block % 2 + 1, block / 2 % 3 + 1, block / 6 + 1,
                                                                 thread % 8 + 1, thread / 8 % 4 + 1, thread / 32 + 1});
    }
  }
}

TEST_CASE("a launch checks its shape") {
  int* nothing = nullptr;
  device::launch({0, 32}, indices, nothing);
  device::launch({{5, 0}, 32}, indices, nothing);
  CHECK_THROWS_WITH(
      device::launch({int64_t{1} << 31, 32}, indices, nothing),
      "block_test.cpp: expected a grid of at most [2147483647, 65535, 65535] blocks, got [2147483648, 1, 1]");
  CHECK_THROWS_WITH(device::launch({{1, 65536}, 32}, indices, nothing), Contains("got [1, 65536, 1]"));
  CHECK(device::Grid(-1).error("csrc/tokens/cuda/launches.cu").rfind("tokens: expected a grid", 0) == 0);
  CHECK(device::Grid(-1).error("merge_tokens").rfind("merge_tokens: expected a grid", 0) == 0);
  CHECK_THROWS_WITH(device::launch({1, 48}, indices, nothing), Contains("multiple of 32 threads"));
}
