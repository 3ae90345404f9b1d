#include "core/cuda/dtypes.h"
#include "core/cuda/launch.h"
#include "core/cuda/tiles.h"
#include "routed_ffn/cuda/grouped_gradient.cuh"
#include "routed_ffn/cuda/grouped_product.cuh"
#include "routed_ffn/cuda/launches.h"

namespace torchops::kernels::routed_ffn {
namespace {

template <typename T>
inline constexpr bool on_matrix_units = sizeof(T) == 2;

// Whether rows of `size` numbers begin at multiples of 16 bytes and have a multiple of 16 bytes.
template <typename T>
bool is_wide(const T* data, int64_t row_stride, int64_t size, int64_t group_stride = 0) {
  constexpr int64_t width = device::widest<T>;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride % width == 0 && size % width == 0 &&
         group_stride % width == 0;
}
template <typename T>
bool is_wide(const SortedRows<T>& rows, int64_t size) {
  return is_wide(rows.data, rows.stride, size);
}

template <typename Tile, bool along_depth, typename T>
void launch_with(const GroupedProduct<T>& args) {
  const WideOperands wide{is_wide(args.left, args.depth),
                          along_depth
                              ? is_wide(args.right, args.column_stride, args.depth, args.right_group_stride)
                              : is_wide(args.right, args.depth_stride, args.num_columns, args.right_group_stride)};
  device::launch({num_slots(args.groups, Tile::rows) * device::tiles_of(args.num_columns, Tile::columns), Tile::threads,
                  tile_stream_bytes<Tile, T>},
                 grouped_product<Tile, along_depth, T>, args, wide);
}

template <bool along_depth, typename T>
void launch_along(const GroupedProduct<T>& args) {
  if constexpr (!on_matrix_units<T>) {
    launch_with<FmaProduct<T, along_depth>, along_depth>(args);
  } else if (args.groups.num_rows <= 64 * args.groups.count) {  // most tiles would have less than half of their rows
    launch_with<MmaProduct<T, 1, along_depth>, along_depth>(args);
  } else {
    launch_with<MmaProduct<T, 4, along_depth>, along_depth>(args);
  }
}

template <typename Tile, typename T>
void launch_with(const GroupedGradient<T>& args) {
  const WideOperands wide{is_wide(args.left, args.num_rows), is_wide(args.right, args.num_columns)};
  device::launch({args.groups.count * device::tiles_of(args.num_rows, Tile::rows) *
                      device::tiles_of(args.num_columns, Tile::columns),
                  Tile::threads, tile_stream_bytes<Tile, T>},
                 grouped_gradient<Tile, T>, args, wide);
}

}  // namespace

template <typename T>
void launch_grouped_product(const GroupedProduct<T>& args) {
  args.depth_stride == 1 ? launch_along<true>(args) : launch_along<false>(args);
}

template <typename T>
void launch_grouped_gradient(const GroupedGradient<T>& args) {
  if constexpr (!on_matrix_units<T>) {
    launch_with<FmaGradient<T>>(args);
  } else if (args.num_rows <= MmaGradient<T, 2>::rows) {
    launch_with<MmaGradient<T, 2>>(args);
  } else {
    launch_with<MmaGradient<T, 4>>(args);
  }
}

#define TORCHOPS_INSTANTIATE(T)                                   \
  template void launch_grouped_product(const GroupedProduct<T>&); \
  template void launch_grouped_gradient(const GroupedGradient<T>&);
TORCHOPS_FOR_EACH_DTYPE(TORCHOPS_INSTANTIATE)

}  // namespace torchops::kernels::routed_ffn
