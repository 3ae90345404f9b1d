#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/scalar.h"
#include "engine/async_copies.h"
#include "engine/language.h"
#include "engine/numbers.h"
#include "engine/scheduler.h"
#include "engine/shared_arrays.h"
#include "engine/warp.h"

// csrc/core/cuda/device.cuh for g++: the same names, executed on the host. `where` is the caller's line,
// for reports. What reads or writes the kernel's memory stands here and not in the engine, because only
// this is compiled with the checkers.

namespace torchops::device {

using kernels::accumulate_t;
using kernels::bfloat16;
using kernels::float16;
using simt::Site;

inline constexpr int warp_size = simt::warp_size;
inline constexpr uint32_t all_lanes = 0xffffffff;

// ---- assertions ---------------------------------------------------------------------------------

inline void debug_assert(bool condition, const char* expected, Site where = Site::current()) {
  if (!condition && simt::is_debug_build()) {
    simt::fail(std::string("assertion: ") + expected, where);
  }
}

// ---- warp ---------------------------------------------------------------------------------------

namespace detail {

template <typename T>
T value_of_lane(const char* operation, T value, int source, uint32_t mask, Site where) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  constexpr int value_words = sizeof(T) / 4;
  uint32_t words[1 + value_words] = {static_cast<uint32_t>(source)};
  std::memcpy(words + 1, &value, sizeof(T));
  simt::exchange(operation, mask, words, 1 + value_words, simt::gather<value_words>, where);
  std::memcpy(&value, words + 1, sizeof(T));
  return value;
}

// The lane itself unless the source lies in its group of `width` lanes.
inline int within_group(int source, int width) {
  const int lane = simt::current_lane();
  return source >= 0 && source / width == lane / width ? source : lane;
}

}  // namespace detail

template <typename T>
T shuffle(T value, int lane, int width = warp_size, uint32_t mask = all_lanes, Site where = Site::current()) {
  const int first = simt::current_lane() / width * width;
  return detail::value_of_lane("shuffle", value, first + (lane & (width - 1)), mask, where);
}
template <typename T>
T shuffle_up(T value, int distance, int width = warp_size, uint32_t mask = all_lanes, Site where = Site::current()) {
  const int source = detail::within_group(simt::current_lane() - distance, width);
  return detail::value_of_lane("shuffle_up", value, source, mask, where);
}
template <typename T>
T shuffle_down(T value, int distance, int width = warp_size, uint32_t mask = all_lanes, Site where = Site::current()) {
  const int source = detail::within_group(simt::current_lane() + distance, width);
  return detail::value_of_lane("shuffle_down", value, source, mask, where);
}
template <typename T>
T shuffle_xor(T value, int bits, int width = warp_size, uint32_t mask = all_lanes, Site where = Site::current()) {
  // Unlike the others, this one can read groups below the caller's.
  const int lane = simt::current_lane();
  const int source = (lane ^ bits) / width <= lane / width ? lane ^ bits : lane;
  return detail::value_of_lane("shuffle_xor", value, source, mask, where);
}

inline uint32_t ballot(bool predicate, uint32_t mask = all_lanes, Site where = Site::current()) {
  uint32_t word = predicate;
  simt::exchange("ballot", mask, &word, 1, simt::vote, where);
  return word;
}
inline bool any(bool predicate, uint32_t mask = all_lanes, Site where = Site::current()) {
  uint32_t word = predicate;
  simt::exchange("any", mask, &word, 1, simt::vote, where);
  return word != 0;
}
inline bool all(bool predicate, uint32_t mask = all_lanes, Site where = Site::current()) {
  uint32_t word = predicate;
  simt::exchange("all", mask, &word, 1, simt::vote, where);
  return word == mask;
}

inline void syncwarp(uint32_t mask = all_lanes, Site where = Site::current()) {
  simt::meet_warp("syncwarp", mask, where);
}

// ---- block --------------------------------------------------------------------------------------

inline void syncthreads(Site where = Site::current()) {
  simt::meet_block("syncthreads", false, where);
}
inline int syncthreads_count(bool predicate, Site where = Site::current()) {
  return simt::meet_block("syncthreads_count", predicate, where);
}
inline bool syncthreads_and(bool predicate, Site where = Site::current()) {
  return simt::meet_block("syncthreads_and", !predicate, where) == 0;
}
inline bool syncthreads_or(bool predicate, Site where = Site::current()) {
  return simt::meet_block("syncthreads_or", predicate, where) != 0;
}

template <typename T>
constexpr size_t shared_size(size_t count) {
  return (count * sizeof(T) + 15) / 16 * 16;
}

// Every array has memory of its own, as long as it is and filled with ones (as floating-point numbers:
// NaN).
class SharedMemory {
 public:
  template <typename T>
  T* take(size_t count, Site where = Site::current()) {
    return static_cast<T*>(simt::shared_array(taken_++, count * sizeof(T), where));
  }

 private:
  int taken_ = 0;
};

// ---- asynchronous copies from global to shared memory ---------------------------------------------

template <int bytes>
void copy_async(void* to_shared, const void* from_global, bool valid = true, Site where = Site::current()) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  simt::require_shared("copy_async", to_shared, bytes, where);
  if (valid && reinterpret_cast<uintptr_t>(from_global) % bytes != 0) {
    simt::fail("copy_async: the source is not a multiple of " + std::to_string(bytes) + " bytes", where);
  }
  const simt::AsyncCopy copy = {to_shared, from_global, bytes, valid};
  if (simt::coin()) {
    simt::carry_out(copy);
  } else {
    simt::defer(copy, where);
  }
}

inline void copy_async_commit() {
  simt::close_group();
}

template <int pending>
void copy_async_wait() {
  for (simt::AsyncCopy copy; simt::take_due(pending, &copy);) {
    simt::carry_out(copy);
  }
}

// ---- matrices -------------------------------------------------------------------------------------

namespace detail {

template <bool transposed, int count>
void load_matrices(const char* operation, uint32_t (&fragment)[count], const void* row, Site where) {
  uint32_t words[4] = {};
  if (simt::current_lane() < 8 * count) {
    simt::require_shared(operation, row, 16, where);
    for (int word = 0; word < 4; ++word) {
      words[word] = static_cast<const uint32_t*>(row)[word];
    }
  }
  simt::exchange(operation, all_lanes, words, 4, simt::distribute_matrices<count, transposed>, where);
  std::memcpy(fragment, words, sizeof(fragment));
}

inline void multiply(const char* operation, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     simt::Combine product, Site where) {
  uint32_t words[10];
  std::memcpy(words, c, sizeof(c));
  std::memcpy(words + 4, a, sizeof(a));
  std::memcpy(words + 8, b, sizeof(b));
  simt::exchange(operation, all_lanes, words, 10, product, where);
  std::memcpy(c, words, sizeof(c));
}

}  // namespace detail

inline void ldmatrix(uint32_t (&fragment)[4], const void* row, Site where = Site::current()) {
  detail::load_matrices<false>("ldmatrix", fragment, row, where);
}
inline void ldmatrix(uint32_t (&fragment)[2], const void* row, Site where = Site::current()) {
  detail::load_matrices<false>("ldmatrix", fragment, row, where);
}
inline void ldmatrix_trans(uint32_t (&fragment)[4], const void* row, Site where = Site::current()) {
  detail::load_matrices<true>("ldmatrix_trans", fragment, row, where);
}
inline void ldmatrix_trans(uint32_t (&fragment)[2], const void* row, Site where = Site::current()) {
  detail::load_matrices<true>("ldmatrix_trans", fragment, row, where);
}

template <typename T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site where = Site::current()) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>);
  constexpr bool is_bfloat16 = std::is_same_v<T, bfloat16>;
  detail::multiply("mma_m16n8k16", c, a, b, is_bfloat16 ? simt::multiply_bfloat16 : simt::multiply_float16, where);
}

inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Site where = Site::current()) {
  detail::multiply("mma_m16n8k8_tf32", c, a, b, simt::multiply_tf32, where);
}

// ---- numbers --------------------------------------------------------------------------------------

inline float widen(bfloat16 value) {
  return simt::bfloat16_value(value.bits);
}
inline float widen(float16 value) {
  return simt::float16_value(value.bits);
}
inline float widen(float value) {
  return value;
}
inline double widen(double value) {
  return value;
}

template <typename T>
T narrow(accumulate_t<T> value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return {simt::bfloat16_bits(value)};
  } else if constexpr (std::is_same_v<T, float16>) {
    return {simt::float16_bits(value)};
  } else {
    return value;
  }
}

template <typename T>
uint32_t pack(float first, float second) {
  return narrow<T>(first).bits | static_cast<uint32_t>(narrow<T>(second).bits) << 16;
}
template <typename T>
float2 unpack(uint32_t pair) {
  return make_float2(widen(T{static_cast<uint16_t>(pair)}), widen(T{static_cast<uint16_t>(pair >> 16)}));
}

inline uint32_t to_tf32(float value) {
  return simt::tf32_bits(value);
}

inline float fast_exp2(float value) {
  const float power = std::exp2(value);
  return power < 0x1p-126F ? 0 : power;
}
inline float fast_log2(float value) {
  return std::log2(value);
}
inline double fast_exp2(double value) {
  return std::exp2(value);
}
inline double fast_log2(double value) {
  return std::log2(value);
}
inline float fast_divide(float dividend, float divisor) {
  return dividend / divisor;
}
inline float reciprocal_sqrt(float value) {
  return 1 / std::sqrt(value);
}

template <typename T>
T min(T first, T second) {
  return second < first ? second : first;
}
template <typename T>
T max(T first, T second) {
  return first < second ? second : first;
}

inline int popc(uint32_t bits) {
  return std::popcount(bits);
}
inline int ffs(uint32_t bits) {
  return bits == 0 ? 0 : std::countr_zero(bits) + 1;
}
inline int clz(uint32_t bits) {
  return std::countl_zero(bits);
}

// ---- memory ---------------------------------------------------------------------------------------

template <typename T>
T ldg(const T* from) {
  return *from;
}

namespace detail {

// What other threads write between reading and writing must not get lost, so let them try.
template <typename T, typename Update>
T update(T* at, const Update& updated) {
  T old;
  __atomic_load(at, &old, __ATOMIC_RELAXED);
  simt::sometimes_yield();
  for (;;) {
    T desired = updated(old);
    if (__atomic_compare_exchange(at, &old, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      return old;
    }
  }
}

}  // namespace detail

template <typename T>
T atomic_add(T* at, std::type_identity_t<T> value) {
  return detail::update(at, [value](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomic_min(T* at, std::type_identity_t<T> value) {
  return detail::update(at, [value](T old) { return value < old ? value : old; });
}
template <typename T>
T atomic_max(T* at, std::type_identity_t<T> value) {
  return detail::update(at, [value](T old) { return old < value ? value : old; });
}
template <typename T>
T atomic_or(T* at, std::type_identity_t<T> value) {
  return detail::update(at, [value](T old) { return old | value; });
}
template <typename T>
T atomic_exchange(T* at, std::type_identity_t<T> value) {
  return detail::update(at, [value](T) { return value; });
}
template <typename T>
T atomic_cas(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return detail::update(at, [expected, value](T old) { return old == expected ? value : old; });
}

}  // namespace torchops::device
