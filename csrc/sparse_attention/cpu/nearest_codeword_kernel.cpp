#include "sparse_attention/cpu/nearest_codeword_kernel.h"

#include "core/cpu/simd.h"

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {

namespace {

template <typename T>
uint8_t nearest(const T* part, const accumulate_t<T>* codebook, int64_t subspace, int64_t num_codewords) {
  using A = accumulate_t<T>;
  using Index = typename lane_index<sizeof(A)>::type;
  constexpr int pieces = static_cast<int>(codeword_group) / lanes<A>;
  const vec<Index> numbers = lane_numbers<Index>();
  vec<A> smallest = broadcast(static_cast<A>(__builtin_inf()));
  vec<Index> codes = {};
  for (int64_t first = 0; first < num_codewords; first += codeword_group) {
    vec<A> distances[pieces] = {};
    for_each_vector<T>(subspace, [&](int64_t channel, int count) {
      const vec<A> channels = load_piece(part + channel, count);
      for (int c = 0; c < count; ++c) {
        const A* const codewords = codebook + (channel + c) * num_codewords + first;
        for (int piece = 0; piece < pieces; ++piece) {
          const vec<A> difference = channels[c] - load(codewords + piece * lanes<A>);
          distances[piece] += difference < 0 ? -difference : difference;
        }
      }
    });
    for (int piece = 0; piece < pieces; ++piece) {
      const auto nearer = distances[piece] < smallest;  // false for a NaN
      smallest = nearer ? distances[piece] : smallest;
      codes = nearer ? numbers + static_cast<Index>(first + piece * lanes<A>) : codes;
    }
  }
  const vec<A> least = broadcast(smallest_lane<A>(smallest));
  const vec<Index> behind_all = broadcast(static_cast<Index>(num_codewords));
  return static_cast<uint8_t>(smallest_lane<Index>(smallest == least ? codes : behind_all));
}

}  // namespace

template <typename T>
void nearest_codeword(const NearestCodeword<T>& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t m = 0; m < args.num_subspaces; ++m) {
      args.code(row, m) = nearest(args.part(row, m), args.codebook(m), args.subspace, args.num_codewords);
    }
  }
}

template void nearest_codeword(const NearestCodeword<double>&, int64_t, int64_t);
template void nearest_codeword(const NearestCodeword<float>&, int64_t, int64_t);
template void nearest_codeword(const NearestCodeword<bfloat16>&, int64_t, int64_t);
template void nearest_codeword(const NearestCodeword<float16>&, int64_t, int64_t);

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
