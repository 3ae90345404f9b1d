#pragma once

#include "core/attention/attention.h"

// Kernels of every attention, and how their host layers start them.

namespace torchops::kernels::attention {

template <typename A>
void launch_sink_gradient(const SinkGradient<A>& args);

// From shares [B, Hkv, Lk] to grad_key_bias [B, Lk].
template <typename A>
void launch_key_bias_gradient(const A* shares, A* grad_key_bias, const Sizes& sizes);

}  // namespace torchops::kernels::attention
