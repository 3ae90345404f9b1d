// Attention's kernels on tiles against plain loops, without torch: forward, backward as a whole and in two passes.

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "bfloat16_numbers.h"
#include "catch.h"
#include "core/attention/cpu/delta_kernel.h"
#include "core/cpu/aligned_buffer.h"
#include "span_attention/cpu/backward_kernel.h"
#include "span_attention/cpu/forward_kernel.h"

namespace {

namespace attention = torchops::kernels::span_attention;
namespace on_tiles = torchops::kernels::span_attention::amx;
using attention::Sizes;
using attention::Span;
using torchops::kernels::bfloat16;
using torchops::kernels::Heads;

// [B, H, L, D], rows of which lie further apart than they are long; what lies between them is NaN.
struct Tensor {
  int64_t heads, length, size, stride;
  std::vector<bfloat16> numbers;

  Tensor(int64_t batch, int64_t num_heads, int64_t rows, int64_t columns)
      : heads(num_heads),
        length(rows),
        size(columns),
        stride(columns + 3),
        numbers(static_cast<size_t>(batch * num_heads * rows * (columns + 3)), bfloat16{0x7fff}) {}

  template <typename Generator>
  void fill(Generator& generator) {
    std::normal_distribution<double> normal;
    for (size_t i = 0; i < numbers.size(); ++i) {
      if (static_cast<int64_t>(i) % stride < size) {
        numbers[i] = rounded(normal(generator));
      }
    }
  }
  Heads<const bfloat16> read() const { return {numbers.data(), heads * length * stride, length * stride, stride}; }
  Heads<bfloat16> write() { return {numbers.data(), heads * length * stride, length * stride, stride}; }
  double at(int64_t b, int64_t h, int64_t row, int64_t d) const { return value_of(read().row(b, h, row)[d]); }
  bool gaps_are_nan() const {
    for (size_t i = 0; i < numbers.size(); ++i) {
      if (static_cast<int64_t>(i) % stride >= size && numbers[i].bits != 0x7fff) {
        return false;
      }
    }
    return true;
  }
};

bool same_bits(const Tensor& one, const Tensor& other) {
  return std::memcmp(one.numbers.data(), other.numbers.data(), one.numbers.size() * sizeof(bfloat16)) == 0;
}

struct Case {
  Sizes sizes;
  Span span;
  int64_t query_start;
  bool with_bias;
  bool with_sink;
};

const auto all = torchops::kernels::attention::unbounded;
const std::vector<Case> cases = {
    {{1, 1, 1, 64, 64, 64, 64}, {1, all, all, true}, 0, false, false},
    {{2, 2, 1, 33, 70, 40, 24}, {1, all, all, false}, 37, true, false},
    {{1, 4, 2, 16, 300, 32, 65}, {1, all, all, true}, 284, true, true},
    {{1, 3, 1, 130, 130, 1, 1}, {1, 9, 0, true}, 0, false, true},
    {{1, 2, 2, 200, 200, 129, 33}, {16, 32, 16, false}, 0, true, true},
    {{2, 1, 1, 100, 40, 17, 256}, {8, 0, 0, true}, 20, false, false},
    {{1, 2, 1, 600, 600, 64, 64}, {1, 300, 0, true}, 0, false, false},
};

// Everything that is computed, and the inputs it is computed of.
struct Run {
  Case what;
  Tensor query, key, value, grad_output, output, grad_query, grad_key, grad_value;
  std::vector<float> bias, sink, logsumexp, grad_logsumexp, delta, grad_bias;
  std::vector<attention::Normalizer<float>> normalizer;
  std::vector<int64_t> query_start;

  explicit Run(const Case& given)
      : what(given),
        query(sizes().batch, sizes().num_heads, sizes().num_queries, sizes().head_dim),
        key(sizes().batch, sizes().num_kv_heads, sizes().num_keys, sizes().head_dim),
        value(sizes().batch, sizes().num_kv_heads, sizes().num_keys, sizes().value_dim),
        grad_output(sizes().batch, sizes().num_heads, sizes().num_queries, sizes().value_dim),
        output(grad_output),
        grad_query(query),
        grad_key(key),
        grad_value(value),
        bias(static_cast<size_t>(sizes().batch * sizes().num_keys)),
        sink(static_cast<size_t>(sizes().num_heads)),
        logsumexp(static_cast<size_t>(sizes().batch * sizes().num_heads * sizes().num_queries)),
        grad_logsumexp(logsumexp.size()),
        delta(logsumexp.size()),
        grad_bias(static_cast<size_t>(sizes().batch * sizes().num_kv_heads * sizes().num_keys)),
        normalizer(logsumexp.size()),
        query_start(static_cast<size_t>(sizes().batch), given.query_start) {
    std::mt19937 generator(static_cast<unsigned>(sizes().num_keys));
    std::normal_distribution<float> normal;
    for (auto* const tensor : {&query, &key, &value, &grad_output}) {
      tensor->fill(generator);
    }
    for (auto* const numbers : {&bias, &sink, &grad_logsumexp}) {
      for (auto& number : *numbers) {
        number = normal(generator);
      }
    }
  }

  const Sizes& sizes() const { return what.sizes; }
  float scale() const { return 1 / std::sqrt(static_cast<float>(sizes().head_dim)); }
  attention::Attention<bfloat16> inputs() const {
    return {{query.read(), key.read(), value.read(), what.with_bias ? bias.data() : nullptr,
             what.with_sink ? sink.data() : nullptr, query_start.data(), nullptr, sizes(), scale()},
            what.span};
  }
  attention::AttentionBackward<bfloat16> backward() {
    return {inputs(),           grad_output.read(), normalizer.data(),  delta.data(),
            grad_query.write(), grad_key.write(),   grad_value.write(), what.with_bias ? grad_bias.data() : nullptr};
  }
};

using Memory = torchops::AlignedBuffer<char>;
Memory nans(int64_t bytes) {
  Memory memory(static_cast<size_t>(bytes));
  std::memset(memory.data(), 0xff, static_cast<size_t>(bytes));
  return memory;
}

// As so many threads would split the units.
template <typename Work>
void split(int64_t units, int64_t threads, int64_t scratch_bytes, const Work& work) {
  const int64_t share = (units + threads - 1) / threads;
  for (int64_t begin = 0; begin < units; begin += share) {
    Memory scratch = nans(scratch_bytes);
    work(scratch.data(), begin, std::min(begin + share, units));
  }
}

void compute_forward(Run& run, int64_t threads) {
  const Sizes& sizes = run.sizes();
  const int64_t heads = sizes.batch * sizes.num_kv_heads;
  Memory packs = nans(heads * on_tiles::forward_pack_bytes<bfloat16>(sizes));
  split(heads * on_tiles::forward_pack_units<bfloat16>(sizes), threads, 0, [&](char*, int64_t begin, int64_t end) {
    on_tiles::forward_pack<bfloat16>(run.inputs(), 0, packs.data(), begin, end);
  });
  const attention::AttentionForward<bfloat16> args{run.inputs(), run.output.write(), run.logsumexp.data(),
                                                   run.normalizer.data()};
  split(heads * on_tiles::forward_units<bfloat16>(sizes), threads, on_tiles::forward_scratch_bytes<bfloat16>(sizes),
        [&](char* scratch, int64_t begin, int64_t end) {
          on_tiles::forward<bfloat16>(args, 0, packs.data(), scratch, begin, end);
        });
}

void compute_backward(Run& run, bool whole_heads, int64_t threads) {
  const Sizes& sizes = run.sizes();
  const int64_t heads = sizes.batch * sizes.num_kv_heads;
  torchops::kernels::attention::amx::row_delta<bfloat16>(
      {run.grad_output.read(), run.output.read(), run.grad_logsumexp.data(), run.delta.data(), sizes}, 0,
      static_cast<int64_t>(run.delta.size()));
  const auto args = run.backward();
  Memory packs = nans(heads * on_tiles::backward_pack_bytes<bfloat16>(sizes));
  split(heads * on_tiles::backward_pack_units<bfloat16>(sizes), threads, 0, [&](char*, int64_t begin, int64_t end) {
    on_tiles::backward_pack<bfloat16>(args, 0, packs.data(), begin, end);
  });
  const auto scratch_bytes = on_tiles::backward_scratch_bytes<bfloat16>(sizes, whole_heads);
  if (whole_heads) {
    split(heads, threads, scratch_bytes, [&](char* scratch, int64_t begin, int64_t end) {
      on_tiles::backward_heads<bfloat16>(args, 0, packs.data(), scratch, begin, end);
    });
    return;
  }
  split(heads * on_tiles::backward_query_units<bfloat16>(sizes), threads, scratch_bytes,
        [&](char* scratch, int64_t begin, int64_t end) {
          on_tiles::backward_queries<bfloat16>(args, 0, packs.data(), scratch, begin, end);
        });
  split(heads * on_tiles::backward_key_units<bfloat16>(sizes), threads, scratch_bytes,
        [&](char* scratch, int64_t begin, int64_t end) {
          on_tiles::backward_keys<bfloat16>(args, 0, packs.data(), scratch, begin, end);
        });
}

// The largest error, relative to the largest number.
struct Errors {
  double error = 0, largest = 1e-30;
  void add(double actual, double expected) {
    error = std::max(error, actual == expected ? 0 : std::abs(actual - expected));
    largest = std::max(largest, std::isinf(expected) ? 0 : std::abs(expected));
    all_numbers = all_numbers && !std::isnan(actual);
  }
  bool all_numbers = true;
  bool within(double tolerance) const { return all_numbers && error <= tolerance * largest; }
};

struct Expected {
  Errors output, logsumexp, grad_query, grad_key, grad_value, grad_bias;
};

// In double precision, of what the run was given.
Expected compare(const Run& run) {
  const Sizes& s = run.sizes();
  Expected errors;
  const auto inputs = run.inputs();
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t kv = 0; kv < s.num_kv_heads; ++kv) {
      std::vector<double> grad_key(static_cast<size_t>(s.num_keys * s.head_dim)),
          grad_value(static_cast<size_t>(s.num_keys * s.value_dim)), grad_bias(static_cast<size_t>(s.num_keys));
      for (int64_t h = kv * s.group_size(); h < (kv + 1) * s.group_size(); ++h) {
        for (int64_t i = 0; i < s.num_queries; ++i) {
          const auto row = static_cast<size_t>((b * s.num_heads + h) * s.num_queries + i);
          const auto keys = attention::visible_keys(run.what.span, inputs.sequence(b), i);
          double sum = run.what.with_sink ? std::exp(static_cast<double>(run.sink[static_cast<size_t>(h)])) : 0;
          std::vector<double> p(static_cast<size_t>(s.num_keys)), output(static_cast<size_t>(s.value_dim)),
              grad_query(static_cast<size_t>(s.head_dim));
          for (int64_t j = keys.begin; j < keys.end; ++j) {
            double score = 0;
            for (int64_t d = 0; d < s.head_dim; ++d) {
              score += run.query.at(b, h, i, d) * run.key.at(b, kv, j, d);
            }
            score =
                score * run.scale() + (run.what.with_bias ? run.bias[static_cast<size_t>(b * s.num_keys + j)] : 0.0F);
            sum += p[static_cast<size_t>(j)] = std::exp(score);
          }
          errors.logsumexp.add(run.logsumexp[row], std::log(sum));
          double delta = 0;
          for (int64_t d = 0; d < s.value_dim; ++d) {
            for (int64_t j = keys.begin; j < keys.end; ++j) {
              output[static_cast<size_t>(d)] += p[static_cast<size_t>(j)] / sum * run.value.at(b, kv, j, d);
            }
            errors.output.add(run.output.at(b, h, i, d), output[static_cast<size_t>(d)]);
            delta += output[static_cast<size_t>(d)] * run.grad_output.at(b, h, i, d);
          }
          for (int64_t j = keys.begin; j < keys.end; ++j) {
            const double probability = p[static_cast<size_t>(j)] / sum;
            double grad = run.grad_logsumexp[row] - delta;
            for (int64_t d = 0; d < s.value_dim; ++d) {
              grad += run.grad_output.at(b, h, i, d) * run.value.at(b, kv, j, d);
              grad_value[static_cast<size_t>(j * s.value_dim + d)] += probability * run.grad_output.at(b, h, i, d);
            }
            grad *= probability;
            grad_bias[static_cast<size_t>(j)] += grad;
            for (int64_t d = 0; d < s.head_dim; ++d) {
              grad_query[static_cast<size_t>(d)] += grad * run.scale() * run.key.at(b, kv, j, d);
              grad_key[static_cast<size_t>(j * s.head_dim + d)] += grad * run.scale() * run.query.at(b, h, i, d);
            }
          }
          for (int64_t d = 0; d < s.head_dim; ++d) {
            errors.grad_query.add(run.grad_query.at(b, h, i, d), grad_query[static_cast<size_t>(d)]);
          }
        }
      }
      for (int64_t j = 0; j < s.num_keys; ++j) {
        for (int64_t d = 0; d < s.head_dim; ++d) {
          errors.grad_key.add(run.grad_key.at(b, kv, j, d), grad_key[static_cast<size_t>(j * s.head_dim + d)]);
        }
        for (int64_t d = 0; d < s.value_dim; ++d) {
          errors.grad_value.add(run.grad_value.at(b, kv, j, d), grad_value[static_cast<size_t>(j * s.value_dim + d)]);
        }
        const auto at = static_cast<size_t>((b * s.num_kv_heads + kv) * s.num_keys + j);
        errors.grad_bias.add(run.what.with_bias ? run.grad_bias[at] : grad_bias[static_cast<size_t>(j)],
                             grad_bias[static_cast<size_t>(j)]);
      }
    }
  }
  return errors;
}

}  // namespace

TEST_CASE("attention on tiles is what plain loops compute, the same bits split among any number of threads") {
  for (size_t index = 0; index < cases.size(); ++index) {
    CAPTURE(index);
    Run run(cases[index]);
    compute_forward(run, 1);
    compute_backward(run, true, 1);
    const Expected errors = compare(run);
    CAPTURE(errors.output.error, errors.logsumexp.error, errors.grad_query.error, errors.grad_key.error);
    CAPTURE(errors.grad_value.error, errors.grad_bias.error);
    CHECK(errors.output.within(1e-2));
    CHECK(errors.logsumexp.within(1e-5));
    CHECK(errors.grad_query.within(2e-2));
    CHECK(errors.grad_key.within(2e-2));
    CHECK(errors.grad_value.within(1e-2));
    CHECK(errors.grad_bias.within(2e-2));
    for (const auto* const tensor : {&run.output, &run.grad_query, &run.grad_key, &run.grad_value}) {
      CHECK(tensor->gaps_are_nan());
    }
    for (const int64_t threads : {2, 5, 1000}) {
      Run again(cases[index]);
      compute_forward(again, threads);
      compute_backward(again, threads == 2, threads);
      CHECK(same_bits(again.output, run.output));
      CHECK(same_bits(again.grad_query, run.grad_query));
      CHECK(same_bits(again.grad_key, run.grad_key));
      CHECK(same_bits(again.grad_value, run.grad_value));
      CHECK(again.logsumexp == run.logsumexp);
      CHECK(again.grad_bias == run.grad_bias);
    }
  }
}

TEST_CASE("where a query sees a single key, its value is the output and no gradient reaches the score") {
  Run run({{1, 1, 1, 40, 40, 48, 70}, {1, 0, 0, true}, 0, true, false});
  std::fill(run.grad_logsumexp.begin(), run.grad_logsumexp.end(), 0.0F);
  compute_forward(run, 1);
  compute_backward(run, true, 1);
  CHECK(same_bits(run.output, run.value));
  for (int64_t i = 0; i < 40; ++i) {
    for (int64_t d = 0; d < 48; ++d) {
      CHECK(run.grad_query.at(0, 0, i, d) == 0);
      CHECK(run.grad_key.at(0, 0, i, d) == 0);
    }
    CHECK(run.grad_bias[static_cast<size_t>(i)] == 0);
  }
}

TEST_CASE("what no query sees is not multiplied, and a query that sees nothing gets zeros") {
  Run run({{1, 1, 1, 60, 90, 33, 33}, {16, 0, 0, true}, 0, false, false});
  Run expected(run);
  for (int64_t row = 60; row < 90; ++row) {
    for (auto* const tensor : {&run.key, &run.value}) {
      for (int64_t d = 0; d < 33; ++d) {
        tensor->write().row(0, 0, row)[d] = bfloat16{0x7fc0};
      }
    }
  }
  compute_forward(run, 1);
  compute_backward(run, true, 1);
  compute_forward(expected, 1);
  compute_backward(expected, true, 1);
  CHECK(same_bits(run.output, expected.output));
  CHECK(same_bits(run.grad_query, expected.grad_query));
  CHECK(same_bits(run.grad_key, expected.grad_key));
  CHECK(same_bits(run.grad_value, expected.grad_value));
  // Queries from 20 on lie behind the last key.
  Run blind({{1, 1, 1, 40, 50, 8, 8}, {1, 0, 0, true}, 30, false, false});
  compute_forward(blind, 1);
  for (int64_t i = 20; i < 40; ++i) {
    CHECK(blind.output.at(0, 0, i, 3) == 0);
    CHECK(blind.logsumexp[static_cast<size_t>(i)] == -INFINITY);
  }
}
