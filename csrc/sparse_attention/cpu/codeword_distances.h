#pragma once

#include "core/cpu/simd.h"
#include "sparse_attention/parts.h"

// A part next to the codewords of its subspace, a group of them at a time.

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {

template <typename A>
inline constexpr int vectors_of_group = static_cast<int>(codeword_group) / lanes<A>;

template <typename A>
struct GroupDistances {
  vec<A> vectors[vectors_of_group<A>] = {};
};

// The distances to the codewords from `first` on.
template <typename T, typename A>
inline __attribute__((always_inline)) GroupDistances<A> measure_group(const Parts<T>& parts, const T* part,
                                                                      const A* codebook, int64_t first) {
  const int64_t padded = parts.padded();
  GroupDistances<A> distances;
  for_each_vector<T>(parts.subspace, [&](int64_t channel, int count) {
    const vec<A> channels = load_piece(part + channel, count);
    for (int c = 0; c < count; ++c) {
      const A* const codewords = codebook + (channel + c) * padded + first;
      for (int piece = 0; piece < vectors_of_group<A>; ++piece) {
        const vec<A> difference = channels[c] - load(codewords + piece * lanes<A>);
        distances.vectors[piece] += difference < 0 ? -difference : difference;
      }
    }
  });
  return distances;
}

// The first of the nearest codewords, of those that are shown in ascending order.
template <typename A>
class Nearest {
 public:
  using Index = typename lane_index<sizeof(A)>::type;

  inline __attribute__((always_inline)) void show(vec<A> distances, int64_t first) {
    const auto nearer = distances < smallest_;  // false for a NaN
    smallest_ = nearer ? distances : smallest_;
    codes_ = nearer ? lane_numbers<Index>() + static_cast<Index>(first) : codes_;
  }

  inline __attribute__((always_inline)) int64_t code() const {
    const vec<A> least = broadcast(smallest_lane<A>(smallest_));
    const vec<Index> behind_all = broadcast(static_cast<Index>(most_codewords));
    return smallest_lane<Index>(smallest_ == least ? codes_ : behind_all);
  }

 private:
  vec<A> smallest_ = broadcast(static_cast<A>(__builtin_inf()));
  vec<Index> codes_ = {};
};

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
