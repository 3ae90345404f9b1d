#include "core/cpu/dense_product_kernel.h"

#include "core/cpu/arena.h"
#include "core/cpu/dense_product_output.h"

namespace torchops::kernels::core::TORCHOPS_LEVEL {
namespace {

// Up to so many rows packing the right operand costs more than it saves, as measured; with only 16 vector registers
// the products that do without have fewer sums in them.
constexpr int64_t few_rows = vector_bytes == 64 ? 48 : 16;

// ---- many rows ------------------------------------------------------------------------------------------------

// A unit is a tile of rows for one panel of columns; panels that follow each other share the packed rows. Blocks
// of the depth, and the sums of their panels, fit in the second-level cache. The depth is cut alike for every
// product of that depth.
constexpr int64_t most_tile_rows = 512;
constexpr int64_t most_panels = 8;
constexpr int64_t most_depth = 256;

template <typename T>
struct TileProduct {
  using A = accumulate_t<T>;
  using E = multiplicand_t<T>;
  static constexpr int64_t panel = strip_columns<E>;

  const DenseProduct<T>& args;
  Pieces row_tiles;
  Pieces depth_blocks;
  int64_t num_panels;
  LeftBlock<E> left;
  E* right;  // [depth][panel]
  A* sums;   // [most_panels][tile][panel]

  TileProduct(const DenseProduct<T>& product, Arena* arena)
      : args(product),
        row_tiles(product.num_rows, most_tile_rows, strip_rows<E>),
        depth_blocks(product.depth, most_depth * element<E>::depth, element<E>::depth),
        num_panels(divide_up(product.num_columns, panel)) {
    const int64_t depth = depth_of<E>(depth_blocks.size);
    left.data = arena->take<E>(left.elements(row_tiles.size, depth_blocks.size));
    right = arena->take<E>(depth * panel);
    sums = arena->take<A>(depth_blocks.count == 1 ? 0 : most_panels * row_tiles.size * panel);
  }

  int64_t num_units() const { return row_tiles.count * num_panels * args.num_batches; }

  void run(int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t first_panel = begin % num_panels;
      const int64_t panels = smaller(smaller(most_panels, num_panels - first_panel), end - begin);
      multiply(begin / num_panels / row_tiles.count, begin / num_panels % row_tiles.count, first_panel, panels);
      begin += panels;
    }
  }

  void multiply(int64_t batch, int64_t tile, int64_t first_panel, int64_t panels) {
    const int64_t first_row = tile * row_tiles.size;
    const int64_t rows = smaller(row_tiles.size, args.num_rows - first_row);
    for (int64_t block = 0; block < depth_blocks.count; ++block) {
      const int64_t d = block * depth_blocks.size;
      const int64_t depth = smaller(depth_blocks.size, args.depth - d);
      left.pack(lines_of(args.left, batch, first_row, d), lines_are_rows(args.left), rows, depth);
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t column = (first_panel + p) * panel;
        const int64_t columns = smaller(panel, args.num_columns - column);
        pack_panel(lines_of(args.right, batch, d, column), lines_are_rows(args.right), depth, columns, right);
        with_vectors(divide_up(columns, lanes<T>), [&](auto vectors) {
          multiply_panel<decltype(vectors)::value>(batch, block, first_row, rows, column, columns,
                                                   sums + p * row_tiles.size * panel);
        });
      }
    }
  }

  template <int vectors>
  void multiply_panel(int64_t batch, int64_t block, int64_t first_row, int64_t rows, int64_t column, int64_t columns,
                      A* panel_sums) {
    constexpr int64_t width = vectors * lanes<A>;
    const bool first = block == 0, last = block + 1 == depth_blocks.count;
    for (int64_t strip = 0; strip < rows; strip += strip_rows<E>) {
      // Nothing but loops of constant length may touch the sums: then they stay in registers.
      A tile[strip_rows<E> * width];
      {
        vec<A> sum[strip_rows<E>][vectors];
        product_tile(left.strip(strip), right, panel, left.depth, sum);
        for (int row = 0; row < strip_rows<E>; ++row) {
          for (int v = 0; v < vectors; ++v) {
            store(tile + row * width + v * lanes<A>, sum[row][v]);
          }
        }
      }
      A* const so_far = panel_sums + strip * width;
      if (!first) {
        for (int64_t i = 0; i < strip_rows<E> * width; i += lanes<A>) {
          store(tile + i, load(so_far + i) + load(tile + i));
        }
      }
      if (!last) {
        copy_row(so_far, tile, strip_rows<E> * width);
        continue;
      }
      for (int64_t row = 0; row < strip_rows<E> && strip + row < rows; ++row) {
        finish(args, batch, first_row + strip + row, column, tile + row * width, columns);
      }
    }
  }
};

// ---- few rows, the right operand along the depth --------------------------------------------------------------

// The left operand of a batch, [rows][stride], zeros behind the depth.
template <typename T, typename E>
void pack_left_rows(const DenseProduct<T>& args, int64_t batch, int64_t stride, E* packed) {
  const auto from = lines_of(args.left, batch, 0, 0);
  if (lines_are_rows(args.left)) {
    pack_rows(from, args.num_rows, args.depth, args.num_rows, stride, packed);
    return;
  }
  __builtin_memset(packed, 0, static_cast<size_t>(args.num_rows * stride) * sizeof(E));
  for (int64_t d = 0; d < args.depth; ++d) {
    for (int64_t row = 0; row < args.num_rows; ++row) {
      const T* const number = from[d] + row;
      if constexpr (is_pair<E>) {
        E& pair = packed[row * stride + d / 2];
        (d % 2 == 0 ? pair.first : pair.second) = number->bits;
      } else {
        packed[row * stride + d] = load_partial(number, 1)[0];
      }
    }
  }
}

// Every sum is over vectors along the depth of both operands, whose lanes are added up last.
template <typename T>
struct DotProduct {
  using A = accumulate_t<T>;
  using E = multiplicand_t<T>;
  static constexpr int64_t unit_columns = 16;
  // Sums in registers: half of AVX-512's 32 or of the others' 16.
  static constexpr int most_sums = vector_bytes == 64 ? 16 : 8;

  const DenseProduct<T>& args;
  int64_t stride;
  E* left;  // [rows][stride]
  A* sums;  // [rows][unit_columns]

  DotProduct(const DenseProduct<T>& product, Arena* arena)
      : args(product), stride(round_up(depth_of<E>(product.depth), lane_count<E>)) {
    left = arena->take<E>(product.num_rows * stride);
    sums = arena->take<A>(product.num_rows * unit_columns);
  }

  int64_t units_of_batch() const { return divide_up(args.num_columns, unit_columns); }
  int64_t num_units() const { return units_of_batch() * args.num_batches; }

  void run(int64_t begin, int64_t end) {
    int64_t packed_batch = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t batch = unit / units_of_batch(), column = unit % units_of_batch() * unit_columns;
      if (batch != packed_batch) {
        pack_left_rows(args, batch, stride, left);
        packed_batch = batch;
      }
      const int64_t columns = smaller(unit_columns, args.num_columns - column);
      const auto right = lines_of(args.right, batch, 0, column);
      int64_t row = 0;
      for (; row + 4 <= args.num_rows; row += 4) {
        multiply_rows<4, most_sums / 4>(row, right, columns);
      }
      switch (args.num_rows - row) {
        case 3:
          multiply_rows<3, most_sums / 4>(row, right, columns);
          break;
        case 2:
          multiply_rows<2, most_sums / 2>(row, right, columns);
          break;
        case 1:
          multiply_rows<1, most_sums / 2>(row, right, columns);
          break;
      }
      for (row = 0; row < args.num_rows; ++row) {
        finish(args, batch, row, column, sums + row * unit_columns, columns);
      }
    }
  }

  template <int rows, int at_once>
  void multiply_rows(int64_t row, const Lines<T>& right, int64_t columns) {
    int64_t column = 0;
    for (; column + at_once <= columns; column += at_once) {
      multiply<rows, at_once>(row, column, right);
    }
    for (; column < columns; ++column) {
      multiply<rows, 1>(row, column, right);
    }
  }

  template <int rows, int columns>
  inline __attribute__((always_inline)) void multiply(int64_t first_row, int64_t first_column, const Lines<T>& right) {
    vec<A> sum[rows][columns] = {};
    const E* const a = left + first_row * stride;
    const T* b[columns];
    for (int c = 0; c < columns; ++c) {
      b[c] = right[first_column + c];
    }
    const auto add = [&](int64_t d, int64_t used) {
      typename element<E>::vector column[columns];
      for (int c = 0; c < columns; ++c) {
        column[c] = load_elements<E>(b[c] + d, used);
      }
      for (int r = 0; r < rows; ++r) {
        typename element<E>::vector row;
        __builtin_memcpy(&row, a + r * stride + d / element<E>::depth, sizeof(row));
        for (int c = 0; c < columns; ++c) {
          sum[r][c] = multiply_add_lanes<E>(row, column[c], sum[r][c]);
        }
      }
    };
    constexpr int64_t step = lane_count<E> * element<E>::depth;
    int64_t d = 0;
    for (; d + step <= args.depth; d += step) {
      add(d, step);
    }
    if (d < args.depth) {
      add(d, args.depth - d);
    }
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; ++c) {
        sums[(first_row + r) * unit_columns + first_column + c] = sum_lanes<A>(sum[r][c]);
      }
    }
  }
};

// ---- few rows, the right operand along its columns ------------------------------------------------------------

// A few rows of the right operand at a time are added to the sums of a range of columns, which stay in the
// first-level cache.
template <typename T>
struct RowSums {
  using A = accumulate_t<T>;
  using E = multiplicand_t<T>;
  static constexpr int64_t unit_columns = 128;
  static constexpr int64_t most_sums = 4096;
  static constexpr int64_t at_once = 8 / element<E>::depth;
  static constexpr int64_t step = columns_across<E>;
  static constexpr int vectors = element<E>::depth;

  const DenseProduct<T>& args;
  int64_t most_columns;
  LeftBlock<E> left;
  A* sums;  // [rows][most_columns]

  RowSums(const DenseProduct<T>& product, Arena* arena)
      : args(product),
        most_columns(smaller(round_up(most_sums / product.num_rows, unit_columns),
                             round_up(product.num_columns, unit_columns))) {
    left.data = arena->take<E>(left.elements(product.num_rows, product.depth));
    sums = arena->take<A>(product.num_rows * most_columns);
  }

  int64_t units_of_batch() const { return divide_up(args.num_columns, unit_columns); }
  int64_t num_units() const { return units_of_batch() * args.num_batches; }

  void run(int64_t begin, int64_t end) {
    int64_t packed_batch = -1;
    while (begin < end) {
      const int64_t batch = begin / units_of_batch(), first = begin % units_of_batch();
      const int64_t units = smaller(smaller(most_columns / unit_columns, units_of_batch() - first), end - begin);
      if (batch != packed_batch) {
        left.pack(lines_of(args.left, batch, 0, 0), lines_are_rows(args.left), args.num_rows, args.depth);
        packed_batch = batch;
      }
      const int64_t column = first * unit_columns;
      multiply(batch, column, smaller(units * unit_columns, args.num_columns - column));
      begin += units;
    }
  }

  void multiply(int64_t batch, int64_t column, int64_t columns) {
    __builtin_memset(sums, 0, static_cast<size_t>(args.num_rows * most_columns) * sizeof(A));
    const auto right = lines_of(args.right, batch, 0, column);
    const int64_t depth = depth_of<E>(args.depth);
    const auto add_all = [&](auto left_step) {
      constexpr int step_of_left = decltype(left_step)::value;
      int64_t d = 0;
      for (; (d + at_once) * element<E>::depth <= args.depth; d += at_once) {
        add<at_once, step_of_left>(d, right, columns);
      }
      for (; d < depth; ++d) {
        add<1, step_of_left>(d, right, columns);
      }
    };
    if (left.in_groups) {
      add_all(torchops::kernels::count<LeftBlock<E>::group>{});
    } else {
      add_all(torchops::kernels::count<1>{});
    }
    for (int64_t row = 0; row < args.num_rows; ++row) {
      finish(args, batch, row, column, sums + row * most_columns, columns);
    }
  }

  template <int64_t count, int left_step>
  void add(int64_t d, const Lines<T>& right, int64_t columns) {
    // The last element may be half one.
    const T* from[count * element<E>::depth];
    for (int64_t i = 0; i < count * element<E>::depth; ++i) {
      const int64_t row = d * element<E>::depth + i;
      from[i] = row < args.depth ? right[row] : nullptr;
    }
    int64_t column = 0;
    for (; column + step <= columns; column += step) {
      add_columns<count, left_step>(d, column, from, step);
    }
    if (column < columns) {
      add_columns<count, left_step>(d, column, from, columns - column);
    }
  }

  template <int64_t count, int left_step>
  inline __attribute__((always_inline)) void add_columns(int64_t d, int64_t column, const T* const* from,
                                                         int64_t used) {
    typename element<E>::vector right[count][vectors];
    for (int64_t i = 0; i < count; ++i) {
      const T* const next = from[(i + 1) * element<E>::depth - 1];
      load_across<E>(from[i * element<E>::depth] + column, next == nullptr ? nullptr : next + column, used, right[i]);
    }
    const E* const first_left = left.data + d * left_step;
    const int64_t depth = left.depth;
    for (int64_t row = 0; row < args.num_rows; ++row) {
      A* const to = sums + row * most_columns + column;
      const E* const a =
          first_left + (left_step == 1 ? row * depth : row / left_step * left_step * depth + row % left_step);
      for (int v = 0; v < vectors; ++v) {
        vec<A> sum = load(to + v * lanes<A>);
        for (int64_t i = 0; i < count; ++i) {
          sum = multiply_add(a[i * left_step], right[i][v], sum);
        }
        store(to + v * lanes<A>, sum);
      }
    }
  }
};

template <typename T, typename Body>
inline __attribute__((always_inline)) auto with_product(const DenseProduct<T>& args, void* scratch, const Body& body) {
  Arena arena(scratch);
  if (args.num_rows > few_rows) {
    TileProduct<T> product(args, &arena);
    return body(product, arena);
  }
  if (!lines_are_rows(args.right)) {
    DotProduct<T> product(args, &arena);
    return body(product, arena);
  }
  RowSums<T> product(args, &arena);
  return body(product, arena);
}

}  // namespace

template <typename T>
int64_t dense_product_units(const DenseProduct<T>& args) {
  return with_product(args, nullptr, [](auto& product, const Arena&) { return product.num_units(); });
}

template <typename T>
int64_t dense_product_scratch_bytes(const DenseProduct<T>& args) {
  return with_product(args, nullptr, [](auto&, const Arena& arena) { return arena.bytes(); });
}

template <typename T>
void dense_product(const DenseProduct<T>& args, void* scratch, int64_t begin, int64_t end) {
  with_product(args, scratch, [&](auto& product, const Arena&) { product.run(begin, end); });
}

#define TORCHOPS_INSTANTIATE(T)                                         \
  template int64_t dense_product_units(const DenseProduct<T>&);         \
  template int64_t dense_product_scratch_bytes(const DenseProduct<T>&); \
  template void dense_product(const DenseProduct<T>&, void*, int64_t, int64_t);
TORCHOPS_INSTANTIATE(double)
TORCHOPS_INSTANTIATE(float)
TORCHOPS_INSTANTIATE(bfloat16)
TORCHOPS_INSTANTIATE(float16)
#undef TORCHOPS_INSTANTIATE

}  // namespace torchops::kernels::core::TORCHOPS_LEVEL
