// The CUDA kernels of sparse_attention on the host, next to the CPU kernels of the lowest level.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "catch.h"
#include "core/cpu/aligned_buffer.h"
#include "numbers.h"
#include "orders.h"
#include "sparse_attention/cpu/backward_kernel.h"
#include "sparse_attention/cpu/forward_kernel.h"
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
  bool is_causal, has_sides, has_starts, is_wide;
};

// Sizes: B, Hq, Hkv, Lq, Lk, D, Dv.
const std::vector<Case> cases = {
    {"a list for each head", {1, 2, 1, 9, 40, 20, 36}, 2, 37, 1, 1, true, true, false, true},
    {"a shared list, more than a warp of queries", {1, 2, 1, 36, 20, 8, 8}, 1, 5, 1, 1, true, false, false, false},
    {"keys that more than a warp of entries name", {1, 2, 1, 40, 5, 8, 8}, 2, 10, 1, 1, false, true, false, false},
    {"blocks for blocks of queries", {1, 2, 1, 37, 60, 24, 24}, 1, 4, 8, 16, true, true, false, false},
    {"no keys", {2, 2, 1, 5, 0, 8, 8}, 2, 3, 1, 1, false, true, false, true},
    {"empty lists", {1, 2, 1, 5, 6, 8, 8}, 1, 0, 1, 1, false, true, false, true},
#if defined(EVERY_SIZE)
    {"blocks", {2, 2, 2, 7, 90, 16, 70}, 2, 3, 40, 1, true, true, true, true},
    {"groups", {1, 4, 2, 70, 50, 8, 8}, 1, 5, 1, 1, true, false, false, false},
    {"longest rows", {1, 1, 1, 3, 40, 256, 200}, 1, 12, 1, 1, false, false, false, false},
    {"long lists", {1, 1, 1, 3, 300, 8, 8}, 1, 290, 1, 2, true, true, false, true},
    {"padding", {3, 1, 1, 20, 20, 12, 12}, 1, 6, 4, 1, true, true, true, false},
    {"no queries", {1, 2, 1, 0, 6, 8, 8}, 1, 2, 1, 1, false, false, false, true},
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

template <typename T>
struct Results {
  using A = accumulate_t<T>;

  std::vector<T> output, grad_query, grad_key, grad_value;
  std::vector<A> logsumexp, delta, key_bias_shares, pair_shares;
  std::vector<Normalizer<A>> normalizer;
};

template <typename T>
struct Problem {
  using A = accumulate_t<T>;

  Case spec;
  Sizes sizes;
  int64_t num_lists;
  std::vector<T> query, key, value, grad_output;
  std::vector<int64_t> wide;
  std::vector<int32_t> narrow;
  std::vector<A> key_bias, pair_bias, sink, grad_logsumexp;
  std::vector<int64_t> query_start, key_start;

  explicit Problem(const Case& spec)
      : spec(spec),
        sizes(spec.sizes),
        num_lists((sizes.num_queries + spec.query_block - 1) / spec.query_block),
        query(eighths<T>(num_rows() * sizes.head_dim, 1)),
        key(eighths<T>(sizes.batch * sizes.num_kv_heads * sizes.num_keys * sizes.head_dim, 2)),
        value(eighths<T>(sizes.batch * sizes.num_kv_heads * sizes.num_keys * sizes.value_dim, 3)),
        grad_output(eighths<T>(num_rows() * sizes.value_dim, 4)),
        grad_logsumexp(eighths<A>(num_rows(), 5)) {
    const int64_t names = sizes.num_keys / spec.block_size + 3;
    for (const float number : simt::whole_numbers(size_of_lists(spec.list_heads) * 2, 6)) {
      wide.push_back(wide.empty() ? 0 : (wide.back() * 5 + static_cast<int64_t>(number) + 9) % names);
    }
    wide.resize(wide.size() / 2);
    for (size_t i = 0; i < wide.size(); i += 5) {
      wide[i] = spec.is_wide ? std::vector<int64_t>{-1, int64_t{1} << 40, -(int64_t{1} << 40)}[i % 3] : -1;
    }
    narrow.assign(wide.begin(), wide.end());
    if (spec.has_sides) {
      key_bias = eighths<A>(sizes.batch * sizes.num_keys, 7);
      pair_bias = eighths<A>(static_cast<int64_t>(size_of_lists(sizes.num_heads)), 8);
      sink = eighths<A>(sizes.num_heads, 9);
      for (size_t j = 0; j < key_bias.size(); j += 7) {
        key_bias[j] = -std::numeric_limits<A>::infinity();
      }
    }
    for (int64_t b = 0; b < sizes.batch && spec.has_starts; ++b) {
      query_start.push_back(sizes.num_keys - sizes.num_queries - 5 * b + 1);
      key_start.push_back(3 - 7 * b);
    }
  }

  int64_t num_rows() const { return sizes.batch * sizes.num_heads * sizes.num_queries; }
  size_t size_of_lists(int64_t heads) const {
    return static_cast<size_t>(sizes.batch * heads * num_lists * spec.num_listed);
  }

  template <typename U>
  static Heads<U> heads(U* data, int64_t num_heads, int64_t length, int64_t size) {
    return {data, num_heads * length * size, length * size, size};
  }
  Attention<T> inputs() const {
    const auto data = [](const auto& numbers) { return numbers.empty() ? nullptr : numbers.data(); };
    return {
        {heads(query.data(), sizes.num_heads, sizes.num_queries, sizes.head_dim),
         heads(key.data(), sizes.num_kv_heads, sizes.num_keys, sizes.head_dim),
         heads(value.data(), sizes.num_kv_heads, sizes.num_keys, sizes.value_dim), data(key_bias), data(sink),
         data(query_start), data(key_start), sizes, static_cast<A>(1 / std::sqrt(static_cast<double>(sizes.head_dim)))},
        {spec.is_wide ? Heads<const int32_t>{} : heads(narrow.data(), spec.list_heads, num_lists, spec.num_listed),
         spec.is_wide ? heads(wide.data(), spec.list_heads, num_lists, spec.num_listed) : Heads<const int64_t>{},
         spec.list_heads, num_lists, spec.num_listed, nullptr},
        data(pair_bias),
        spec.has_sides ? sizes.num_heads : 1,
        {spec.block_size, spec.query_block, spec.is_causal}};
  }

  // Of the right lengths and full of NaN, but for shares that are added to.
  Results<T> unwritten() const {
    Results<T> results;
    const T nothing = device::narrow<T>(A(NAN));
    results.output.assign(grad_output.size(), nothing);
    results.grad_query.assign(query.size(), nothing);
    results.grad_key.assign(key.size(), nothing);
    results.grad_value.assign(value.size(), nothing);
    const auto rows = static_cast<size_t>(num_rows());
    results.logsumexp.assign(rows, A(NAN));
    results.delta.assign(rows, A(NAN));
    results.normalizer.assign(rows, {A(NAN), A(NAN)});
    results.key_bias_shares.assign(static_cast<size_t>(sizes.batch * sizes.num_kv_heads * sizes.num_keys), A(NAN));
    results.pair_shares.assign(size_of_lists(sizes.num_heads), A(0));
    return results;
  }

  AttentionForward<T> forward_arguments(Results<T>& results) const {
    return {inputs(), heads(results.output.data(), sizes.num_heads, sizes.num_queries, sizes.value_dim),
            results.logsumexp.data(), results.normalizer.data()};
  }
  RowDelta<T> delta_arguments(Results<T>& results) const {
    return {heads(grad_output.data(), sizes.num_heads, sizes.num_queries, sizes.value_dim),
            heads<const T>(results.output.data(), sizes.num_heads, sizes.num_queries, sizes.value_dim),
            grad_logsumexp.data(), results.delta.data(), sizes};
  }
  AttentionBackward<T> backward_arguments(Results<T>& results) const {
    return {{inputs(), heads(grad_output.data(), sizes.num_heads, sizes.num_queries, sizes.value_dim),
             results.normalizer.data(), results.delta.data(),
             heads(results.grad_query.data(), sizes.num_heads, sizes.num_queries, sizes.head_dim),
             heads(results.grad_key.data(), sizes.num_kv_heads, sizes.num_keys, sizes.head_dim),
             heads(results.grad_value.data(), sizes.num_kv_heads, sizes.num_keys, sizes.value_dim),
             results.key_bias_shares.data()},
            results.pair_shares.data()};
  }

  Results<T> on_cpu() const {
    Results<T> results = unwritten();
    const auto scratch_of = [](int64_t bytes) { return AlignedBuffer<char>(static_cast<size_t>(bytes)); };
    const auto forward = forward_arguments(results);
    auto scratch = scratch_of(baseline::forward_scratch_bytes(forward.inputs));
    baseline::forward(forward, scratch.data(), 0, baseline::forward_units(forward.inputs));
    baseline::row_delta(delta_arguments(results), by_tile(forward.inputs), 0, num_rows());
    const auto backward = backward_arguments(results);
    auto of_backward = scratch_of(baseline::backward_scratch_bytes(backward, sizes.num_keys));
    baseline::backward_heads(backward, of_backward.data(), 0, sizes.batch * sizes.num_kv_heads);
    return results;
  }

  Results<T> on_cuda() const {
    Results<T> results = unwritten();
    const int64_t list_heads = spec.has_sides ? sizes.num_heads : spec.list_heads;
    std::vector<int32_t> begins(size_of_lists(list_heads), -7), places(begins.size(), -7);
    const SortedLists sorted = all_lists(inputs(), begins.data(), places.data());
    launch_sort_lists(inputs(), sorted);
    launch_forward(forward_arguments(results), sorted);
    launch_row_delta(delta_arguments(results));
    launch_query_gradient(backward_arguments(results), sorted);
    launch_key_gradient(backward_arguments(results), sorted, {});
    return results;
  }

  // The same for lists of a query and a head each that have no biases, as many at a time as take so many bytes.
  Results<T> on_cuda_by_tiles(int64_t most_bytes) const {
    Results<T> results = unwritten();
    std::vector<int32_t> begins(size_of_lists(sizes.num_heads)), places(begins.size());
    const SortedLists sorted = all_lists(inputs(), begins.data(), places.data());
    launch_sort_lists(inputs(), sorted);
    const auto for_tiles = [&](const auto& body) {
      const QueryTile first = first_tile(sizes, spec.num_listed, most_bytes);
      for (QueryTile tile = first;; tile = next_tile(tile, sizes, first.num_queries)) {
        std::vector<int32_t> of_tile;
        of_tile.reserve(static_cast<size_t>(tile.units(sizes) * spec.num_listed));  // AddressSanitizer knows its end
        for (int64_t unit = 0; unit < tile.units(sizes); ++unit) {
          const auto [batch, head, query] = tile.place(unit, sizes.num_kv_heads, sizes.group_size());
          const auto list = begins.begin() + sorted.first_of(inputs(), batch, head, query);
          of_tile.insert(of_tile.end(), list, list + spec.num_listed);
        }
        body({of_tile.data(), nullptr, sizes.num_kv_heads * tile.num_heads, tile.first_query, tile.num_queries, tile});
        if (tile.is_last(sizes)) {
          break;
        }
      }
    };
    for_tiles([&](const SortedLists& lists) { launch_forward(forward_arguments(results), lists); });
    launch_row_delta(delta_arguments(results));
    auto backward = backward_arguments(results);
    backward.grad_pair_bias = nullptr;
    std::vector<A> keys(results.grad_key.size(), A(NAN)), values(results.grad_value.size(), A(NAN));
    for_tiles([&](const SortedLists& lists) {
      launch_query_gradient(backward, lists);
      launch_key_gradient(backward, lists, {keys.data(), values.data()});
    });
    return results;
  }
};

// How far a result may be off, as a part of the largest number expected: all gradients are made of a rounded output.
template <typename T>
constexpr double tolerance = sizeof(T) == 8               ? 1e-13
                             : sizeof(T) == 4             ? 1e-5
                             : std::is_same_v<T, float16> ? 4e-3
                                                          : 2e-2;

template <typename U>
void check_close(const char* name, const std::vector<U>& actual, const std::vector<U>& expected, double tolerance) {
  REQUIRE(actual.size() == expected.size());
  double largest = 1e-30;
  for (const U number : expected) {
    const double wide = device::widen(number);
    largest = std::isfinite(wide) ? std::max(largest, std::abs(wide)) : largest;
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    const double one = device::widen(actual[i]), other = device::widen(expected[i]);
    INFO(name << "[" << i << "] is " << one << " for " << other);
    if (std::isfinite(other)) {
      REQUIRE(std::abs(one - other) <= tolerance * largest);
    } else {
      REQUIRE(one == other);
    }
  }
}

template <typename T>
void check_close(const Results<T>& actual, const Results<T>& expected) {
  check_close("output", actual.output, expected.output, tolerance<T>);
  check_close("logsumexp", actual.logsumexp, expected.logsumexp, tolerance<T>);
  check_close("delta", actual.delta, expected.delta, tolerance<T>);
  check_close("grad_query", actual.grad_query, expected.grad_query, tolerance<T>);
  check_close("grad_key", actual.grad_key, expected.grad_key, tolerance<T>);
  check_close("grad_value", actual.grad_value, expected.grad_value, tolerance<T>);
  check_close("key_bias_shares", actual.key_bias_shares, expected.key_bias_shares, tolerance<T>);
  check_close("pair_shares", actual.pair_shares, expected.pair_shares, tolerance<T>);
}

// All results as bytes.
template <typename T>
std::vector<char> bytes_of(const Results<T>& results) {
  std::vector<char> bytes;
  const auto append = [&bytes](const auto& numbers) {
    const auto* const first = reinterpret_cast<const char*>(numbers.data());
    bytes.insert(bytes.end(), first, first + numbers.size() * sizeof(numbers[0]));
  };
  append(results.output), append(results.logsumexp), append(results.grad_query), append(results.grad_key);
  append(results.grad_value), append(results.key_bias_shares), append(results.pair_shares);
  return bytes;
}

}  // namespace

TEMPLATE_TEST_CASE("topk_attention and its gradients", "", KERNEL_TYPES) {
  for (const Case& spec : cases) {
    CAPTURE(spec.name);
    const Problem<TestType> problem(spec);
    Results<TestType> results;
    simt::same_in_every_order([&] {
      results = problem.on_cuda();
      return bytes_of(results);
    });
    check_close(results, problem.on_cpu());
  }
}

TEMPLATE_TEST_CASE("topk_attention gradient of value alone", "", KERNEL_TYPES) {
  const Problem<TestType> problem(cases.front());
  Results<TestType> expected = problem.on_cuda(), actual = expected;
  actual.grad_value = problem.unwritten().grad_value;
  auto backward = problem.backward_arguments(actual);
  backward.delta = nullptr;
  backward.grad_key = {};
  backward.grad_key_bias = nullptr;
  std::vector<int32_t> begins(problem.size_of_lists(2)), places(begins.size());
  const SortedLists sorted = all_lists(backward.inputs, begins.data(), places.data());
  launch_sort_lists(backward.inputs, sorted);
  launch_key_gradient(backward, sorted, {});
  REQUIRE(bytes_of(actual) == bytes_of(expected));
}

TEMPLATE_TEST_CASE("topk_attention tile by tile of queries", "", KERNEL_TYPES) {
  Problem<TestType> problem({"tiles", {2, 4, 2, 37, 20, 20, 36}, 4, 9, 1, 1, true, true, true, true});
  problem.pair_bias.clear();
  // No key twice, as chosen lists have it: what a list repeats is added behind 32 queries, counted from the tile's
  // first.
  for (size_t i = 0; i < problem.wide.size(); ++i) {
    const auto entry = static_cast<int64_t>(i % 9), list = static_cast<int64_t>(i / 9);
    problem.wide[i] = i % 5 == 3 ? -1 : (7 * list + 2 * entry) % 20;
  }
  auto expected = problem.on_cuda();
  expected.pair_shares = problem.unwritten().pair_shares;
  const int64_t of_query = 2 * 2 * 9 * static_cast<int64_t>(sizeof(int32_t));
#if defined(EVERY_SIZE)
  for (const int64_t queries : {1, 7, 37, 73, 74}) {
#else
  for (const int64_t queries : {25, 37}) {
#endif
    CAPTURE(queries);
    Results<TestType> results;
    simt::same_in_every_order([&] {
      results = problem.on_cuda_by_tiles(queries * of_query);
      return bytes_of(results);
    });
    const bool same_bits = bytes_of(results) == bytes_of(expected);
    REQUIRE(same_bits);
  }
}

TEST_CASE("tiles of queries") {
  const auto tiles_of = [](const Sizes& sizes, int64_t num_listed, int64_t most_bytes) {
    std::vector<std::vector<int64_t>> tiles;
    const QueryTile first = first_tile(sizes, num_listed, most_bytes);
    for (QueryTile tile = first;; tile = next_tile(tile, sizes, first.num_queries)) {
      tiles.push_back({tile.first_head, tile.num_heads, tile.first_query, tile.num_queries});
      REQUIRE(tile.is_first() == (tiles.size() == 1));
      if (tile.is_last(sizes)) {
        return tiles;
      }
    }
  };
  const Sizes sizes{1, 4, 2, 10, 10, 8, 8};
  using Tiles = std::vector<std::vector<int64_t>>;
  CHECK(tiles_of(sizes, 5, 4 * 10 * 5 * 4) == Tiles{{0, 2, 0, 10}});
  CHECK(tiles_of(sizes, 5, 4 * 10 * 5 * 4 - 1) == Tiles{{0, 1, 0, 10}, {1, 1, 0, 10}});
  CHECK(tiles_of(sizes, 5, 2 * 7 * 5 * 4) == Tiles{{0, 1, 0, 7}, {0, 1, 7, 3}, {1, 1, 0, 7}, {1, 1, 7, 3}});
  CHECK(tiles_of(sizes, 5, 0).size() == 20);
  CHECK(tiles_of(sizes, 0, 0) == Tiles{{0, 2, 0, 10}});
  CHECK(tiles_of({0, 4, 2, 10, 10, 8, 8}, 5, 0) == Tiles{{0, 2, 0, 10}});
  CHECK(tiles_of({1, 0, 2, 10, 10, 8, 8}, 5, 0) == Tiles{{0, 0, 0, 10}});
  CHECK(tiles_of({1, 4, 2, 0, 10, 8, 8}, 5, 0) == Tiles{{0, 2, 0, 0}});
}

TEMPLATE_TEST_CASE("topk_attention lists in order, which are not ranked", "", KERNEL_TYPES) {
  for (const Case& spec : cases) {
#if !defined(EVERY_SIZE)
    if (&spec != &cases.front()) {
      continue;
    }
#endif
    CAPTURE(spec.name);
    Problem<TestType> problem(spec);
    problem.pair_bias.assign(problem.pair_bias.size(), accumulate_t<TestType>(1));
    const auto unordered = bytes_of(problem.on_cuda());
    for (size_t first = 0; first < problem.wide.size(); first += static_cast<size_t>(spec.num_listed)) {
      const auto begin = problem.wide.begin() + static_cast<int64_t>(first);
      std::sort(begin, begin + spec.num_listed, [&](int64_t one, int64_t other) {
        const auto order = [&](int64_t entry) { return static_cast<uint64_t>(entry); };  // negative ones last
        return order(one) < order(other);
      });
    }
    problem.narrow.assign(problem.wide.begin(), problem.wide.end());
    auto results = problem.on_cuda();
    auto before = Problem<TestType>(spec);
    before.pair_bias = problem.pair_bias;
    auto expected = before.on_cuda();
    REQUIRE(bytes_of(expected) == unordered);
    results.pair_shares = expected.pair_shares;  // which are in another order
    REQUIRE(bytes_of(results) == unordered);
  }
}

TEMPLATE_TEST_CASE("topk_attention keys that nobody lists", "", KERNEL_TYPES) {
  Problem<TestType> problem({"odd keys", {1, 2, 1, 9, 41, 20, 36}, 2, 33, 1, 1, true, false, false, true});
  for (int64_t& entry : problem.wide) {
    entry -= entry % 2;
  }
  const auto expected = problem.on_cuda();
  for (int64_t j = 1; j < 41; j += 2) {
    std::fill_n(problem.key.begin() + j * 20, 20, device::narrow<TestType>(accumulate_t<TestType>(NAN)));
    std::fill_n(problem.value.begin() + j * 36, 36, device::narrow<TestType>(accumulate_t<TestType>(NAN)));
  }
  REQUIRE(bytes_of(problem.on_cuda()) == bytes_of(expected));
}

}  // namespace torchops::kernels::sparse_attention
