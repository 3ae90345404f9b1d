#include "sparse_attention/cpu/forward_kernel.h"

#include "sparse_attention/cpu/query_forward.h"
#include "sparse_attention/cpu/tile_forward.h"

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {

template <typename T>
int64_t forward_units(const Attention<T>& inputs) {
  return inputs.sizes.batch * (by_tile(inputs)
                                   ? inputs.sizes.num_heads / inputs.heads_of_list() * inputs.lists.num_lists
                                   : inputs.sizes.num_heads * units_of_head(inputs));
}

template <typename T>
int64_t forward_scratch_bytes(const Attention<T>& inputs) {
  using E = multiplicand_t<T>;
  Arena arena(nullptr);
  if (by_tile(inputs)) {
    TileForwardScratch<E>(&arena, inputs);
  } else {
    ForwardScratch<E>(&arena, inputs);
  }
  return arena.bytes();
}

template <typename T>
void forward(const AttentionForward<T>& args, void* scratch, int64_t begin, int64_t end) {
  by_tile(args.inputs) ? forward_by_tile(args, scratch, begin, end) : forward_by_query(args, scratch, begin, end);
}

#define TORCHOPS_INSTANTIATE(T)                                \
  template int64_t forward_units<T>(const Attention<T>&);      \
  template int64_t forward_scratch_bytes(const Attention<T>&); \
  template void forward(const AttentionForward<T>&, void*, int64_t, int64_t);
TORCHOPS_INSTANTIATE(double)
TORCHOPS_INSTANTIATE(float)
TORCHOPS_INSTANTIATE(bfloat16)
TORCHOPS_INSTANTIATE(float16)
#undef TORCHOPS_INSTANTIATE

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
