#pragma once

#include "core/cpu/simd.h"
#include "tokens/best_destination.h"

// Rows of the metric as the integers that similarities are made of: tokens/best_destination.h.

namespace torchops::kernels::tokens::TORCHOPS_LEVEL {

// Adding it to a float of magnitude below 2^22 rounds that to an integer, ties to even.
inline constexpr float rounding = 0x1.8p23f;

// The bits of the largest magnitude. As integers they are in the order of the magnitudes, with infinity and NaN on top.
template <typename T>
typename lane_index<sizeof(accumulate_t<T>)>::type largest_magnitude_bits(const T* row, int64_t size) {
  using Bits = typename lane_index<sizeof(accumulate_t<T>)>::type;
  constexpr auto all_but_sign = static_cast<Bits>(sizeof(Bits) == sizeof(int32_t) ? INT32_MAX : INT64_MAX);
  vec<Bits> largest = {};
  for_each_vector<T>(size, [&](int64_t k, int count) {
    const vec<Bits> bits = bit_cast<vec<Bits>>(load_piece(row + k, count)) & all_but_sign;
    largest = bits > largest ? bits : largest;
  });
  return largest_lane<Bits>(largest);
}

// A vector of y: numbers of a row times `factor` twice, rounded to float.
template <typename T>
inline vfloat load_scaled(const T* from, int count, accumulate_t<T> factor) {
  if constexpr (sizeof(accumulate_t<T>) == sizeof(float)) {
    return load_piece(from, count) * factor * factor;
  } else {
    using Half = typename vector_of<float, vector_bytes / 2>::type;
    Half halves[2];
    for (int h = 0; h < 2; ++h) {
      const int left = count - h * lanes<T> < 0 ? 0 : count - h * lanes<T>;
      const auto piece = load_piece(from + (left == 0 ? 0 : h * lanes<T>), left < lanes<T> ? left : lanes<T>);
      halves[h] = __builtin_convertvector(piece * factor * factor, Half);
    }
    vfloat both;
    __builtin_memcpy(&both, halves, sizeof(both));
    return both;
  }
}

// Writes the integers of a row, returns the inverse of their length.
template <typename T>
float integer_row(const T* row, int64_t size, int16_t* integers) {
  using A = accumulate_t<T>;
  using Bits = typename lane_index<sizeof(A)>::type;
  const Bits largest_bits = largest_magnitude_bits(row, size);
  const bool finite = largest_bits < bit_cast<Bits>(static_cast<A>(__builtin_inf()));
  if (largest_bits == 0 || !finite) {
    __builtin_memset(integers, 0, static_cast<size_t>(size) * sizeof(int16_t));
    return finite ? 0.0F : __builtin_nanf("");
  }
  int exponent;
  __builtin_frexp(static_cast<double>(bit_cast<A>(largest_bits)), &exponent);
  const A factor = static_cast<A>(__builtin_ldexp(1.0, half_shift(exponent)));

  constexpr int64_t chunk = 128;  // its sum is below 2^24, and so exact
  double bound = static_cast<double>(size);
  for (int64_t first = 0; first < size; first += chunk) {
    vfloat sum = {};
    for_each_vector<float>(size - first < chunk ? size - first : chunk, [&](int64_t k, int count) {
      const vfloat y = load_scaled(row + first + k, count, factor);
      const vfloat t = ((y < 0 ? -y : y) + rounding) - rounding;
      sum += t * (t + 1);
    });
    bound += 4 * static_cast<double>(sum_lanes<float>(sum));
  }
  const auto scale = static_cast<float>(integer_scale(bound));

  vint squares = {};
  for_each_vector<float>(size, [&](int64_t k, int count) {
    const vfloat rounded = load_scaled(row + k, count, factor) * scale + rounding;
    const vint q = bit_cast<vint>(rounded) - bit_cast<int32_t>(rounding);
    squares += q * q;
    const auto narrowed = __builtin_convertvector(q, typename vector_of<int16_t, vector_bytes / 2>::type);
    __builtin_memcpy(integers + k, &narrowed, static_cast<size_t>(count) * sizeof(int16_t));
  });
  return static_cast<float>(1 / __builtin_sqrt(static_cast<double>(sum_lanes<int32_t>(squares))));
}

}  // namespace torchops::kernels::tokens::TORCHOPS_LEVEL
