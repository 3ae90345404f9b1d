#pragma once

#include <ATen/core/Tensor.h>

#include "routed_ffn/cuda/launches.h"

namespace torchops {

// A CUDA device, for routed_ffn/grouped_rows.h.
struct CudaDevice {
  template <typename T>
  static void run(const kernels::routed_ffn::GroupedProduct<T>& args) {
    kernels::routed_ffn::launch_grouped_product(args);
  }
  template <typename T>
  static void run(const kernels::routed_ffn::GroupedGradient<T>& args) {
    kernels::routed_ffn::launch_grouped_gradient(args);
  }
  template <typename T>
  static void run(const kernels::routed_ffn::Activate<T>& args) {
    kernels::routed_ffn::launch_activate(args);
  }
  template <typename T>
  static void run(const kernels::routed_ffn::ActivateBackward<T>& args) {
    kernels::routed_ffn::launch_activate_backward(args);
  }
  template <typename T>
  static void run(const kernels::routed_ffn::SlotSums<T>& args) {
    kernels::routed_ffn::launch_slot_sums(args);
  }
  template <typename T>
  static void run(const kernels::routed_ffn::SlotDots<T>& args) {
    kernels::routed_ffn::launch_slot_dots(args);
  }
  static void run(const kernels::routed_ffn::Placing& args) { kernels::routed_ffn::launch_place_rows(args); }
  static void sort(const kernels::routed_ffn::Entries& entries) { kernels::routed_ffn::launch_route(entries); }

  // Nobody looks: kernels do not follow what is out of range.
  static void check_order(const char* /*op*/, const at::Tensor& /*order*/, const at::Tensor& /*offsets*/) {}
};

}  // namespace torchops
