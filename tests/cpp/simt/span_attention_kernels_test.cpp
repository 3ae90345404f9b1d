// The CUDA kernels of span_attention on the host, next to the same mathematics written densely in double.

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "catch.h"
#include "core/attention/cuda/side_gradients.cuh"
#include "numbers.h"
#include "orders.h"
#include "span_attention/cuda/launches.cuh"

// A race does not depend on the type or on lengths of rows, and ThreadSanitizer takes its time for every fiber. There
// are two kinds of kernels, by type.
#if defined(SIMT_THREAD_SANITIZER) || defined(SIMT_MUTATION)
#define KERNEL_TYPES float, bfloat16
#else
#define KERNEL_TYPES double, float, bfloat16, float16
#define EVERY_SIZE
#endif

namespace torchops::kernels::span_attention {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

// How a tensor [B, H, L, D] lies in memory.
enum class Layout {
  heads_first,  // contiguous
  rows_first,   // [B, L, H, D]
  odd,          // rows one element further apart, the first not at its memory's beginning
};

struct Shape {
  int64_t batch, heads, length, dim;

  int64_t numel() const { return batch * heads * length * dim; }
};

// A tensor in double and, rounded to T, in memory that is as long as it is and no longer.
template <typename T>
struct Tensor {
  Shape shape;
  Layout layout;
  std::vector<T> memory;

  Tensor(Shape shape, Layout layout) : shape(shape), layout(layout) {
    const auto heads = strides(static_cast<T*>(nullptr));
    const int64_t last = (shape.batch - 1) * heads.batch_stride + (shape.heads - 1) * heads.head_stride +
                         (shape.length - 1) * heads.row_stride;
    memory = simt::narrowed<T>(std::vector<float>(shape.numel() == 0 ? 0 : offset() + last + shape.dim, NAN));
  }
  Tensor(Shape shape, Layout layout, uint32_t seed) : Tensor(shape, layout) {
    auto numbers = simt::whole_numbers(static_cast<size_t>(shape.numel()), seed);
    for (float& number : numbers) {
      number /= 8;
    }
    const auto narrow = simt::narrowed<T>(numbers);
    for_each([&, next = narrow.begin()](T& element) mutable { element = *next++; });
  }

  int64_t offset() const { return layout == Layout::odd ? 1 : 0; }

  template <typename U>
  Heads<U> strides(U* data) const {
    if (layout == Layout::rows_first) {
      return {data, shape.length * shape.heads * shape.dim, shape.dim, shape.heads * shape.dim};
    }
    const int64_t row = shape.dim + offset();
    return {data, shape.heads * shape.length * row, shape.length * row, row};
  }
  Heads<const T> heads() const { return strides(memory.data() + offset()); }
  Heads<T> mutable_heads() { return strides(memory.data() + offset()); }

  template <typename Body>
  void for_each(Body body) {
    const auto heads = mutable_heads();
    for (int64_t b = 0; b < shape.batch; ++b) {
      for (int64_t h = 0; h < shape.heads; ++h) {
        for (int64_t i = 0; i < shape.length; ++i) {
          for (int64_t d = 0; d < shape.dim; ++d) {
            body(heads.row(b, h, i)[d]);
          }
        }
      }
    }
  }
  // Between rows that lie apart there is memory that nobody may write to; it is NaN from the beginning.
  bool only_elements_are_written() const {
    const auto is_number = [](const T& element) { return !std::isnan(device::widen(element)); };
    return std::count_if(memory.begin(), memory.end(), is_number) == shape.numel();
  }
  std::vector<double> wide() const {
    std::vector<double> result;
    const_cast<Tensor*>(this)->for_each([&](const T& element) { result.push_back(device::widen(element)); });
    return result;
  }
};

struct Case {
  std::string name;
  Sizes sizes;
  int64_t block_size, left, right;
  bool is_causal;
  bool has_bias, has_sink, has_starts;
  Layout layout;
};

// Sizes: B, Hq, Hkv, Lq, Lk, D, Dv.
const std::vector<Case> cases = {
    {"window", {1, 2, 1, 150, 150, 20, 36}, 1, 8, 0, true, false, true, false, Layout::heads_first},
    {"causal, groups", {1, 4, 2, 70, 70, 64, 64}, 1, -1, -1, true, false, false, false, Layout::rows_first},
    {"blocks, more keys", {2, 2, 2, 17, 140, 40, 72}, 16, 0, 0, false, true, false, true, Layout::odd},
    {"band, more queries", {1, 1, 1, 140, 90, 16, 16}, 8, 1, 1, false, true, true, false, Layout::heads_first},
    {"wide window", {1, 1, 1, 70, 420, 16, 16}, 1, 300, 0, true, false, false, false, Layout::rows_first},
    {"rows of a latent attention",
     {1, 1, 1, 20, 30, 192, 120},
     1,
     -1,
     -1,
     true,
     true,
     false,
     false,
     Layout::rows_first},
    {"longest rows", {1, 1, 1, 35, 50, 256, 200}, 10, 1, 0, true, true, true, false, Layout::heads_first},
    {"no keys", {2, 2, 1, 5, 0, 8, 8}, 1, -1, -1, false, true, true, false, Layout::heads_first},
#if defined(EVERY_SIZE)
    {"full, tiny", {1, 1, 1, 5, 7, 3, 2}, 1, -1, -1, false, false, false, false, Layout::heads_first},
    {"padding", {3, 1, 1, 40, 40, 24, 24}, 4, 1, 0, true, true, false, true, Layout::rows_first},
    {"long rows", {1, 2, 1, 33, 70, 128, 120}, 1, 20, 0, true, false, true, false, Layout::heads_first},
    {"values longer than keys", {1, 1, 1, 20, 30, 16, 150}, 1, -1, 3, false, false, false, false, Layout::odd},
    {"no queries", {1, 2, 1, 0, 6, 8, 8}, 1, -1, -1, false, false, true, false, Layout::heads_first},
#endif
};

// Few queries: keys come in pieces of 128 and more, whole blocks of 64 of what is seen.
const std::vector<Case> decoding_cases = {
    {"three pieces, a group", {1, 4, 1, 1, 300, 24, 40}, 1, -1, -1, true, true, true, false, Layout::rows_first},
    {"window behind a piece", {2, 2, 2, 3, 420, 16, 16}, 1, 200, 0, true, false, true, true, Layout::heads_first},
    {"more rows than a block has", {1, 6, 1, 2, 257, 20, 36}, 1, -1, -1, true, true, false, false, Layout::odd},
    {"one row", {1, 1, 1, 1, 385, 64, 64}, 1, -1, -1, false, false, false, false, Layout::heads_first},
#if defined(EVERY_SIZE)
    {"blocks", {1, 2, 1, 4, 300, 16, 200}, 150, 1, 0, false, true, true, false, Layout::rows_first},
    {"longest rows", {1, 2, 2, 1, 260, 256, 256}, 1, -1, -1, true, false, false, false, Layout::heads_first},
    {"odd rows", {1, 2, 1, 1, 260, 255, 129}, 1, -1, -1, true, false, true, false, Layout::odd},
    {"queries of which some see nothing",
     {1, 1, 1, 8, 260, 8, 8},
     100,
     0,
     0,
     true,
     false,
     true,
     true,
     Layout::heads_first},
#endif
};

// The inputs of a case, what the operator and its gradient are, and what the kernels make of them.
template <typename T>
struct Problem {
  using A = accumulate_t<T>;

  const Case& spec;
  Sizes sizes;
  double scale;
  Tensor<T> query, key, value, grad_output;
  std::vector<A> key_bias, sink, grad_logsumexp;
  std::vector<int64_t> query_start, key_start;
  std::vector<double> output, logsumexp, largest, inverse_sum, delta, grad_query, grad_key, grad_value, grad_key_bias,
      bias_shares, grad_sink;

  explicit Problem(const Case& spec, bool has_grad_output = true)
      : spec(spec),
        sizes(spec.sizes),
        scale(1 / std::sqrt(static_cast<double>(sizes.head_dim))),
        query({sizes.batch, sizes.num_heads, sizes.num_queries, sizes.head_dim}, spec.layout, 1),
        key({sizes.batch, sizes.num_kv_heads, sizes.num_keys, sizes.head_dim}, spec.layout, 2),
        value({sizes.batch, sizes.num_kv_heads, sizes.num_keys, sizes.value_dim}, spec.layout, 3),
        grad_output({sizes.batch, sizes.num_heads, sizes.num_queries, sizes.value_dim}, spec.layout, 4) {
    const auto numbers = [](int64_t count, uint32_t seed) {
      const auto whole = simt::whole_numbers(static_cast<size_t>(count), seed);
      std::vector<A> result(whole.size());
      std::transform(whole.begin(), whole.end(), result.begin(), [](float number) { return A(number) / 8; });
      return result;
    };
    if (!has_grad_output) {
      grad_output.for_each([](T& element) { element = T{}; });
    }
    key_bias = numbers(spec.has_bias ? sizes.batch * sizes.num_keys : 0, 5);
    for (size_t j = 0; j < key_bias.size(); j += 7) {
      key_bias[j] = -std::numeric_limits<A>::infinity();
    }
    // Of the last row of the batch, so many keys are hidden at the end that some queries see none.
    for (size_t j = 0; j < std::min<size_t>(30, key_bias.size()); ++j) {
      key_bias[key_bias.size() - 1 - j] = -std::numeric_limits<A>::infinity();
    }
    sink = numbers(spec.has_sink ? sizes.num_heads : 0, 6);
    grad_logsumexp = numbers(num_rows(), 7);
    for (int64_t b = 0; b < sizes.batch && spec.has_starts; ++b) {
      query_start.push_back(sizes.num_keys - sizes.num_queries - 5 * b + 1);
      key_start.push_back(3 - 7 * b);
    }
    compute();
  }

  int64_t num_rows() const { return sizes.batch * sizes.num_heads * sizes.num_queries; }

  Attention<T> inputs() const {
    const auto data = [](const auto& numbers) { return numbers.empty() ? nullptr : numbers.data(); };
    return {{query.heads(), key.heads(), value.heads(), data(key_bias), data(sink), data(query_start), data(key_start),
             sizes, static_cast<A>(scale)},
            make_span(spec.block_size, spec.left, spec.right, spec.is_causal)};
  }

  // By the definition, not by span.h.
  bool sees(int64_t b, int64_t i, int64_t j) const {
    const int64_t p = i + (spec.has_starts ? query_start[b] : sizes.num_keys - sizes.num_queries);
    const int64_t t = j + (spec.has_starts ? key_start[b] : 0);
    const auto block = [&](int64_t position) {
      return std::floor(static_cast<double>(position) / static_cast<double>(spec.block_size));
    };
    return (spec.left < 0 || block(t) >= block(p) - static_cast<double>(spec.left)) &&
           (spec.right < 0 || block(t) <= block(p) + static_cast<double>(spec.right)) && (!spec.is_causal || t <= p);
  }

  void compute() {
    const auto q = query.wide(), k = key.wide(), v = value.wide(), g = grad_output.wide();
    const int64_t dim = sizes.head_dim, value_dim = sizes.value_dim, num_keys = sizes.num_keys;
    const auto resize = [](std::vector<double>& numbers, int64_t count) {
      numbers.assign(static_cast<size_t>(count), 0);
    };
    resize(output, num_rows() * value_dim);
    resize(logsumexp, num_rows());
    resize(largest, num_rows());
    resize(inverse_sum, num_rows());
    resize(delta, num_rows());
    resize(grad_query, num_rows() * dim);
    resize(grad_key, sizes.batch * sizes.num_kv_heads * num_keys * dim);
    resize(grad_value, sizes.batch * sizes.num_kv_heads * num_keys * value_dim);
    resize(bias_shares, sizes.batch * sizes.num_kv_heads * num_keys);
    resize(grad_key_bias, sizes.batch * num_keys);
    resize(grad_sink, sizes.num_heads);
    const auto dot = [](const double* one, const double* other, int64_t size) {
      double sum = 0;
      for (int64_t d = 0; d < size; ++d) {
        sum += one[d] * other[d];
      }
      return sum;
    };
    const auto add = [](double* to, double factor, const double* from, int64_t size) {
      for (int64_t d = 0; d < size; ++d) {
        to[d] += factor * from[d];
      }
    };
    for (int64_t row = 0; row < num_rows(); ++row) {
      const int64_t i = row % sizes.num_queries, h = row / sizes.num_queries % sizes.num_heads;
      const int64_t b = row / sizes.num_queries / sizes.num_heads;
      const int64_t kv = b * sizes.num_kv_heads + h / sizes.group_size();
      std::vector<double> probability(static_cast<size_t>(num_keys), -infinity);
      double highest = sink.empty() ? -infinity : sink[h];
      for (int64_t j = 0; j < num_keys; ++j) {
        if (sees(b, i, j)) {
          probability[j] = dot(&q[row * dim], &k[(kv * num_keys + j) * dim], dim) * scale +
                           (key_bias.empty() ? 0 : key_bias[b * num_keys + j]);
        }
        highest = std::max(highest, probability[j]);
      }
      double sum = sink.empty() ? 0 : std::exp(sink[h] - highest);
      for (const double score : probability) {
        sum += score == -infinity ? 0 : std::exp(score - highest);
      }
      logsumexp[row] = sum == 0 ? -infinity : highest + std::log(sum);
      largest[row] = sum == 0 ? infinity : highest;
      inverse_sum[row] = sum == 0 ? 0 : 1 / sum;
      for (int64_t j = 0; j < num_keys; ++j) {
        probability[j] = probability[j] == -infinity ? 0 : std::exp(probability[j] - logsumexp[row]);
        add(&output[row * value_dim], probability[j], &v[(kv * num_keys + j) * value_dim], value_dim);
      }
      delta[row] = dot(&g[row * value_dim], &output[row * value_dim], value_dim) - grad_logsumexp[row];
      for (int64_t j = 0; j < num_keys; ++j) {
        const int64_t at = kv * num_keys + j;
        const double score_gradient =
            probability[j] * (dot(&g[row * value_dim], &v[at * value_dim], value_dim) - delta[row]);
        add(&grad_query[row * dim], score_gradient * scale, &k[at * dim], dim);
        add(&grad_key[at * dim], score_gradient * scale, &q[row * dim], dim);
        add(&grad_value[at * value_dim], probability[j], &g[row * value_dim], value_dim);
        bias_shares[at] += score_gradient;
        grad_key_bias[b * num_keys + j] += score_gradient;
      }
      if (!sink.empty()) {
        grad_sink[h] -= std::exp(sink[h] - logsumexp[row]) * delta[row];
      }
    }
  }

  std::vector<Normalizer<A>> normalizer() const {
    std::vector<Normalizer<A>> result(largest.size());
    for (size_t row = 0; row < result.size(); ++row) {
      result[row] = {static_cast<A>(largest[row]), static_cast<A>(inverse_sum[row])};
    }
    return result;
  }

  // What no query sees, and what sees no key, becomes NaN; the results are the same.
  void spoil() {
    const auto make_nan = [](Tensor<T>& tensor, int64_t b, int64_t index) {
      for (int64_t h = 0; h < tensor.shape.heads; ++h) {
        T* row = tensor.mutable_heads().row(b, h, index);
        std::fill(row, row + tensor.shape.dim, device::narrow<T>(NAN));
      }
    };
    for (int64_t b = 0; b < sizes.batch; ++b) {
      std::vector<bool> seen(static_cast<size_t>(sizes.num_keys));
      for (int64_t i = 0; i < sizes.num_queries; ++i) {
        bool sees_any = false;
        for (int64_t j = 0; j < sizes.num_keys; ++j) {
          seen[j] = seen[j] || sees(b, i, j);
          sees_any = sees_any || sees(b, i, j);
        }
        if (!sees_any) {
          make_nan(query, b, i);
          make_nan(grad_output, b, i);
        }
      }
      for (int64_t j = 0; j < sizes.num_keys; ++j) {
        if (!seen[j]) {
          make_nan(key, b, j);
          make_nan(value, b, j);
        }
      }
    }
    for (int64_t row = 0; row < num_rows(); ++row) {
      delta[row] = logsumexp[row] == -infinity ? NAN : delta[row];
    }
  }
};

// How far a result may be off, as a part of the largest number expected: where it is rounded to T, and where not.
template <typename T>
constexpr double rounded = sizeof(T) == 8               ? 1e-13
                           : sizeof(T) == 4             ? 2e-6
                           : std::is_same_v<T, float16> ? 2e-3
                                                        : 1e-2;
template <typename T>
constexpr double accumulated = sizeof(T) == 8 ? 1e-13 : 4e-6;

void check_close(const char* name, const std::vector<double>& actual, const std::vector<double>& expected,
                 double tolerance) {
  REQUIRE(actual.size() == expected.size());
  double largest = 1e-30;
  for (const double number : expected) {
    largest = std::isfinite(number) ? std::max(largest, std::abs(number)) : largest;
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    INFO(name << "[" << i << "] is " << actual[i] << " for " << expected[i]);
    if (std::isfinite(expected[i])) {
      REQUIRE(std::abs(actual[i] - expected[i]) <= tolerance * largest);
    } else {
      REQUIRE(actual[i] == expected[i]);
    }
  }
}

template <typename A>
std::vector<double> as_double(const std::vector<A>& numbers) {
  return {numbers.begin(), numbers.end()};
}
template <typename A>
std::vector<A> accumulated_from(const std::vector<double>& numbers) {
  return {numbers.begin(), numbers.end()};
}

// Runs compute(tensor), which fills a tensor, in every order.
template <typename T, typename Compute>
std::vector<double> filled(Tensor<T> tensor, const Compute& compute) {
  simt::same_in_every_order([&] {
    std::fill(tensor.memory.begin(), tensor.memory.end(), device::narrow<T>(NAN));
    compute(tensor);
    return tensor.memory;
  });
  REQUIRE(tensor.only_elements_are_written());
  return tensor.wide();
}

template <typename T>
void check_forward(const Problem<T>& problem, bool wants_logsumexp) {
  using A = accumulate_t<T>;
  std::vector<A> logsumexp(problem.logsumexp.size());
  std::vector<Normalizer<A>> normalizer(problem.logsumexp.size());
  const auto output = filled(Tensor<T>(problem.grad_output.shape, problem.spec.layout), [&](Tensor<T>& tensor) {
    std::fill(logsumexp.begin(), logsumexp.end(), A(NAN));
    launch_forward<T>({problem.inputs(), tensor.mutable_heads(), wants_logsumexp ? logsumexp.data() : nullptr,
                       wants_logsumexp ? normalizer.data() : nullptr});
  });
  check_close("output", output, problem.output, rounded<T>);
  if (wants_logsumexp) {
    check_close("logsumexp", as_double(logsumexp), problem.logsumexp, accumulated<T>);
    std::vector<double> largest, inverse_sum;
    for (const auto& of_row : normalizer) {
      largest.push_back(of_row.largest);
      inverse_sum.push_back(of_row.inverse_sum);
    }
    check_close("largest", largest, problem.largest, accumulated<T>);
    check_close("inverse_sum", inverse_sum, problem.inverse_sum, accumulated<T>);
  }
}

template <typename T>
void check_decode(const Problem<T>& problem, bool wants_logsumexp) {
  using A = accumulate_t<T>;
  std::vector<A> logsumexp(problem.logsumexp.size());
  const Attention<T> inputs = problem.inputs();
  const int64_t pieces = decode_pieces(inputs.sizes, inputs.span);
  std::vector<A> results(static_cast<size_t>(problem.num_rows() * pieces * inputs.sizes.value_dim));
  std::vector<A> softmax(static_cast<size_t>(problem.num_rows() * pieces * 2));
  const auto output = filled(Tensor<T>(problem.grad_output.shape, problem.spec.layout), [&](Tensor<T>& tensor) {
    for (auto* numbers : {&logsumexp, &results, &softmax}) {
      std::fill(numbers->begin(), numbers->end(), A(NAN));
    }
    launch_decode<T>({inputs, tensor.mutable_heads(), wants_logsumexp ? logsumexp.data() : nullptr, nullptr},
                     {results.data(), softmax.data(), pieces});
  });
  check_close("output", output, problem.output, rounded<T>);
  if (wants_logsumexp) {
    check_close("logsumexp", as_double(logsumexp), problem.logsumexp, accumulated<T>);
  }
}

template <typename T>
void check_query_gradient(const Problem<T>& problem) {
  using A = accumulate_t<T>;
  const auto normalizer = problem.normalizer();
  const auto delta = accumulated_from<A>(problem.delta);
  const auto gradient = filled(Tensor<T>(problem.query.shape, problem.spec.layout), [&](Tensor<T>& tensor) {
    launch_query_gradient<T>({problem.inputs(),
                              problem.grad_output.heads(),
                              normalizer.data(),
                              delta.data(),
                              tensor.mutable_heads(),
                              {},
                              {},
                              nullptr});
  });
  check_close("grad_query", gradient, problem.grad_query, 2 * rounded<T>);
}

template <typename T>
void check_key_gradient(const Problem<T>& problem, bool wants_key, bool wants_value, bool wants_bias) {
  CAPTURE(wants_key, wants_value, wants_bias);
  using A = accumulate_t<T>;
  const auto normalizer = problem.normalizer();
  const auto delta = accumulated_from<A>(problem.delta);
  Tensor<T> grad_key(problem.key.shape, problem.spec.layout), grad_value(problem.value.shape, problem.spec.layout);
  const auto bias = simt::same_in_every_order([&] {
    std::vector<A> shares(problem.bias_shares.size(), A(NAN));
    Attention<T> inputs = problem.inputs();
    inputs.value = wants_key || wants_bias ? inputs.value : Heads<const T>{};
    launch_key_gradient<T>({inputs,
                            problem.grad_output.heads(),
                            normalizer.data(),
                            wants_key || wants_bias ? delta.data() : nullptr,
                            {},
                            wants_key ? grad_key.mutable_heads() : Heads<T>{},
                            wants_value ? grad_value.mutable_heads() : Heads<T>{},
                            wants_bias ? shares.data() : nullptr});
    return shares;
  });
  if (wants_key) {
    REQUIRE(grad_key.only_elements_are_written());
    check_close("grad_key", grad_key.wide(), problem.grad_key, 2 * rounded<T>);
  }
  if (wants_value) {
    REQUIRE(grad_value.only_elements_are_written());
    check_close("grad_value", grad_value.wide(), problem.grad_value, rounded<T>);
  }
  if (wants_bias) {
    check_close("grad_key_bias", as_double(bias), problem.bias_shares, 4 * accumulated<T>);
  }
}

}  // namespace

TEMPLATE_TEST_CASE("span_attention forward", "", KERNEL_TYPES) {
  for (const Case& spec : cases) {
    CAPTURE(spec.name);
    const Problem<TestType> problem(spec);
    check_forward(problem, true);
  }
  check_forward(Problem<TestType>(cases.front()), false);
}

TEMPLATE_TEST_CASE("span_attention decoding", "", KERNEL_TYPES) {
  for (const Case& spec : decoding_cases) {
    CAPTURE(spec.name);
    Problem<TestType> problem(spec);
    REQUIRE(decodes<TestType>({problem.inputs(), {}, nullptr, nullptr}));
    check_decode(problem, true);
    problem.spoil();
    check_decode(problem, false);
  }
}

// Whatever a piece gives counts as if the keys had not been cut.
TEMPLATE_TEST_CASE("span_attention decoding scores at the ends of their range", "", KERNEL_TYPES) {
  using A = accumulate_t<TestType>;
  const Case spec{"ends", {1, 1, 1, 1, 300, 16, 16}, 1, -1, -1, false, true, true, false, Layout::heads_first};
  const auto infinite = std::numeric_limits<A>::infinity();
  const auto run = [&](auto change) {
    Problem<TestType> problem(spec);
    problem.key_bias.assign(problem.key_bias.size(), A(0));
    problem.sink = {-infinite};
    change(problem);
    const Attention<TestType> inputs = problem.inputs();
    const int64_t pieces = decode_pieces(inputs.sizes, inputs.span);
    Tensor<TestType> output(problem.grad_output.shape, spec.layout);
    std::vector<A> logsumexp(1), results(static_cast<size_t>(pieces * 16)), softmax(static_cast<size_t>(pieces * 2));
    launch_decode<TestType>({inputs, output.mutable_heads(), logsumexp.data(), nullptr},
                            {results.data(), softmax.data(), pieces});
    return std::pair{output.wide()[0], static_cast<double>(logsumexp[0])};
  };
  const auto hide = [&](auto& problem, int64_t begin, int64_t end) {
    std::fill(problem.key_bias.begin() + begin, problem.key_bias.begin() + end, -infinite);
  };
  // A piece hidden as a whole, and all of them.
  const double value = Problem<TestType>(spec).value.wide()[16 * 299];
  CHECK(run([&](auto& problem) { hide(problem, 0, 299); }).first == Approx(value).epsilon(rounded<TestType>));
  CHECK(run([&](auto& problem) { hide(problem, 0, 300); }) == std::pair{0.0, -infinity});
  // A sink counts once: beside one key of its score it has half.
  const auto [half, logsumexp] = run([&](auto& problem) {
    hide(problem, 0, 299);
    problem.query.for_each([](TestType& element) { element = TestType{}; });
    problem.sink = {A(0)};
  });
  CHECK(half == Approx(value / 2).epsilon(rounded<TestType>));
  CHECK(logsumexp == Approx(std::log(2.0)).epsilon(1e-6));
  for (const int64_t at : {0, 150, 299}) {
    for (const A score : {A(NAN), infinite}) {
      const auto [number, sum] = run([&](auto& problem) { problem.key_bias[at] = score; });
      CHECK(std::isnan(number));
      CHECK(std::isnan(sum));
    }
  }
}

TEMPLATE_TEST_CASE("span_attention sinks at the ends of their range", "", KERNEL_TYPES) {
  using A = accumulate_t<TestType>;
  const Case spec{"sinks", {1, 4, 1, 20, 20, 16, 16}, 1, -1, -1, false, true, true, false, Layout::heads_first};
  Problem<TestType> problem(spec);
  problem.key_bias.assign(problem.key_bias.size(), std::numeric_limits<A>::lowest());
  problem.sink = {A(NAN), std::numeric_limits<A>::infinity(), -std::numeric_limits<A>::infinity(), 0};
  Tensor<TestType> output(problem.grad_output.shape, spec.layout);
  std::vector<A> logsumexp(problem.logsumexp.size());
  launch_forward<TestType>({problem.inputs(), output.mutable_heads(), logsumexp.data(), nullptr});
  const auto outputs = output.wide(), values = problem.value.wide();
  // All keys weigh the same, or nothing next to a sink that is a number.
  double mean = 0;
  for (int64_t key = 0; key < 20; ++key) {
    mean += values[16 * key] / 20;
  }
  for (int64_t query = 0; query < 20; ++query) {
    const auto of_head = [&](int64_t head) { return outputs[(20 * head + query) * 16]; };
    const auto sum_of_head = [&](int64_t head) { return logsumexp[20 * head + query]; };
    CHECK(std::isnan(of_head(0)));
    CHECK(std::isnan(sum_of_head(0)));
    CHECK(std::isnan(of_head(1)));
    CHECK(std::isnan(sum_of_head(1)));
    CHECK(of_head(2) == Approx(mean).epsilon(rounded<TestType>));
    CHECK(sum_of_head(2) == std::numeric_limits<A>::lowest());
    CHECK(of_head(3) == 0);
    CHECK(sum_of_head(3) == 0);
  }
}

TEMPLATE_TEST_CASE("span_attention gradient to queries", "", KERNEL_TYPES) {
  for (const Case& spec : cases) {
    CAPTURE(spec.name);
    const Problem<TestType> problem(spec);
    check_query_gradient(problem);
  }
}

TEMPLATE_TEST_CASE("span_attention gradient to keys and values", "", KERNEL_TYPES) {
  for (const Case& spec : cases) {
    CAPTURE(spec.name);
    const Problem<TestType> problem(spec);
    check_key_gradient(problem, true, true, true);
  }
  const Problem<TestType> problem(cases.front());
  check_key_gradient(problem, true, false, false);
  check_key_gradient(problem, false, true, false);
  check_key_gradient(problem, false, false, true);
}

TEMPLATE_TEST_CASE("span_attention whatever nobody sees", "", KERNEL_TYPES) {
  for (const Case& spec : cases) {
    CAPTURE(spec.name);
    Problem<TestType> problem(spec);
    problem.spoil();
    check_forward(problem, true);
    check_query_gradient(problem);
    check_key_gradient(problem, true, true, true);
  }
}

TEMPLATE_TEST_CASE("span_attention gradients of logsumexp alone", "", KERNEL_TYPES) {
  for (const Case& spec : cases) {
    CAPTURE(spec.name);
    const Problem<TestType> problem(spec, false);
    const auto normalizer = problem.normalizer();
    const auto delta = accumulated_from<accumulate_t<TestType>>(problem.delta);
    Attention<TestType> inputs = problem.inputs();
    inputs.value = {};
    inputs.sizes.value_dim = 0;
    const auto gradient = [&](const Tensor<TestType>& of, bool of_query) {
      return filled(Tensor<TestType>(of.shape, spec.layout), [&](Tensor<TestType>& tensor) {
        const auto none = Heads<TestType>{}, wanted = tensor.mutable_heads();
        const AttentionBackward<TestType> args{
            inputs, {},     normalizer.data(), delta.data(), of_query ? wanted : none, of_query ? none : wanted,
            none,   nullptr};
        of_query ? launch_query_gradient(args) : launch_key_gradient(args);
      });
    };
    check_close("grad_query", gradient(problem.query, true), problem.grad_query, 2 * rounded<TestType>);
    check_close("grad_key", gradient(problem.key, false), problem.grad_key, 2 * rounded<TestType>);
  }
}

// Each query sees one key, at scores of any magnitude: its value is the output, and the gradient to a score is 0.
TEMPLATE_TEST_CASE("span_attention exactly a single key", "", KERNEL_TYPES) {
  using A = accumulate_t<TestType>;
  const Case spec{"one key", {1, 2, 1, 40, 40, 20, 70}, 1, 0, 0, false, false, false, false, Layout::heads_first};
  const Problem<TestType> problem(spec);
  const Tensor<TestType> like_query(problem.query.shape, spec.layout),
      like_value(problem.grad_output.shape, spec.layout);
  for (const double scale : {0.3, -7e4, 1e8}) {
    CAPTURE(scale);
    Attention<TestType> inputs = problem.inputs();
    inputs.scale = static_cast<A>(scale);
    std::vector<Normalizer<A>> normalizer(problem.logsumexp.size());
    std::vector<A> delta(normalizer.size());
    Tensor<TestType> output = like_value;
    launch_forward<TestType>({inputs, output.mutable_heads(), nullptr, normalizer.data()});
    launch_row_delta<TestType>({problem.grad_output.heads(), output.heads(), nullptr, delta.data(), problem.sizes});
    Tensor<TestType> grad_query = like_query, grad_key(problem.key.shape, spec.layout),
                     grad_value(problem.value.shape, spec.layout);
    const AttentionBackward<TestType> args{inputs,
                                           problem.grad_output.heads(),
                                           normalizer.data(),
                                           delta.data(),
                                           grad_query.mutable_heads(),
                                           grad_key.mutable_heads(),
                                           grad_value.mutable_heads(),
                                           nullptr};
    launch_query_gradient(args);
    launch_key_gradient(args);
    const auto values = problem.value.wide(), grads = problem.grad_output.wide();
    const size_t of_head = values.size();  // both heads see the same value
    for (size_t i = 0; i < output.wide().size(); ++i) {
      REQUIRE(output.wide()[i] == values[i % of_head]);
    }
    std::vector<double> sums(of_head);
    for (size_t i = 0; i < grads.size(); ++i) {
      sums[i % of_head] += grads[i];
    }
    check_close("grad_value", grad_value.wide(), sums, rounded<TestType>);
    for (const auto& gradient : {grad_query.wide(), grad_key.wide()}) {
      for (const double element : gradient) {
        REQUIRE(element == 0);
      }
    }
  }
}

TEMPLATE_TEST_CASE("span_attention delta of rows", "", KERNEL_TYPES) {
  using A = accumulate_t<TestType>;
  for (const Case& spec : cases) {
#if !defined(EVERY_SIZE)
    if (spec.sizes.num_queries > 64) {
      continue;
    }
#endif
    CAPTURE(spec.name);
    const Problem<TestType> problem(spec);
    // Another tensor of the output's shape serves as well.
    const Tensor<TestType> output(problem.grad_output.shape, spec.layout, 8);
    const auto grads = problem.grad_output.wide(), outputs = output.wide();
    for (const bool has_grad_logsumexp : {false, true}) {
      std::vector<double> expected(problem.delta.size());
      for (size_t i = 0; i < grads.size(); ++i) {
        expected[i / static_cast<size_t>(problem.sizes.value_dim)] += grads[i] * outputs[i];
      }
      for (size_t row = 0; row < expected.size(); ++row) {
        expected[row] -= has_grad_logsumexp ? problem.grad_logsumexp[row] : 0;
      }
      const auto delta = simt::same_in_every_order([&] {
        std::vector<A> result(expected.size(), A(NAN));
        launch_row_delta<TestType>({problem.grad_output.heads(), output.heads(),
                                    has_grad_logsumexp ? problem.grad_logsumexp.data() : nullptr, result.data(),
                                    problem.sizes});
        return result;
      });
      check_close("delta", as_double(delta), expected, accumulated<TestType>);
    }
  }
}

TEST_CASE("span_attention gradients to sinks and key biases") {
  for (const Case& spec : cases) {
    CAPTURE(spec.name);
    const Problem<float> problem(spec);
    const auto normalizer = problem.normalizer();
    const auto delta = accumulated_from<float>(problem.delta);
    if (spec.has_sink) {
      const auto gradient = simt::same_in_every_order([&] {
        std::vector<float> result(problem.grad_sink.size(), NAN);
        launch_sink_gradient<float>(
            {problem.sink.data(), normalizer.data(), delta.data(), result.data(), problem.sizes});
        return result;
      });
      check_close("grad_sink", as_double(gradient), problem.grad_sink, accumulated<float>);
    }
    const auto shares = accumulated_from<float>(problem.bias_shares);
    const auto gradient = simt::same_in_every_order([&] {
      std::vector<float> result(problem.grad_key_bias.size(), NAN);
      launch_key_bias_gradient(shares.data(), result.data(), problem.sizes);
      return result;
    });
    check_close("grad_key_bias", as_double(gradient), problem.grad_key_bias, accumulated<float>);
  }
}

}  // namespace torchops::kernels::span_attention
