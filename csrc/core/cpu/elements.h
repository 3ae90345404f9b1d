#pragma once

#include "core/cpu/matrix_product.h"

// The numbers of a dtype as elements of matrix products.

namespace torchops::kernels::inline TORCHOPS_LEVEL {

// What a dtype is multiplied as.
template <typename T>
struct multiplicand {
  using type = accumulate_t<T>;
};
#if defined(__AVX512BF16__)
template <>
struct multiplicand<bfloat16> {
  using type = bfloat16_pair;
};
#endif
template <typename T>
using multiplicand_t = typename multiplicand<T>::type;

template <typename E>
inline constexpr bool is_pair = element<E>::depth == 2;

template <typename E>
inline constexpr int64_t lane_count = vector_bytes / static_cast<int64_t>(sizeof(E));

constexpr int64_t smaller(int64_t one, int64_t other) {
  return one < other ? one : other;
}
constexpr int64_t divide_up(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}
constexpr int64_t round_up(int64_t count, int64_t unit) {
  return divide_up(count, unit) * unit;
}

// Elements that hold `size` numbers along the depth.
template <typename E>
constexpr int64_t depth_of(int64_t size) {
  return divide_up(size, element<E>::depth);
}

// A vector of elements along the depth, of which `used` numbers are left.
template <typename E, typename T>
inline __attribute__((always_inline)) typename element<E>::vector load_elements(const T* from, int64_t used) {
  if constexpr (is_pair<E>) {
    vuint words = {};
    if (used >= 2 * lane_count<E>) {
      __builtin_memcpy(&words, from, sizeof(words));
    } else {
      __builtin_memcpy(&words, from, static_cast<size_t>(used) * sizeof(T));
    }
    return words;
  } else {
    return load_piece(from, static_cast<int>(used < lanes<T> ? used : lanes<T>));
  }
}

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
