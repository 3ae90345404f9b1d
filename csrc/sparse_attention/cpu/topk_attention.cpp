#include "core/library.h"
#include "sparse_attention/attending.h"
#include "sparse_attention/cpu/device.h"

namespace torchops {

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("topk_attention", flattened<topk_attention_on<CpuTopkAttention>>);
  m.impl("topk_attention_lse", flattened<topk_attention_lse_on<CpuTopkAttention>>);
  m.impl("_topk_attention_forward", flattened<topk_attention_forward_on<CpuTopkAttention>>);
  m.impl("_topk_attention_backward", flattened<topk_attention_backward_on<CpuTopkAttention>>);
}

}  // namespace torchops
