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

// Chooses in scratch memory of its own.
template <typename I>
class LargestNumbers {
 public:
  LargestNumbers(Arena* arena, int64_t most) {
    sample_ = arena->take<I>(sample_size);
    inside_ = arena->take<I>(round_up(most, word_size));
  }

  // The places of the k largest integers that are numbers, ascending, and how many there are: of equal ones the first.
  // `count` is a multiple of 64.
  int64_t choose(const I* integers, int64_t count, int64_t k, int32_t* places) const {
    I last = no_number<I>;
    int64_t ties = 0;
    if (number_from(integers, count, static_cast<I>(last + 1)) > k) {
      last = kth_largest(integers, count, k);
      ties = k - number_from(integers, count, static_cast<I>(last + 1));
    }
    int64_t number = 0;
    for (int64_t first = 0; first < count; first += word_size) {
      uint64_t chosen = word_of_integers(integers + first, [&](vec<I> here) { return here > last; });
      if (ties > 0) {
        uint64_t equal = word_of_integers(integers + first, [&](vec<I> here) { return here == last; });
        while (__builtin_popcountll(equal) > ties) {
          equal ^= uint64_t{1} << (word_size - 1 - __builtin_clzll(equal));
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
  static constexpr int64_t word_size = 64;
  static constexpr int64_t sample_size = 256;

  // A range that the k-th largest integer lies in. Both ends are integers that are there, so that few different ones
  // are soon told apart.
  struct Candidates {
    I low, high;
    int64_t from_low;    // integers that are not below low
    int64_t above_high;  // integers above high

    int64_t inside() const { return from_low - above_high; }
  };

  // 1 <= k <= count.
  I kth_largest(const I* integers, int64_t count, int64_t k) const {
    constexpr int64_t few = 4 * word_size, share = 4;
    Candidates range = {no_number<I>, ~no_number<I>, count, 0};
    if (count >= 16 * sample_size) {
      narrow_by_sample(integers, count, k, range);
    }
    for (int64_t before = 2 * count; range.low < range.high;) {
      if (count > few && range.inside() <= count / share) {
        count = copy_inside(integers, count, range);
        integers = inside_;
        k -= range.above_high;
        range.from_low -= range.above_high;
        range.above_high = 0;
      }
      const bool by_half = 2 * range.inside() > before;
      before = range.inside();
      narrow(integers, count, k, middle_of(range, k, by_half), range);
    }
    return range.low;
  }

  // Between two of a sample where it probably is.
  void narrow_by_sample(const I* integers, int64_t count, int64_t k, Candidates& range) const {
    constexpr int64_t margin = 20;  // two to four standard deviations of a rank in the sample
    const int64_t step = count / sample_size, rank = k * sample_size / count;
    for (int64_t i = 0; i < sample_size; ++i) {
      sample_[i] = integers[i * step];
    }
    for (const int64_t guess : {rank + margin, rank - margin}) {
      if (0 < guess && guess <= sample_size) {
        const I middle = kth_largest(sample_, sample_size, guess);
        if (range.low < middle && middle <= range.high) {
          narrow(integers, count, k, middle, range);
        }
      }
    }
  }

  // Above low and not above high: where the integer is if they lie evenly, or by half.
  static I middle_of(const Candidates& range, int64_t k, bool by_half) {
    // What an I may not hold.
    const auto distance = static_cast<uint64_t>(range.high) - static_cast<uint64_t>(range.low);
    const double part =
        by_half ? 0.5 : (static_cast<double>(range.from_low - k) + 0.5) / static_cast<double>(range.inside());
    const auto step = static_cast<uint64_t>(static_cast<double>(distance - 1) * part);
    return static_cast<I>(static_cast<uint64_t>(range.low) + (step < distance ? step : distance - 1) + 1);
  }

  // To the integers from `middle` on or those below.
  static void narrow(const I* integers, int64_t count, int64_t k, I middle, Candidates& range) {
    constexpr I lowest = no_number<I>, highest = ~lowest;
    vec<I> number = {}, above = broadcast(highest), below = broadcast(lowest);
    for (int64_t i = 0; i < count; i += lane_count<I>) {
      const vec<I> here = load_integers(integers + i), is_above = here >= middle;
      number -= is_above;
      const vec<I> if_above = is_above ? here : highest, if_below = is_above ? lowest : here;
      above = if_above < above ? if_above : above;
      below = if_below > below ? if_below : below;
    }
    const int64_t from_middle = sum_lanes<I>(number);
    if (from_middle >= k) {
      range.low = smallest_lane<I>(above);
      range.from_low = from_middle;
    } else {
      range.high = largest_lane<I>(below);
      range.above_high = from_middle;
    }
  }

  // Those of a range, which may lie where they are copied to, and how many with those behind them that fill a word.
  int64_t copy_inside(const I* integers, int64_t count, const Candidates& range) const {
    int64_t number = 0;
    for (int64_t first = 0; first < count; first += word_size) {
      for (uint64_t inside = word_of_integers(integers + first,
                                              [&](vec<I> here) { return (here >= range.low) & (here <= range.high); });
           inside != 0; inside &= inside - 1) {
        inside_[number++] = integers[first + __builtin_ctzll(inside)];
      }
    }
    for (; number % word_size != 0; ++number) {
      inside_[number] = no_number<I>;
    }
    return number;
  }

  I* sample_;  // [sample_size]
  I* inside_;  // [most]
};

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
