#include "routed_ffn/cuda/launches.h"

#include <algorithm>
#include <initializer_list>
#include <numeric>
#include <type_traits>

#include "core/cuda/dtypes.h"
#include "core/cuda/launch.h"
#include "core/cuda/rows.h"
#include "core/cuda/tiles.h"
#include "routed_ffn/cuda/activate.cuh"
#include "routed_ffn/cuda/slots.cuh"
#include "routed_ffn/cuda/sort_entries.cuh"

namespace torchops::kernels::routed_ffn {
namespace {

// Calls body with the number of elements that rows that are a multiple of `size` apart are read and written at once, in
// storage types and in the type that sums have: 16 bytes of these where rows are that well aligned, else one. Null
// pointers do not count.
template <typename T, typename Body>
void for_width(int64_t size, std::initializer_list<const void*> rows, const Body& body) {
  constexpr int widest = device::widest<accumulate_t<T>>;
  const bool aligned = std::all_of(rows.begin(), rows.end(),
                                   [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; });
  if (aligned && size % widest == 0) {
    body(std::integral_constant<int, widest>{});
  } else {
    body(std::integral_constant<int, 1>{});
  }
}

}  // namespace

void launch_route(const Entries& entries) {
  const int64_t blocks = device::tiles_of(entries.num_pieces(), pieces_of_block);
  constexpr int threads = pieces_of_block * device::warp_size;
  device::launch({.grid = blocks, .block = threads}, count_entries, entries);
  device::launch({1, place_threads, device::shared_size<int32_t>(device::max_warps)}, place_pieces, entries);
  device::launch({.grid = blocks, .block = threads}, order_entries, entries);
}

void launch_place_rows(const Placing& args) {
  device::launch({device::tiles_of(args.num_rows, place_rows_threads), place_rows_threads}, place_rows, args);
}

template <typename T>
void launch_activate(const Activate<T>& args) {
  const int64_t step = std::gcd(args.size, args.hidden_stride);
  for_width<T>(step, {args.wide_preactivation, args.preactivation, args.hidden}, [&](auto width) {
    device::launch({args.groups.num_rows, threads_for_row(args.size, width)}, activate<width(), T>, args);
  });
}

template <typename T>
void launch_activate_backward(const ActivateBackward<T>& args) {
  for_width<T>(args.size,
               {args.preactivation, args.wide_output_gradient, args.output_gradient, args.plain_gradient,
                args.grad_preactivation, args.hidden},
               [&](auto width) {
                 device::launch({device::tiles_of(args.groups.num_rows, activation_warps), activation_threads},
                                activate_backward<width(), T>, args);
               });
}

template <typename T>
void launch_slot_sums(const SlotSums<T>& args) {
  for_width<T>(args.size, {args.rows, args.bias, args.output}, [&](auto width) {
    device::launch({args.num_tokens, threads_for_row(args.size, width)}, slot_sums<width(), T>, args);
  });
}

template <typename T>
void launch_slot_dots(const SlotDots<T>& args) {
  device::launch({device::tiles_of(args.groups.num_rows, slot_dots_warps), slot_dots_warps * device::warp_size},
                 slot_dots<T>, args);
}

#define TORCHOPS_INSTANTIATE(T)                                       \
  template void launch_activate(const Activate<T>&);                  \
  template void launch_activate_backward(const ActivateBackward<T>&); \
  template void launch_slot_sums(const SlotSums<T>&);                 \
  template void launch_slot_dots(const SlotDots<T>&);
TORCHOPS_FOR_EACH_DTYPE(TORCHOPS_INSTANTIATE)

}  // namespace torchops::kernels::routed_ffn
