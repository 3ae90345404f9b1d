#pragma once

#include <cstddef>
#include <cstdint>

#include "core/cpu/intrinsics.h"
#include "core/scalar.h"

// Vectors for kernel files, on GCC's vector extension: arithmetic, comparisons and ?: work lane by
// lane. Their width follows the level the file is compiled for, and everything here lives in the
// level's namespace, so that no two levels ever share a function.
// Kernels compute in accumulate_t<T> and load and store T: bfloat16 and float16 are converted on the way.

#ifndef TORCHOPS_LEVEL
#error "simd.h belongs in *_kernel.cpp files, which are compiled once per level"
#endif

namespace torchops::kernels::inline TORCHOPS_LEVEL {

#if defined(__AVX512F__)
inline constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
inline constexpr int vector_bytes = 32;
#else
inline constexpr int vector_bytes = 16;
#endif

template <typename Lane, int bytes = vector_bytes>
struct vector_of {
  typedef Lane type __attribute__((vector_size(bytes)));
};
template <typename Lane>
using vec = typename vector_of<Lane>::type;

// Lanes of the vector a row of T is processed with.
template <typename T>
inline constexpr int lanes = vector_bytes / static_cast<int>(sizeof(accumulate_t<T>));

using vfloat = vec<float>;
using vint = vec<int32_t>;
using vuint = vec<uint32_t>;
// As many 16-bit lanes as vfloat has 32-bit ones.
using vhalfwords = vector_of<uint16_t, vector_bytes / 2>::type;

template <typename Lane>
vec<Lane> broadcast(Lane value) {
  // value - vec{} and not vec{} + value: the latter is a real addition that maps -0 to +0.
  return value - vec<Lane>{};
}

// 0, 1, 2, ...
template <typename Lane>
vec<Lane> lane_numbers() {
  vec<Lane> numbers;
  for (int lane = 0; lane < vector_bytes / static_cast<int>(sizeof(Lane)); ++lane) {
    numbers[lane] = static_cast<Lane>(lane);
  }
  return numbers;
}

// The integer that goes with lanes of a size.
template <size_t size>
struct lane_index {
  using type = int32_t;
};
template <>
struct lane_index<8> {
  using type = int64_t;
};

template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- conversions ------------------------------------------------------------------------------

// By name, for g++ 12 makes three shuffles of __builtin_convertvector.
inline vuint widen_words(vhalfwords words) {
#if defined(__AVX512F__)
  return bit_cast<vuint>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(words)));
#elif defined(__AVX2__)
  return bit_cast<vuint>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(words)));
#else
  return __builtin_convertvector(words, vuint);
#endif
}

inline vfloat widen(vhalfwords bits, bfloat16) {
  return bit_cast<vfloat>(widen_words(bits) << 16);
}

// Round to nearest, ties to even; every NaN becomes the quiet one, as in torch.
inline vhalfwords narrow(vfloat value, bfloat16) {
  const auto bits = bit_cast<vuint>(value);
  const vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vuint quiet_nan = vuint{} + 0x7fc0;
  return __builtin_convertvector(value == value ? rounded : quiet_nan, vhalfwords);
}

#if defined(__AVX512F__)
// The maskz forms with a full mask are the plain instructions; for the plain forms g++ 12 warns about
// an uninitialized variable in its own header.
inline vfloat widen(vhalfwords bits, float16) {
  return bit_cast<vfloat>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits)));
}
inline vhalfwords narrow(vfloat value, float16) {
  return bit_cast<vhalfwords>(_mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
inline vfloat widen(vhalfwords bits, float16) {
  return bit_cast<vfloat>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
}
inline vhalfwords narrow(vfloat value, float16) {
  return bit_cast<vhalfwords>(_mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
}
#else
inline vfloat widen(vhalfwords halves, float16) {
  const vuint bits = widen_words(halves);
  const vuint magnitude = (bits & 0x7fff) << 13;
  // 2^112 moves the exponent's bias from float16's to float32's, and makes subnormals normal.
  const vuint scaled = bit_cast<vuint>(bit_cast<vfloat>(magnitude) * 0x1p112f);
  const vuint infinity_or_nan = magnitude | 0x7f800000;
  const vuint finite_limit = vuint{} + (0x7c00u << 13);
  return bit_cast<vfloat>(((bits & 0x8000) << 16) | (magnitude >= finite_limit ? infinity_or_nan : scaled));
}
inline vhalfwords narrow(vfloat value, float16) {
  const auto bits = bit_cast<vuint>(value);
  const vuint magnitude = bits & 0x7fffffff;
  // Normal results: round to nearest even at bit 13, then move the exponent's bias.
  const vuint normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal results: an addition in which 0.5 has its last bit where 2^-24 is, rounds there.
  const vuint subnormal = bit_cast<vuint>(bit_cast<vfloat>(magnitude) + 0.5f) - bit_cast<vuint>(vfloat{} + 0.5f);
  const vuint smallest_normal = vuint{} + (113u << 23);
  const vuint smallest_overflow = vuint{} + 0x477ff000;  // 65520
  const vuint infinity = vuint{} + 0x7c00;
  const vuint quiet_nan = 0x7e00 | ((magnitude >> 13) & 0x1ff);
  vuint result = magnitude < smallest_normal ? subnormal : normal;
  result = magnitude >= smallest_overflow ? infinity : result;
  result = value == value ? result : quiet_nan;
  return __builtin_convertvector(result | ((bits >> 16) & 0x8000), vhalfwords);
}
#endif

// ---- memory -----------------------------------------------------------------------------------

template <typename T>
vec<accumulate_t<T>> load(const T* from) {
  if constexpr (sizeof(T) == sizeof(uint16_t)) {
    vhalfwords bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    return widen(bits, T{});
  } else {
    vec<T> value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
  }
}

template <typename T>
void store(T* to, vec<accumulate_t<T>> value) {
  if constexpr (sizeof(T) == sizeof(uint16_t)) {
    const vhalfwords bits = narrow(value, T{});
    __builtin_memcpy(to, &bits, sizeof(bits));
  } else {
    __builtin_memcpy(to, &value, sizeof(value));
  }
}

// The first `count` lanes; the others are 0 and are not read, resp. not written.
template <typename T>
vec<accumulate_t<T>> load_partial(const T* from, int count) {
  T buffer[lanes<T>] = {};
  __builtin_memcpy(buffer, from, static_cast<size_t>(count) * sizeof(T));
  return load(buffer);
}

template <typename T>
void store_partial(T* to, vec<accumulate_t<T>> value, int count) {
  T buffer[lanes<T>];
  store(buffer, value);
  __builtin_memcpy(to, buffer, static_cast<size_t>(count) * sizeof(T));
}

// Rows of a few kilobytes, four vectors at a time: as measured faster than memcpy, which here and there
// picks an instruction for longer blocks.
template <typename T>
void copy_row(T* to, const T* from, int64_t size) {
  using Block = typename vector_of<char>::type;
  auto* out = reinterpret_cast<char*>(to);
  const auto* in = reinterpret_cast<const char*>(from);
  int64_t bytes = size * static_cast<int64_t>(sizeof(T));
  constexpr int64_t step = 4 * vector_bytes;
  for (; bytes >= step; bytes -= step, in += step, out += step) {
    Block block[4];
    __builtin_memcpy(block, in, sizeof(block));
    __builtin_memcpy(out, block, sizeof(block));
  }
  __builtin_memcpy(out, in, static_cast<size_t>(bytes));
}

// ---- transposition ----------------------------------------------------------------------------

// The lanes of two vectors by turns: those of their first halves (half 0), or of their second (half 1).
template <int half, typename Vector>
inline __attribute__((always_inline)) Vector interleave(Vector one, Vector other) {
  constexpr int size = sizeof(Vector) / sizeof(one[0]);
  vec<typename lane_index<sizeof(one[0])>::type> order;
  for (int lane = 0; lane < size; ++lane) {
    order[lane] = half * size / 2 + lane / 2 + lane % 2 * size;
  }
  return __builtin_shuffle(one, other, order);
}

// A square of as many rows as a vector has lanes.
template <typename Vector, int size>
inline __attribute__((always_inline)) void transpose(Vector (&rows)[size]) {
  for (int step = 1; step < size; step *= 2) {
    Vector next[size];
    for (int row = 0; row < size / 2; ++row) {
      next[2 * row] = interleave<0>(rows[row], rows[row + size / 2]);
      next[2 * row + 1] = interleave<1>(rows[row], rows[row + size / 2]);
    }
    for (int row = 0; row < size; ++row) {
      rows[row] = next[row];
    }
  }
}

// A square of numbers, loaded row by row, turned and handed to store_row(row, numbers).
template <typename A, typename Load, typename Store>
inline __attribute__((always_inline)) void turn(const Load& load_row, const Store& store_row) {
  vec<A> square[lanes<A>];
  for (int row = 0; row < lanes<A>; ++row) {
    square[row] = load_row(row);
  }
  transpose(square);
  for (int row = 0; row < lanes<A>; ++row) {
    store_row(row, square[row]);
  }
}

// ---- reductions -------------------------------------------------------------------------------

// Halves combined with halves by a function of two vectors or two lanes: the same order for every vector
// of a level.
template <typename Lane, int bytes = vector_bytes, typename Combine>
Lane combine_lanes(typename vector_of<Lane, bytes>::type value, const Combine& combine) {
  if constexpr (bytes == sizeof(Lane)) {
    return value[0];
  } else {
    using Half = typename vector_of<Lane, bytes / 2>::type;
    Half halves[2];
    __builtin_memcpy(halves, &value, sizeof(value));
    return combine_lanes<Lane, bytes / 2>(combine(halves[0], halves[1]), combine);
  }
}

template <typename Lane>
Lane sum_lanes(vec<Lane> value) {
  return combine_lanes<Lane>(value, [](auto one, auto other) { return one + other; });
}

// Pairs of neighbouring vectors are added up, `unit` lanes of either by turns, until there is one vector. Lanes stay
// within 16 bytes for as long as that is possible: moving them further takes several times as long.
template <int unit, typename Vector, int size>
inline __attribute__((always_inline)) void add_pairs(Vector (&rows)[size]) {
  constexpr int in_place = 16 / sizeof(rows[0][0]), group = in_place > 2 * unit ? in_place : 2 * unit;
  if constexpr (unit < size) {
    vec<typename lane_index<sizeof(rows[0][0])>::type> first, second;
    for (int lane = 0; lane < size; ++lane) {
      const int turn = lane % group / unit;
      first[lane] = lane / group * group + turn / 2 * unit + lane % unit + turn % 2 * size;
      second[lane] = first[lane] + group / 2;
    }
    for (int pair = 0; pair < size / 2 / unit; ++pair) {
      const Vector one = rows[2 * pair], other = rows[2 * pair + 1];
      rows[pair] = __builtin_shuffle(one, other, first) + __builtin_shuffle(one, other, second);
    }
    add_pairs<2 * unit>(rows);
  }
}

// The sum of the lanes of each of as many vectors as a vector has lanes, all added up in the same order.
template <typename Vector, int size>
inline __attribute__((always_inline)) Vector sums_of_lanes(Vector (&rows)[size]) {
  add_pairs<1>(rows);
  return rows[0];
}

template <typename Lane>
Lane largest_lane(vec<Lane> value) {
  return combine_lanes<Lane>(value, [](auto one, auto other) { return one > other ? one : other; });
}

template <typename Lane>
Lane smallest_lane(vec<Lane> value) {
  return combine_lanes<Lane>(value, [](auto one, auto other) { return one < other ? one : other; });
}

// Calls body(first, count) for the pieces of a row of `size` elements: whole vectors, then the rest.
template <typename T, typename Body>
inline __attribute__((always_inline)) void for_each_vector(int64_t size, const Body& body) {
  int64_t first = 0;
  for (; first + lanes<T> <= size; first += lanes<T>) {
    body(first, lanes<T>);
  }
  if (first < size) {
    body(first, static_cast<int>(size - first));
  }
}

template <typename T>
inline __attribute__((always_inline)) vec<accumulate_t<T>> load_piece(const T* from, int count) {
  return count == lanes<T> ? load(from) : load_partial(from, count);
}

template <typename T>
inline __attribute__((always_inline)) void store_piece(T* to, vec<accumulate_t<T>> value, int count) {
  if (count == lanes<T>) {
    store(to, value);
  } else {
    store_partial(to, value, count);
  }
}

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
