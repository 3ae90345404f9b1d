#include "core/attention/cuda/side_gradients.cuh"

namespace torchops::kernels::attention {

template void launch_sink_gradient(const SinkGradient<double>&);
template void launch_sink_gradient(const SinkGradient<float>&);
template void launch_key_bias_gradient(const double*, double*, const Sizes&);
template void launch_key_bias_gradient(const float*, float*, const Sizes&);

}  // namespace torchops::kernels::attention
