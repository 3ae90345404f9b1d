#include "routed_ffn/cpu/slots_kernel.h"

#include "core/cpu/lines.h"
#include "core/cpu/simd.h"

namespace torchops::kernels::routed_ffn::TORCHOPS_LEVEL {

template <typename T>
void slot_sums(const SlotSums<T>& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t rows_of_blocks = args.groups.offsets[args.groups.count];
  for (int64_t token = begin; token < end; ++token) {
    for_each_vector<T>(args.size, [&](int64_t first, int used) {
      vec<A> sum = args.bias == nullptr ? vec<A>{} : load_piece(args.bias + first, used);
      for (int64_t entry = token * args.num_slots; entry < (token + 1) * args.num_slots; ++entry) {
        const int64_t row = args.places[entry];
        if (row < rows_of_blocks) {
          const vec<A> numbers = load_piece(args.rows + row * args.size + first, used);
          sum += args.gate == nullptr ? numbers : args.gate[entry] * numbers;
        }
      }
      store_piece(args.output + token * args.size + first, sum, used);
    });
  }
}

template <typename T>
void slot_dots(const SlotDots<T>& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const Lines<T> tokens{args.tokens.data, args.tokens.stride, args.tokens.lines};
  for (int64_t row = begin; row < end; ++row) {
    const A* const numbers = args.rows + row * args.size;
    const T* const token = tokens[row];
    vec<A> sum = {};
    for_each_vector<T>(args.size, [&](int64_t first, int used) {
      sum += load_piece(numbers + first, used) * load_piece(token + first, used);
    });
    args.dots[args.order[row]] += sum_lanes<A>(sum);
  }
}

#define TORCHOPS_INSTANTIATE(T)                                  \
  template void slot_sums(const SlotSums<T>&, int64_t, int64_t); \
  template void slot_dots(const SlotDots<T>&, int64_t, int64_t);
TORCHOPS_INSTANTIATE(double)
TORCHOPS_INSTANTIATE(float)
TORCHOPS_INSTANTIATE(bfloat16)
TORCHOPS_INSTANTIATE(float16)
#undef TORCHOPS_INSTANTIATE

}  // namespace torchops::kernels::routed_ffn::TORCHOPS_LEVEL
