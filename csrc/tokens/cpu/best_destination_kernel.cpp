#include "tokens/cpu/best_destination_kernel.h"

#include "core/cpu/integer_product.h"
#include "core/cpu/simd.h"
#include "tokens/cpu/integer_row.h"

namespace torchops::kernels::tokens::TORCHOPS_LEVEL {
namespace {

static_assert(panel_columns<int32_t> <= 64, "best_destination_columns counts on it");
static_assert(source_block % tile_rows == 0);

constexpr int columns = panel_columns<int32_t>;

// The destinations of a batch row: integers in panels of `columns` rows, and behind the last one columns that are
// similar to nothing.
struct Destinations {
  int16_pair* panels;
  float* inverse_lengths;
  int64_t* positions;
  int64_t depth;
  int64_t count;

  int64_t num_panels() const { return (count + columns - 1) / columns; }
};

// Best destination so far of each of a tile's rows, lane by lane.
struct Best {
  vfloat similarity[tile_rows];  // rounded, plus `rounding`
  vint vector[tile_rows];        // index of the vector of lanes it was found in
};

template <typename T>
bool is_padding(const BestDestination<T>& args, int64_t batch, int64_t position) {
  return args.padding != nullptr && args.padding[batch * args.num_tokens + position];
}

// Writes the integers of a row, returns the inverse of their length.
template <typename T>
float load_row(const BestDestination<T>& args, int64_t batch, int64_t position, int16_pair* to) {
  const int64_t depth = integer_pairs(args.num_features);
  if (depth > 0) {
    to[depth - 1] = {};  // an odd number of features leaves a half
  }
  return integer_row(args.metric.row(batch, position), args.num_features, reinterpret_cast<int16_t*>(to));
}

// `row` holds one row.
template <typename T>
void pack_destinations(const BestDestination<T>& args, int64_t batch, int16_pair* row, Destinations& to) {
  to.count = 0;
  for (int64_t position = args.first_destination(); position < args.num_tokens; position += 2) {
    if (!is_padding(args, batch, position)) {
      to.positions[to.count++] = position;
    }
  }
  for (int64_t column = 0; column < to.num_panels() * columns; ++column) {
    if (column < to.count) {
      to.inverse_lengths[column] = load_row(args, batch, to.positions[column], row);
    } else {
      // Similar to nothing: a NaN never displaces a destination of the same lane.
      to.inverse_lengths[column] = __builtin_nanf("");
      __builtin_memset(row, 0, static_cast<size_t>(to.depth) * sizeof(int16_pair));
    }
    int16_pair* panel = to.panels + column / columns * columns * to.depth + column % columns;
    for (int64_t d = 0; d < to.depth; ++d) {
      panel[d * columns] = row[d];
    }
  }
}

// The sources of a tile with all destinations.
Best match_tile(const int16_pair* sources, const float* inverse_lengths, const Destinations& destinations) {
  const int64_t depth = destinations.depth;
  Best best;
  for (int row = 0; row < tile_rows; ++row) {
    best.similarity[row] = broadcast(rounding + no_similarity);
    best.vector[row] = vint{};
  }
  for (int64_t p = 0; p < destinations.num_panels(); ++p) {
    const int64_t columns_left = destinations.count - p * columns;
    const int64_t vectors =
        columns_left < columns ? (columns_left + lanes<float> - 1) / lanes<float> : int64_t{tile_vectors};
    with_vectors(vectors, [&](auto vector_count) {
      constexpr int count_of_vectors = decltype(vector_count)::value;
      vint product[tile_rows][count_of_vectors];
      product_tile({sources, depth, 1}, destinations.panels + p * depth * columns, columns, depth, product);
      for (int row = 0; row < tile_rows; ++row) {
        for (int v = 0; v < count_of_vectors; ++v) {
          const vfloat cosine = __builtin_convertvector(product[row][v], vfloat) * inverse_lengths[row] *
                                load(destinations.inverse_lengths + p * columns + v * lanes<float>);
          const vfloat value = cosine * similarity_steps + rounding;
          const vfloat candidate = value == value ? value : vfloat{} + (rounding + nan_similarity);
          const auto better = candidate > best.similarity[row];
          const vint here = vint{} + static_cast<int32_t>(p * tile_vectors + v);
          best.similarity[row] = better ? candidate : best.similarity[row];
          best.vector[row] = better ? here : best.vector[row];
        }
      }
    });
  }
  return best;
}

// Of sources `first` to `first + rows - 1`: the best of all lanes, the lowest position among equals.
template <typename T>
void write_best(const BestDestination<T>& args, int64_t batch, int64_t first, int64_t rows, const Best& best,
                const Destinations& destinations) {
  const vfloat none = broadcast(rounding + no_similarity);
  const vint last_column = vint{} + INT32_MAX;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t s = first + row;
    const vint column = best.vector[row] * lanes<float> + lane_numbers<int32_t>();
    const vfloat similarity = column < static_cast<int32_t>(destinations.count) ? best.similarity[row] : none;
    const float highest = largest_lane<float>(similarity);
    const int32_t best_column = smallest_lane<int32_t>(similarity == highest ? column : last_column);
    const bool found = destinations.count > 0 && !is_padding(args, batch, args.first_source() + 2 * s);
    args.destination[batch * args.num_sources + s] = found ? destinations.positions[best_column] : -1;
    args.similarity[batch * args.num_sources + s] = static_cast<int32_t>(highest - rounding);
  }
}

}  // namespace

template <typename T>
void best_destination(const BestDestination<T>& args, int64_t begin, int64_t end, int16_t* integers,
                      float* inverse_lengths, int64_t* positions) {
  const int64_t depth = integer_pairs(args.num_features);
  auto* const sources = reinterpret_cast<int16_pair*>(integers);
  Destinations destinations{sources + source_block * depth, inverse_lengths + source_block, positions, depth, 0};
  int64_t packed_batch = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t batch = unit / args.blocks_per_row();
    const int64_t first = unit % args.blocks_per_row() * source_block;
    const int64_t count = args.num_sources - first < source_block ? args.num_sources - first : source_block;
    if (batch != packed_batch) {
      packed_batch = batch;
      pack_destinations(args, batch, sources, destinations);
    }
    for (int64_t s = 0; s < count; ++s) {
      inverse_lengths[s] = load_row(args, batch, args.first_source() + 2 * (first + s), sources + s * depth);
    }
    for (int64_t tile = 0; tile < count; tile += tile_rows) {
      const int64_t rows = count - tile < tile_rows ? count - tile : tile_rows;
      write_best(args, batch, first + tile, rows,
                 match_tile(sources + tile * depth, inverse_lengths + tile, destinations), destinations);
    }
  }
}

template void best_destination(const BestDestination<double>&, int64_t, int64_t, int16_t*, float*, int64_t*);
template void best_destination(const BestDestination<float>&, int64_t, int64_t, int16_t*, float*, int64_t*);
template void best_destination(const BestDestination<bfloat16>&, int64_t, int64_t, int16_t*, float*, int64_t*);
template void best_destination(const BestDestination<float16>&, int64_t, int64_t, int16_t*, float*, int64_t*);

}  // namespace torchops::kernels::tokens::TORCHOPS_LEVEL
