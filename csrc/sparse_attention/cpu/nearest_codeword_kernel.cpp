#include "sparse_attention/cpu/nearest_codeword_kernel.h"

#include "sparse_attention/cpu/codeword_distances.h"

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {

template <typename T>
void nearest_codeword(const NearestCodeword<T>& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const Parts<T>& parts = args.parts;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t m = 0; m < parts.num_subspaces; ++m) {
      Nearest<A> nearest;
      for (int64_t first = 0; first < parts.padded(); first += codeword_group) {
        const auto distances = measure_group(parts, parts.part(row, m), parts.codebook(m), first);
        for (int piece = 0; piece < vectors_of_group<A>; ++piece) {
          nearest.show(distances.vectors[piece], first + piece * lanes<A>);
        }
      }
      args.code(row, m) = static_cast<uint8_t>(nearest.code());
    }
  }
}

template void nearest_codeword(const NearestCodeword<double>&, int64_t, int64_t);
template void nearest_codeword(const NearestCodeword<float>&, int64_t, int64_t);
template void nearest_codeword(const NearestCodeword<bfloat16>&, int64_t, int64_t);
template void nearest_codeword(const NearestCodeword<float16>&, int64_t, int64_t);

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
