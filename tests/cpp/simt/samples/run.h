#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/cuda/launch.h"
#include "numbers.h"
#include "orders.h"
#include "samples/add_up.cuh"
#include "samples/center_rows.cuh"
#include "samples/matmul.cuh"
#include "samples/segment_sum.cuh"

// The sample kernels on inputs of odd sizes, next to the same in plain C++. Inputs are small whole
// numbers: every order of summation gives the same bits.

namespace torchops::kernels::samples {

struct Outcome {
  std::vector<float> actual;
  std::vector<float> expected;
};

template <typename T, Mutation mutation = Mutation::none>
Outcome run_center_rows(int64_t num_rows = 3, int64_t num_columns = 72, unsigned threads = 128) {
  // The mean is a whole number too.
  auto input = simt::whole_numbers(static_cast<size_t>(num_rows * num_columns), 1);
  std::vector<float> expected;
  for (int64_t row = 0; row < num_rows; ++row) {
    float* first = input.data() + row * num_columns;
    float sum = 0;
    for (int64_t column = 0; column < num_columns; ++column) {
      sum += first[column];
    }
    for (; static_cast<int64_t>(sum) % num_columns != 0; --sum) {
      --first[static_cast<int64_t>(sum) & 1];
    }
    for (int64_t column = 0; column < num_columns; ++column) {
      expected.push_back(first[column] - sum / static_cast<float>(num_columns));
    }
  }
  const auto in = simt::narrowed<T>(input);
  const auto actual = simt::same_in_every_order([&] {
    std::vector<T> out(in.size());
    device::launch({num_rows, threads, center_rows_shared(threads)}, center_rows<T, mutation>, in.data(), out.data(),
                   num_columns);
    return out;
  });
  return {simt::widened(actual), expected};
}

template <typename T, Mutation mutation = Mutation::none>
Outcome run_matmul(int m = 50, int n = 40, int k = 104) {
  const auto a = simt::whole_numbers(static_cast<size_t>(m) * k, 2);
  const auto b = simt::whole_numbers(static_cast<size_t>(k) * n, 3);
  std::vector<float> expected(static_cast<size_t>(m) * n);
  for (int row = 0; row < m; ++row) {
    for (int column = 0; column < n; ++column) {
      for (int depth = 0; depth < k; ++depth) {
        expected[row * n + column] += a[row * k + depth] * b[depth * n + column];
      }
    }
  }
  const auto a_narrow = simt::narrowed<T>(a);
  const auto b_narrow = simt::narrowed<T>(b);
  const auto actual = simt::same_in_every_order([&] {
    std::vector<float> c(expected.size());
    const auto tiles = [](int size) { return (size + matmul_tile - 1) / matmul_tile; };
    device::launch({{tiles(n), tiles(m)}, matmul_threads, matmul_shared<T>()}, matmul<T, mutation>, a_narrow.data(),
                   b_narrow.data(), c.data(), m, n, k);
    return c;
  });
  return {actual, expected};
}

template <typename T, Mutation mutation = Mutation::none>
Outcome run_segment_sum(int64_t num_rows = 100, int64_t num_segments = 5, int64_t num_channels = 40) {
  const auto input = simt::whole_numbers(static_cast<size_t>(num_rows * num_channels), 4);
  std::vector<float> expected(static_cast<size_t>(num_segments * num_channels));
  std::vector<int64_t> offsets = {0};
  std::vector<int64_t> members;
  for (int64_t segment = 0; segment < num_segments; ++segment) {
    for (int64_t row = 0; row < num_rows; ++row) {
      // Segment 0 has most rows, the last one none.
      if (std::min<int64_t>(row % 7 % 5, 4) % (num_segments - 1) == segment) {
        members.push_back(row);
        for (int64_t channel = 0; channel < num_channels; ++channel) {
          expected[segment * num_channels + channel] += input[row * num_channels + channel];
        }
      }
    }
    offsets.push_back(static_cast<int64_t>(members.size()));
  }
  const auto in = simt::narrowed<T>(input);
  const auto actual = simt::same_in_every_order([&] {
    std::vector<T> out(expected.size());
    constexpr unsigned threads = 128;
    device::launch({(num_segments + 3) / 4, threads, segment_sum_shared(threads)}, segment_sum<T, mutation>, in.data(),
                   offsets.data(), members.data(), out.data(), num_segments, num_channels);
    return out;
  });
  return {simt::widened(actual), expected};
}

template <Mutation mutation = Mutation::none>
Outcome run_add_up(int64_t count = 200) {
  const auto input = simt::whole_numbers(static_cast<size_t>(count), 5);
  float expected = 0;
  for (float number : input) {
    expected += number;
  }
  const auto actual = simt::same_in_every_order([&] {
    std::vector<float> total(1);
    device::launch({(count + 31) / 32, 32}, add_up<mutation>, input.data(), total.data(), count);
    return total;
  });
  return {actual, {expected}};
}

}  // namespace torchops::kernels::samples
