#include "sparse_attention/pq_loss.h"

#include "core/library.h"
#include "core/parallel.h"
#include "sparse_attention/cpu/quantization_loss_kernel.h"

namespace torchops {
namespace {

using kernels::sparse_attention::Parts;
using kernels::sparse_attention::QuantizationGradient;
using kernels::sparse_attention::QuantizationLoss;
using kernels::sparse_attention::RowPieces;

struct LossOnCpu {
  explicit LossOnCpu(const at::Device& /*device*/) {}

  template <typename T>
  void loss(const QuantizationLoss<T>& args) const {
    parallel_units(args.num_units(), cost(args.parts, args.pieces), [&](int64_t begin, int64_t end) {
      TORCHOPS_KERNEL(sparse_attention, quantization_loss<T>)(args, begin, end);
    });
    double sum = 0;
    for (int64_t unit = 0; unit < args.num_units(); ++unit) {
      sum += args.sums[unit];
    }
    *args.loss = args.mean(sum);
  }

  template <typename T>
  void gradient(const QuantizationGradient<T>& args) const {
    parallel_units(args.num_units(), 4 * cost(args.parts, args.pieces), [&](int64_t begin, int64_t end) {
      TORCHOPS_KERNEL(sparse_attention, quantization_gradient<T>)(args, begin, end);
    });
    if (args.piece_gradients != nullptr) {
      parallel_units(args.num_sums(), args.pieces.num_pieces, [&](int64_t begin, int64_t end) {
        TORCHOPS_KERNEL(sparse_attention, sum_piece_gradients<T>)(args, begin, end);
      });
    }
  }

 private:
  // Of a unit.
  template <typename T>
  static int64_t cost(const Parts<T>& parts, const RowPieces& pieces) {
    return pieces.length() * parts.subspace * parts.padded();
  }
};

at::Tensor pq_loss_cpu(const at::Tensor& input, const at::Tensor& codebooks) {
  return pq_loss_on<LossOnCpu>(input, codebooks);
}

std::tuple<at::Tensor, at::Tensor> pq_loss_backward_cpu(const at::Tensor& grad, const at::Tensor& input,
                                                        const at::Tensor& codebooks, std::array<bool, 2> output_mask) {
  return pq_loss_backward_on<LossOnCpu>(grad, input, codebooks, output_mask);
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("pq_loss", pq_loss_cpu);
  m.impl("_pq_loss_backward", pq_loss_backward_cpu);
}

}  // namespace torchops
