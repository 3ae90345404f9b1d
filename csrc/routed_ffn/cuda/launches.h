#pragma once

#include "routed_ffn/activation.h"
#include "routed_ffn/entries.h"
#include "routed_ffn/grouped_product.h"
#include "routed_ffn/slots.h"

// How the host layers start the kernels.

namespace torchops::kernels::routed_ffn {

void launch_route(const Entries& entries);
void launch_place_rows(const Placing& args);

template <typename T>
void launch_grouped_product(const GroupedProduct<T>& args);
template <typename T>
void launch_grouped_gradient(const GroupedGradient<T>& args);
template <typename T>
void launch_activate(const Activate<T>& args);
template <typename T>
void launch_activate_backward(const ActivateBackward<T>& args);
template <typename T>
void launch_slot_sums(const SlotSums<T>& args);
template <typename T>
void launch_slot_dots(const SlotDots<T>& args);

}  // namespace torchops::kernels::routed_ffn
