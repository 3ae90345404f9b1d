// The CUDA kernels of topk_scores on the host, next to the CPU kernels of the lowest level.

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "catch.h"
#include "core/cpu/aligned_buffer.h"
#include "numbers.h"
#include "orders.h"
#include "sparse_attention/cpu/scores_kernel.h"
#include "sparse_attention/cuda/launches.cuh"

// A race does not depend on the type, and ThreadSanitizer takes its time for every fiber.
#if defined(SIMT_THREAD_SANITIZER) || defined(SIMT_MUTATION)
#define KERNEL_TYPES float
#else
#define KERNEL_TYPES double, float, bfloat16, float16
#define EVERY_SIZE
#endif

namespace torchops::kernels::sparse_attention {
namespace {

struct Case {
  std::string name;
  Sizes sizes;
  int64_t list_heads, num_listed, block_size, query_block;
  bool is_causal, has_starts, is_wide;
};

// Sizes: B, Hq, Hkv, Lq, Lk, D, Dv.
const std::vector<Case> cases = {
    {"a list for each head, more than a warp of columns", {1, 2, 1, 5, 40, 70, 0}, 2, 37, 1, 1, true, false, true},
    {"keys that more than a warp of queries name", {1, 2, 1, 40, 5, 8, 0}, 1, 6, 1, 1, false, false, false},
    {"blocks that are cut short, for blocks of queries", {2, 2, 1, 9, 33, 8, 0}, 2, 3, 8, 4, true, true, false},
    {"more columns than a warp takes", {1, 1, 1, 2, 30, 8, 0}, 1, 290, 1, 2, false, false, true},
    {"no keys", {2, 2, 1, 3, 0, 8, 0}, 2, 3, 1, 1, false, false, true},
    {"empty lists", {1, 2, 1, 3, 6, 8, 0}, 1, 0, 1, 1, false, false, true},
#if defined(EVERY_SIZE)
    {"groups", {1, 4, 2, 37, 50, 8, 0}, 2, 5, 1, 1, true, false, false},
    {"longest rows", {1, 1, 1, 3, 40, 256, 0}, 1, 12, 1, 1, false, false, false},
    {"blocks of more than a warp", {2, 2, 2, 7, 90, 16, 0}, 2, 3, 40, 1, true, true, true},
    {"no queries", {1, 2, 1, 0, 6, 8, 0}, 1, 2, 1, 1, false, false, true},
#endif
};

template <typename T>
std::vector<T> eighths(int64_t count, uint32_t seed) {
  auto numbers = simt::whole_numbers(static_cast<size_t>(count), seed);
  for (float& number : numbers) {
    number /= 8;
  }
  return simt::narrowed<T>(numbers);
}

template <typename U>
Heads<U> heads(U* data, int64_t num_heads, int64_t length, int64_t size) {
  return {data, num_heads * length * size, length * size, size};
}

// Products and their sums are exact, so that the order of a sum does not show.
template <typename T>
struct Problem {
  using A = accumulate_t<T>;

  Case spec;
  Sizes sizes;
  int64_t num_lists, columns;
  std::vector<T> query, key;
  std::vector<int64_t> wide, query_start, key_start;
  std::vector<int32_t> narrow;
  std::vector<A> scores, grad;
  std::vector<T> grad_query, grad_key;

  explicit Problem(const Case& spec)
      : spec(spec),
        sizes(spec.sizes),
        num_lists((sizes.num_queries + spec.query_block - 1) / spec.query_block),
        columns(spec.num_listed * spec.block_size),
        query(eighths<T>(num_rows() * sizes.head_dim, 1)),
        key(eighths<T>(sizes.batch * sizes.num_kv_heads * sizes.num_keys * sizes.head_dim, 2)),
        scores(static_cast<size_t>(num_rows() * columns), A(NAN)),
        grad(eighths<A>(num_rows() * columns, 3)),
        grad_query(query.size(), device::narrow<T>(A(NAN))),
        grad_key(key.size(), device::narrow<T>(A(NAN))) {
    const int64_t names = sizes.num_keys / spec.block_size + 3;
    for (const float number : simt::whole_numbers(static_cast<size_t>(list_length()), 4)) {
      wide.push_back(wide.empty() ? 0 : (wide.back() * 5 + static_cast<int64_t>(number) + 9) % names);
    }
    for (size_t i = 0; i < wide.size(); i += 5) {
      wide[i] = spec.is_wide ? std::vector<int64_t>{-1, int64_t{1} << 40, -(int64_t{1} << 40)}[i % 3] : -1;
    }
    narrow.assign(wide.begin(), wide.end());
    for (int64_t b = 0; b < sizes.batch && spec.has_starts; ++b) {
      query_start.push_back(sizes.num_keys - sizes.num_queries - 5 * b + 1);
      key_start.push_back(3 - 7 * b);
    }
  }

  int64_t num_rows() const { return sizes.batch * sizes.num_heads * sizes.num_queries; }
  int64_t list_length() const { return sizes.batch * spec.list_heads * num_lists * spec.num_listed; }

  Attention<T> inputs() const {
    const auto data = [](const auto& numbers) { return numbers.empty() ? nullptr : numbers.data(); };
    return {{heads(query.data(), sizes.num_heads, sizes.num_queries, sizes.head_dim),
             heads(key.data(), sizes.num_kv_heads, sizes.num_keys, sizes.head_dim),
             {},
             nullptr,
             nullptr,
             data(query_start),
             data(key_start),
             sizes,
             A(0.3)},
            {spec.is_wide ? Heads<const int32_t>{} : heads(narrow.data(), spec.list_heads, num_lists, spec.num_listed),
             spec.is_wide ? heads(wide.data(), spec.list_heads, num_lists, spec.num_listed) : Heads<const int64_t>{},
             spec.list_heads, num_lists, spec.num_listed, nullptr},
            nullptr,
            1,
            {spec.block_size, spec.query_block, spec.is_causal}};
  }
  Scores<T> forward_arguments() {
    return {inputs(), heads(scores.data(), sizes.num_heads, sizes.num_queries, columns)};
  }
  ScoreGradients<T> gradient_arguments() {
    return {inputs(), heads<const A>(grad.data(), sizes.num_heads, sizes.num_queries, columns),
            heads(grad_query.data(), sizes.num_heads, sizes.num_queries, sizes.head_dim),
            heads(grad_key.data(), sizes.num_kv_heads, sizes.num_keys, sizes.head_dim)};
  }

  // Gradients to columns without a score are not looked at.
  void spoil_hidden_grads() {
    for (size_t i = 0; i < scores.size(); ++i) {
      grad[i] = scores[i] == -std::numeric_limits<A>::infinity() ? A(NAN) : grad[i];
    }
  }

  void compute_on_cpu() {
    constexpr int64_t keys_at_a_time = 7;
    const int64_t units = baseline::score_units(inputs());
    AlignedBuffer<char> scratch(static_cast<size_t>(baseline::scores_scratch_bytes(inputs(), keys_at_a_time)));
    baseline::scores(forward_arguments(), scratch.data(), 0, units);
    spoil_hidden_grads();
    baseline::score_query_gradient(gradient_arguments(), scratch.data(), 0, units);
    const int64_t ranges = (sizes.num_keys + keys_at_a_time - 1) / keys_at_a_time;
    baseline::score_key_gradient(gradient_arguments(), keys_at_a_time, scratch.data(), 0,
                                 sizes.batch * sizes.num_kv_heads * ranges);
  }

  void compute_on_cuda() {
    std::vector<int32_t> begins(static_cast<size_t>(list_length()), -7), places(begins.size(), -7);
    launch_scores(forward_arguments());
    spoil_hidden_grads();
    launch_score_query_gradient(gradient_arguments());
    const SortedLists sorted = all_lists(inputs(), begins.data(), places.data());
    launch_sort_lists(inputs(), sorted);
    launch_score_key_gradient(gradient_arguments(), sorted);
  }

  std::vector<char> result_bytes() const {
    std::vector<char> bytes;
    const auto append = [&bytes](const auto& numbers) {
      const auto* const first = reinterpret_cast<const char*>(numbers.data());
      bytes.insert(bytes.end(), first, first + numbers.size() * sizeof(numbers[0]));
    };
    append(scores), append(grad_query), append(grad_key);
    return bytes;
  }
};

template <typename U>
void check_equal(const char* name, const std::vector<U>& actual, const std::vector<U>& expected) {
  REQUIRE(actual.size() == expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    const double one = device::widen(actual[i]), other = device::widen(expected[i]);
    INFO(name << "[" << i << "] is " << one << " for " << other);
    REQUIRE(one == other);
  }
}

}  // namespace

TEMPLATE_TEST_CASE("topk_scores and its gradients", "", KERNEL_TYPES) {
  for (const Case& spec : cases) {
    CAPTURE(spec.name);
    Problem<TestType> actual(spec), expected(spec);
    simt::same_in_every_order([&] {
      actual = Problem<TestType>(spec);
      actual.compute_on_cuda();
      return actual.result_bytes();
    });
    expected.compute_on_cpu();
    check_equal("scores", actual.scores, expected.scores);
    check_equal("grad_query", actual.grad_query, expected.grad_query);
    check_equal("grad_key", actual.grad_key, expected.grad_key);
  }
}

TEMPLATE_TEST_CASE("topk_scores of keys that nobody lists", "", KERNEL_TYPES) {
  Problem<TestType> spoiled({"odd keys", {1, 2, 1, 9, 41, 20, 0}, 2, 33, 1, 1, true, false, true});
  for (int64_t& entry : spoiled.wide) {
    entry -= entry % 2;
  }
  Problem<TestType> expected = spoiled;
  for (int64_t j = 1; j < 41; j += 2) {
    std::fill_n(spoiled.key.begin() + j * 20, 20, device::narrow<TestType>(accumulate_t<TestType>(NAN)));
  }
  spoiled.compute_on_cuda();
  expected.compute_on_cuda();
  REQUIRE(spoiled.result_bytes() == expected.result_bytes());
}

}  // namespace torchops::kernels::sparse_attention
