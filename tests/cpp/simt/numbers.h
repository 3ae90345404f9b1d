#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/cuda/device.cuh"

// Numbers to test with.

namespace torchops::simt {

// Whole numbers from -8 to 8 without a pattern, whose sums of products are exact in every order.
inline std::vector<float> whole_numbers(size_t count, uint32_t seed) {
  std::vector<float> numbers(count);
  uint32_t state = seed * 747796405U + 1;
  for (float& number : numbers) {
    state = state * 1664525U + 1013904223U;
    number = static_cast<float>(static_cast<int>(state >> 16) % 17 - 8);
  }
  return numbers;
}

template <typename T, typename Number>
std::vector<T> narrowed(const std::vector<Number>& numbers) {
  // As long as it is and no longer: AddressSanitizer does not see the spare capacity of a vector.
  std::vector<T> result(numbers.size());
  std::transform(numbers.begin(), numbers.end(), result.begin(),
                 [](Number x) { return device::narrow<T>(static_cast<kernels::accumulate_t<T>>(x)); });
  return result;
}

template <typename Number = float, typename T>
std::vector<Number> widened(const std::vector<T>& numbers) {
  std::vector<Number> result(numbers.size());
  std::transform(numbers.begin(), numbers.end(), result.begin(),
                 [](T x) { return static_cast<Number>(device::widen(x)); });
  return result;
}

}  // namespace torchops::simt
