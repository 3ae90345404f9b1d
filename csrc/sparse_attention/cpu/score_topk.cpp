#include "sparse_attention/score_topk.h"

#include <algorithm>

#include "core/library.h"
#include "core/parallel.h"
#include "sparse_attention/cpu/score_choice_kernel.h"

namespace torchops {
namespace {

using kernels::sparse_attention::ScoreChoice;

// Groups whose keys are packed at a time: enough units for all threads.
int64_t groups_in_a_wave(int64_t num_groups, int64_t units) {
  constexpr int64_t units_of_a_thread = 4;
  return std::clamp<int64_t>(units_of_a_thread * at::get_num_threads() / units, 1, num_groups);
}

template <typename T>
void choose_by_scores(const ScoreChoice<T>& args, int32_t* indices) {
  const auto& sizes = args.sizes;
  const bool adds_heads = args.weights != nullptr;
  const int64_t num_groups = adds_heads ? sizes.batch : sizes.batch * sizes.num_kv_heads;
  const auto pack_bytes = TORCHOPS_KERNEL(sparse_attention, score_choice_pack_bytes<T>)(args);
  const auto pack_units = TORCHOPS_KERNEL(sparse_attention, score_choice_pack_units<T>)(args);
  const auto units = TORCHOPS_KERNEL(sparse_attention, score_choice_units<T>)(args);
  const auto scratch_bytes = TORCHOPS_KERNEL(sparse_attention, score_choice_scratch_bytes<T>)(args);
  const int64_t wave = groups_in_a_wave(num_groups, units);
  const int64_t rows_of_unit = sizes.num_queries * sizes.num_heads / (units * num_groups / sizes.batch) + 1;
  AlignedBuffer<char> packs(static_cast<size_t>(wave * pack_bytes));
  for (int64_t first = 0; first < num_groups; first += wave) {
    const int64_t groups = std::min(wave, num_groups - first);
    parallel_units(groups * pack_units, sizes.head_dim * 64, [&](int64_t begin, int64_t end) {
      TORCHOPS_KERNEL(sparse_attention, score_choice_pack<T>)(args, first, packs.data(), begin, end);
    });
    parallel_tiles(groups * units, rows_of_unit * sizes.num_keys * sizes.head_dim, scratch_bytes,
                   [&](char* scratch, int64_t begin, int64_t end) {
                     TORCHOPS_KERNEL(sparse_attention, choose_by_scores<T>)
                     (args, indices, first, packs.data(), scratch, begin, end);
                   });
  }
}

at::Tensor score_topk_cpu(const at::Tensor& query, const at::Tensor& key, const ScoreTopkOptions& options) {
  return score_topk_on_device(query, key, options,
                              [](const auto& args, int32_t* indices) { choose_by_scores(args, indices); });
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("score_topk", flattened<score_topk_cpu>);
}

}  // namespace torchops
