#include "sparse_attention/cpu/code_choice_kernel.h"

#include "sparse_attention/cpu/key_chooser.h"

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {

int64_t choose_by_codes_scratch_bytes(const CodeChoice& args) {
  Arena arena(nullptr);
  KeyChooser(&arena, &args);
  return arena.bytes();
}

void choose_by_codes(const CodeChoice& args, int32_t* indices, void* scratch, int64_t begin, int64_t end) {
  Arena arena(scratch);
  const KeyChooser chooser(&arena, &args);
  const int64_t tiles = divide_up(args.num_queries, queries_of_choice);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t head = unit / tiles % args.num_heads, batch = unit / tiles / args.num_heads;
    const int64_t first = unit % tiles * queries_of_choice;
    const int64_t count = smaller(args.num_queries - first, queries_of_choice);
    int32_t* const lists = indices + ((batch * args.num_heads + head) * args.num_queries + first) * args.num_chosen;
    int64_t lengths[queries_of_choice];
    chooser.choose(batch, head, first, count, lists, args.num_chosen, lengths);
    for (int64_t q = 0; q < count; ++q) {
      for (int64_t i = lengths[q]; i < args.num_chosen; ++i) {
        lists[q * args.num_chosen + i] = -1;
      }
    }
  }
}

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
