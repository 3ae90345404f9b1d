#include "sparse_attention/pq_loss.h"

#include <c10/core/DeviceGuard.h>

#include "core/library.h"
#include "sparse_attention/cuda/launches.h"

namespace torchops {
namespace {

class LossOnCuda {
 public:
  explicit LossOnCuda(const at::Device& device) : guard_(device) {}

  template <typename T>
  void loss(const kernels::sparse_attention::QuantizationLoss<T>& args) const {
    kernels::sparse_attention::launch_quantization_loss(args);
  }

  template <typename T>
  void gradient(const kernels::sparse_attention::QuantizationGradient<T>& args) const {
    kernels::sparse_attention::launch_quantization_gradient(args);
  }

 private:
  c10::DeviceGuard guard_;
};

at::Tensor pq_loss_cuda(const at::Tensor& input, const at::Tensor& codebooks) {
  return pq_loss_on<LossOnCuda>(input, codebooks);
}

std::tuple<at::Tensor, at::Tensor> pq_loss_backward_cuda(const at::Tensor& grad, const at::Tensor& input,
                                                         const at::Tensor& codebooks, std::array<bool, 2> output_mask) {
  return pq_loss_backward_on<LossOnCuda>(grad, input, codebooks, output_mask);
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("pq_loss", pq_loss_cuda);
  m.impl("_pq_loss_backward", pq_loss_backward_cuda);
}

}  // namespace torchops
