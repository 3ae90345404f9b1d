// The CUDA kernels that select by product quantization on the host, next to the CPU kernels of the lowest level.

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "catch.h"
#include "numbers.h"
#include "orders.h"
#include "sparse_attention/cpu/nearest_codeword_kernel.h"
#include "sparse_attention/cuda/launches.cuh"

// A race does not depend on the type, and ThreadSanitizer takes its time for every fiber.
#if defined(SIMT_THREAD_SANITIZER) || defined(SIMT_MUTATION)
#define KERNEL_TYPES float
#else
#define KERNEL_TYPES double, float, bfloat16, float16
#endif

namespace torchops::kernels::sparse_attention {
namespace {

struct Shape {
  std::string name;
  int64_t num_rows, num_subspaces, subspace, num_codewords;
};
const std::vector<Shape> shapes = {
    {"several groups of codewords", 130, 3, 5, 48},
    {"codes of 16", 7, 8, 8, 16},
    {"a channel a subspace", 300, 2, 1, 256},
    {"no rows", 0, 2, 3, 16},
    {"no channels", 5, 2, 0, 16},
};

}  // namespace

TEMPLATE_TEST_CASE("nearest_codeword", "", KERNEL_TYPES) {
  using T = TestType;
  using A = accumulate_t<T>;
  for (const auto& [name, num_rows, num_subspaces, subspace, num_codewords] : shapes) {
    CAPTURE(name);
    // Whole numbers, so that many codewords are as near as the nearest.
    const auto input =
        simt::narrowed<T>(simt::whole_numbers(static_cast<size_t>(num_rows * num_subspaces * subspace), 1));
    const auto numbers = simt::whole_numbers(static_cast<size_t>(num_subspaces * subspace * num_codewords), 2);
    std::vector<A> codewords(numbers.begin(), numbers.end());
    if (!codewords.empty()) {
      codewords[0] = std::numeric_limits<A>::quiet_NaN();
      codewords.back() = std::numeric_limits<A>::infinity();
    }
    const auto encode = [&](const auto& kernel) {
      std::vector<uint8_t> codes(static_cast<size_t>(num_rows * num_subspaces), 255);
      kernel(NearestCodeword<T>{input.data(), codewords.data(), codes.data(), num_rows, num_subspaces, subspace,
                                num_codewords});
      return codes;
    };
    const auto expected =
        encode([&](const NearestCodeword<T>& args) { baseline::nearest_codeword(args, 0, num_rows); });
    REQUIRE(simt::same_in_every_order([&] {
              return encode([](const NearestCodeword<T>& args) { launch_nearest_codeword(args); });
            }) == expected);
  }
}

}  // namespace torchops::kernels::sparse_attention
