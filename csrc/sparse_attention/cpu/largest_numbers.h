#pragma once

#include "core/cpu/arena.h"
#include "core/cpu/elements.h"
#include "sparse_attention/cpu/byte_masks.h"

// Which of many numbers are the largest, by comparing and counting vectors of them: nothing is sorted.

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {

// Integers that are in the order of numbers.
template <typename A>
using ordered_t = typename lane_index<sizeof(A)>::type;
// Below those of all numbers.
template <typename I>
inline constexpr I no_number = static_cast<I>(uint64_t{1} << (8 * sizeof(I) - 1));

template <typename I>
vec<I> load_integers(const I* from) {
  vec<I> integers;
  __builtin_memcpy(&integers, from, sizeof(integers));
  return integers;
}
template <typename I>
void store_integers(I* to, vec<I> integers) {
  __builtin_memcpy(to, &integers, sizeof(integers));
}

// -0 is 0, and a NaN is no number.
template <typename A>
vec<ordered_t<A>> in_order(vec<A> numbers) {
  using I = ordered_t<A>;
  const auto bits = bit_cast<vec<I>>(numbers + A(0));
  // Of negative numbers all bits but the sign are inverted.
  const auto ordered = bits ^ ((bits >> (8 * sizeof(I) - 1)) & ~no_number<I>);
  return numbers == numbers ? ordered : broadcast(no_number<I>);
}

// Bit i: compare(integers i), for 64 of them.
template <typename I, typename Compare>
uint64_t word_of_integers(const I* integers, const Compare& compare) {
  uint64_t word = 0;
#if defined(__AVX512BW__)
  int8_t bytes[64];
  for (int first = 0; first < 64; first += lane_count<I>) {
    const auto narrow = __builtin_convertvector(compare(load_integers(integers + first)),
                                                typename vector_of<int8_t, lane_count<I>>::type);
    __builtin_memcpy(bytes + first, &narrow, sizeof(narrow));
  }
  vec<int8_t> comparison;
  __builtin_memcpy(&comparison, bytes, sizeof(comparison));
  word = bits_of(comparison);
#else
  for (int first = 0; first < 64; first += lane_count<I>) {
    const vec<I> comparison = compare(load_integers(integers + first));
    uint64_t bits = 0;
#if defined(__AVX2__)
    if constexpr (sizeof(I) == sizeof(float)) {
      bits = static_cast<uint32_t>(_mm256_movemask_ps(bit_cast<__m256>(comparison)));
    } else {
      bits = static_cast<uint32_t>(_mm256_movemask_pd(bit_cast<__m256d>(comparison)));
    }
#elif defined(__SSE2__)
    if constexpr (sizeof(I) == sizeof(float)) {
      bits = static_cast<uint32_t>(_mm_movemask_ps(bit_cast<__m128>(comparison)));
    } else {
      bits = static_cast<uint32_t>(_mm_movemask_pd(bit_cast<__m128d>(comparison)));
    }
#else
    for (int lane = 0; lane < lane_count<I>; ++lane) {
      bits |= static_cast<uint64_t>(comparison[lane] & 1) << lane;
    }
#endif
    word |= bits << first;
  }
#endif
  return word;
}

// Of whole vectors of integers, how many are not below one.
template <typename I>
int64_t number_from(const I* integers, int64_t count, I least) {
  vec<I> number = {};
  for (int64_t i = 0; i < count; i += lane_count<I>) {
    number -= load_integers(integers + i) >= least;
  }
  return sum_lanes<I>(number);
}

// The k-th largest of whole vectors of integers, 1 <= k <= count. Halves the range that it lies in, whose ends are
// integers that are there, so that few different ones are soon told apart.
template <typename I>
I kth_largest(const I* integers, int64_t count, int64_t k) {
  constexpr I lowest = no_number<I>, highest = ~lowest;
  vec<I> smallest = broadcast(highest), largest = broadcast(lowest);
  for (int64_t i = 0; i < count; i += lane_count<I>) {
    const vec<I> here = load_integers(integers + i);
    smallest = here < smallest ? here : smallest;
    largest = here > largest ? here : largest;
  }
  I low = smallest_lane<I>(smallest), high = largest_lane<I>(largest);
  while (low < high) {
    // Their distance is more than an I may hold.
    const auto distance = static_cast<uint64_t>(high) - static_cast<uint64_t>(low);
    const auto middle = static_cast<I>(static_cast<uint64_t>(low) + distance / 2 + 1);
    vec<I> number = {}, above = broadcast(highest), below = broadcast(lowest);
    for (int64_t i = 0; i < count; i += lane_count<I>) {
      const vec<I> here = load_integers(integers + i), is_above = here >= middle;
      number -= is_above;
      const vec<I> if_above = is_above ? here : highest, if_below = is_above ? lowest : here;
      above = if_above < above ? if_above : above;
      below = if_below > below ? if_below : below;
    }
    if (sum_lanes<I>(number) >= k) {
      low = smallest_lane<I>(above);
    } else {
      high = largest_lane<I>(below);
    }
  }
  return low;
}

// Chooses in scratch memory of its own.
template <typename I>
class LargestNumbers {
 public:
  LargestNumbers(Arena* arena, int64_t most) {
    sample_ = arena->take<I>(sample_size);
    between_ = arena->take<I>(round_up(most, lane_count<I>));
  }

  // The places of the k largest integers that are numbers, ascending, and how many there are: of equal ones the first.
  // `count` is a multiple of 64.
  int64_t choose(const I* integers, int64_t count, int64_t k, int32_t* places) const {
    I last = no_number<I>;
    int64_t ties = 0;
    if (number_from(integers, count, static_cast<I>(last + 1)) > k) {
      last = last_chosen(integers, count, k);
      ties = k - number_from(integers, count, static_cast<I>(last + 1));
    }
    int64_t number = 0;
    for (int64_t first = 0; first < count; first += 64) {
      uint64_t chosen = word_of_integers(integers + first, [&](vec<I> here) { return here > last; });
      if (ties > 0) {
        uint64_t equal = word_of_integers(integers + first, [&](vec<I> here) { return here == last; });
        while (__builtin_popcountll(equal) > ties) {
          equal ^= uint64_t{1} << (63 - __builtin_clzll(equal));
        }
        ties -= __builtin_popcountll(equal);
        chosen |= equal;
      }
      for (; chosen != 0; chosen &= chosen - 1) {
        places[number++] = static_cast<int32_t>(first + __builtin_ctzll(chosen));
      }
    }
    return number;
  }

 private:
  static constexpr int64_t sample_size = 512;
  // Two or three standard deviations of a rank in the sample.
  static constexpr int64_t margin = 24;

  // The k-th largest. Where there are many integers, a sample of them has two between which it is likely to be.
  I last_chosen(const I* integers, int64_t count, int64_t k) const {
    if (count > 4 * sample_size) {
      const int64_t step = count / sample_size, rank = k * sample_size / count;
      for (int64_t i = 0; i < sample_size; ++i) {
        sample_[i] = integers[i * step];
      }
      const I high = rank <= margin ? ~no_number<I> : kth_largest(sample_, sample_size, rank - margin);
      const I low = rank + margin > sample_size ? no_number<I> : kth_largest(sample_, sample_size, rank + margin);
      const int64_t from_high = number_from(integers, count, high);
      if (k <= from_high) {
        if (k > number_from(integers, count, static_cast<I>(high + 1))) {
          return high;
        }
      } else if (const int64_t between = copy_between(integers, count, low, high); k <= from_high + between) {
        return kth_largest(between_, round_up(between, lane_count<I>), k - from_high);
      } else if (k <= number_from(integers, count, low)) {
        return low;
      }
    }
    return kth_largest(integers, count, k);
  }

  // Those above low and below high, and how many; none at all behind them, in the last vector.
  int64_t copy_between(const I* integers, int64_t count, I low, I high) const {
    int64_t number = 0;
    for (int64_t first = 0; first < count; first += 64) {
      for (uint64_t inside = word_of_integers(integers + first, [&](vec<I> here) { return (here > low) & (here < high); });
           inside != 0; inside &= inside - 1) {
        between_[number++] = integers[first + __builtin_ctzll(inside)];
      }
    }
    for (int64_t i = number; i % lane_count<I> != 0; ++i) {
      between_[i] = no_number<I>;
    }
    return number;
  }

  I* sample_;   // [sample_size]
  I* between_;  // [most]
};

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
