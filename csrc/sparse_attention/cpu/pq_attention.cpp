#include "sparse_attention/pq_attention.h"

#include "core/library.h"
#include "sparse_attention/cpu/code_layout.h"
#include "sparse_attention/cpu/device.h"

namespace torchops {
namespace {

// Its kernels choose keys themselves, where they would read a list.
struct CpuPqAttention : CpuTopkAttention {
  using CpuTopkAttention::CpuTopkAttention;
  static constexpr auto lay_out = subspaces_first;
};

}  // namespace

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("pq_attention", flattened<pq_attention_on<CpuPqAttention>>);
  m.impl("pq_attention_lse", flattened<pq_attention_lse_on<CpuPqAttention>>);
  m.impl("_pq_attention_forward", flattened<pq_attention_forward_on<CpuPqAttention>>);
  m.impl("_pq_attention_backward", flattened<pq_attention_backward_on<CpuPqAttention>>);
}

}  // namespace torchops
