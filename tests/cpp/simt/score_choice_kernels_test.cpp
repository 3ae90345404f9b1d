// The CUDA kernel that chooses keys by scores on the host, next to the CPU kernels of the lowest level.

#include <limits>
#include <string>
#include <vector>

#include "catch.h"
#include "core/cpu/aligned_buffer.h"
#include "core/cuda/launch.h"
#include "numbers.h"
#include "orders.h"
#include "sparse_attention/cpu/score_choice_kernel.h"
#include "sparse_attention/cuda/choose_by_scores.cuh"

// A race does not depend on the type, and ThreadSanitizer takes its time for every fiber.
#if defined(SIMT_THREAD_SANITIZER) || defined(SIMT_MUTATION)
#define KERNEL_TYPES float
#else
#define KERNEL_TYPES double, float, bfloat16, float16
#endif

namespace torchops::kernels::sparse_attention {
namespace {

struct ChoiceShape {
  std::string name;
  Sizes sizes;
  int64_t num_chosen, block_size, query_block;
  bool is_causal, relu, has_weights, has_sides;
};
// Sizes: B, Hq, Hkv, Lq, Lk, D, Dv.
const std::vector<ChoiceShape> shapes = {
    {"more keys than threads, more lists than a block has",
     {1, 2, 1, 9, 150, 20, 0},
     40,
     1,
     1,
     false,
     false,
     false,
     false},
    {"causal, with hidden keys", {2, 2, 2, 20, 20, 5, 0}, 6, 1, 1, true, false, false, true},
    {"fewer keys than are wanted", {1, 1, 1, 4, 6, 4, 0}, 9, 1, 1, true, true, false, false},
    {"an indexer of two groups of heads", {2, 20, 2, 5, 40, 17, 0}, 9, 1, 1, true, true, true, true},
    {"an indexer of few heads", {1, 3, 1, 7, 40, 4, 0}, 9, 1, 1, false, false, true, false},
    {"blocks of keys", {2, 1, 1, 7, 140, 8, 0}, 9, 4, 1, true, true, false, true},
    {"blocks of queries", {1, 2, 1, 21, 60, 8, 0}, 9, 1, 10, true, false, false, true},
    {"blocks of both", {2, 2, 1, 10, 60, 8, 0}, 5, 8, 3, true, false, true, true},
    {"no keys", {1, 1, 1, 2, 0, 4, 0}, 3, 1, 1, false, false, false, false},
};

template <typename T>
struct Problem {
  using A = accumulate_t<T>;

  ChoiceShape shape;
  std::vector<T> query, key;
  std::vector<A> weights, key_bias;
  std::vector<int64_t> query_start, key_start;
  std::vector<int32_t> indices;

  explicit Problem(const ChoiceShape& of) : shape(of) {
    const Sizes& sizes = shape.sizes;
    const int64_t rows = sizes.batch * sizes.num_heads * sizes.num_queries;
    const auto numbers = [](int64_t count, uint32_t seed) {
      return simt::whole_numbers(static_cast<size_t>(count), seed);
    };
    query = simt::narrowed<T>(numbers(rows * sizes.head_dim, 1));
    auto keys = numbers(sizes.batch * sizes.num_kv_heads * sizes.num_keys * sizes.head_dim, 2);
    if (!keys.empty()) {
      keys[keys.size() / 2] = NAN;
    }
    key = simt::narrowed<T>(keys);
    if (shape.has_weights) {
      weights = simt::narrowed<A>(numbers(rows, 3));
    }
    for (int64_t b = 0; b < sizes.batch && shape.has_sides; ++b) {
      key_start.push_back(9 - 14 * b);
      query_start.push_back(sizes.num_keys - sizes.num_queries + 10 - 15 * b);
      for (int64_t j = 0; j < sizes.num_keys; ++j) {
        key_bias.push_back((j + b) % 5 == 2 ? -std::numeric_limits<A>::infinity() : A(j % 3));
      }
    }
  }

  // Where to write -7s.
  ScoreChoice<T> arguments() {
    const Sizes& sizes = shape.sizes;
    const auto data = [](const auto& numbers) { return numbers.empty() ? nullptr : numbers.data(); };
    const auto heads = [&](const std::vector<T>& rows, int64_t count, int64_t length) {
      return Heads<const T>{rows.data(), count * length * sizes.head_dim, length * sizes.head_dim, sizes.head_dim};
    };
    const ScoreChoice<T> args{{heads(query, sizes.num_heads, sizes.num_queries),
                               heads(key, sizes.num_kv_heads, sizes.num_keys),
                               {},
                               data(key_bias),
                               nullptr,
                               data(query_start),
                               data(key_start),
                               sizes,
                               A(1)},
                              data(weights),
                              shape.relu,
                              {shape.block_size, shape.query_block, shape.is_causal},
                              shape.num_chosen};
    indices.assign(static_cast<size_t>(args.offset_of_list(sizes.batch, 0, 0)), -7);
    return args;
  }

  std::vector<int32_t> on_cpu() {
    const auto args = arguments();
    const int64_t groups = shape.sizes.batch * (shape.has_weights ? 1 : shape.sizes.num_kv_heads);
    AlignedBuffer<char> packs(static_cast<size_t>(groups * baseline::score_choice_pack_bytes(args)));
    AlignedBuffer<char> scratch(static_cast<size_t>(baseline::score_choice_scratch_bytes(args)));
    baseline::score_choice_pack(args, 0, packs.data(), 0, groups * baseline::score_choice_pack_units(args));
    baseline::choose_by_scores(args, indices.data(), 0, packs.data(), scratch.data(), 0,
                               groups * baseline::score_choice_units(args));
    return indices;
  }

  std::vector<int32_t> on_cuda(int64_t num_blocks) {
    const auto args = arguments();
    const int64_t stride = score_scratch_stride(args);
    std::vector<ordered_score_t<A>> scores(static_cast<size_t>(num_blocks * score_lists(args) * stride), 77);
    device::launch({num_blocks, score_threads, ScoreMemory<A>::bytes(args.sizes.head_dim)}, choose_by_scores<T>, args,
                   ScoreScratch<A>{scores.data(), stride, num_blocks}, indices.data());
    return indices;
  }
};

}  // namespace

TEMPLATE_TEST_CASE("choose_by_scores", "", KERNEL_TYPES) {
  for (const ChoiceShape& shape : shapes) {
    CAPTURE(shape.name);
    Problem<TestType> problem(shape);
    const auto expected = problem.on_cpu();
    const auto args = problem.arguments();
    // Blocks that have a unit each, and such that go on to others.
    for (const int64_t num_blocks : {score_choice_units(args), int64_t{2}}) {
      CAPTURE(num_blocks);
      REQUIRE(simt::same_in_every_order([&] { return problem.on_cuda(num_blocks); }) == expected);
    }
  }
}

TEST_CASE("order of scores") {
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> numbers = {-inf, -2.0F, -1e-40F, 0.0F, 1e-40F, 2.0F, inf};
  CHECK(ordered_score(static_cast<float>(NAN)) == 0);
  CHECK(ordered_score(-0.0F) == ordered_score(0.0F));
  CHECK(ordered_score(-inf) > 0);
  for (size_t i = 0; i + 1 < numbers.size(); ++i) {
    CHECK(ordered_score(numbers[i]) < ordered_score(numbers[i + 1]));
    CHECK(ordered_score(static_cast<double>(numbers[i])) < ordered_score(static_cast<double>(numbers[i + 1])));
  }
}

}  // namespace torchops::kernels::sparse_attention
