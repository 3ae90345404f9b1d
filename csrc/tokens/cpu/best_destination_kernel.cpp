#include "tokens/cpu/best_destination_kernel.h"

#include "core/cpu/integer_product.h"
#include "core/cpu/simd.h"
#include "tokens/cpu/integer_row.h"

namespace torchops::kernels::tokens::TORCHOPS_LEVEL {
namespace {

static_assert(panel_columns<int32_t> <= 64, "best_destination_columns counts on it");
static_assert(source_block % tile_rows == 0);

constexpr int32_t no_similarity = nan_similarity - 1;

// Best destination so far of each of a tile's rows, lane by lane.
struct Best {
  vfloat similarity[tile_rows];  // rounded, plus `rounding`
  vint vector[tile_rows];        // index of the vector of lanes it was found in
};

}  // namespace

template <typename T>
void best_destination(const BestDestination<T>& args, int64_t begin, int64_t end, int16_t* integers,
                      float* inverse_lengths, int64_t* positions) {
  constexpr int columns = panel_columns<int32_t>;
  const int64_t depth = integer_pairs(args.num_features);
  auto* const sources = reinterpret_cast<int16_pair*>(integers);
  int16_pair* const panels = sources + source_block * depth;
  float* const source_inverse = inverse_lengths;
  float* const destination_inverse = inverse_lengths + source_block;
  const auto is_padding = [&](int64_t batch, int64_t position) {
    return args.padding != nullptr && args.padding[batch * args.num_tokens + position];
  };
  const auto load_row = [&](int64_t batch, int64_t position, int16_pair* to) {
    if (depth > 0) {
      to[depth - 1] = {};  // an odd number of features leaves a half
    }
    return integer_row(args.metric.row(batch, position), args.num_features, reinterpret_cast<int16_t*>(to));
  };

  const vfloat none = broadcast(rounding + no_similarity);
  const vint last_column = vint{} + INT32_MAX;

  int64_t packed_batch = -1;
  int64_t num_destinations = 0;
  int64_t num_panels = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t batch = unit / args.blocks_per_row();
    const int64_t first = unit % args.blocks_per_row() * source_block;
    const int64_t count = args.num_sources - first < source_block ? args.num_sources - first : source_block;

    if (batch != packed_batch) {
      packed_batch = batch;
      num_destinations = 0;
      for (int64_t position = args.first_destination(); position < args.num_tokens; position += 2) {
        if (!is_padding(batch, position)) {
          positions[num_destinations++] = position;
        }
      }
      num_panels = (num_destinations + columns - 1) / columns;
      for (int64_t column = 0; column < num_panels * columns; ++column) {
        int16_pair* panel = panels + column / columns * columns * depth + column % columns;
        if (column < num_destinations) {
          destination_inverse[column] = load_row(batch, positions[column], sources);
        } else {
          // Similar to nothing: a NaN never displaces a destination of the same lane.
          destination_inverse[column] = __builtin_nanf("");
          __builtin_memset(sources, 0, static_cast<size_t>(depth) * sizeof(int16_pair));
        }
        for (int64_t d = 0; d < depth; ++d) {
          panel[d * columns] = sources[d];
        }
      }
    }
    for (int64_t s = 0; s < count; ++s) {
      source_inverse[s] = load_row(batch, args.first_source() + 2 * (first + s), sources + s * depth);
    }

    for (int64_t tile = 0; tile < count; tile += tile_rows) {
      const int64_t rows = count - tile < tile_rows ? count - tile : tile_rows;
      Best best;
      for (int row = 0; row < tile_rows; ++row) {
        best.similarity[row] = none;
        best.vector[row] = vint{};
      }
      for (int64_t p = 0; p < num_panels; ++p) {
        const int64_t columns_left = num_destinations - p * columns;
        const int64_t vectors =
            columns_left < columns ? (columns_left + lanes<float> - 1) / lanes<float> : int64_t{tile_vectors};
        with_vectors(vectors, [&](auto vector_count) {
          constexpr int count_of_vectors = decltype(vector_count)::value;
          vint product[tile_rows][count_of_vectors];
          product_tile({sources + tile * depth, depth, 1}, panels + p * depth * columns, columns, depth, product);
          for (int row = 0; row < tile_rows; ++row) {
            for (int v = 0; v < count_of_vectors; ++v) {
              const vfloat cosine = __builtin_convertvector(product[row][v], vfloat) * source_inverse[tile + row] *
                                    load(destination_inverse + p * columns + v * lanes<float>);
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
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t s = first + tile + row;
        const vint column = best.vector[row] * lanes<float> + lane_numbers<int32_t>();
        const vfloat similarity = column < static_cast<int32_t>(num_destinations) ? best.similarity[row] : none;
        const float highest = largest_lane<float>(similarity);
        const int32_t best_column = smallest_lane<int32_t>(similarity == highest ? column : last_column);
        const bool found = num_destinations > 0 && !is_padding(batch, args.first_source() + 2 * s);
        args.destination[batch * args.num_sources + s] = found ? positions[best_column] : -1;
        args.similarity[batch * args.num_sources + s] = static_cast<int32_t>(highest - rounding);
      }
    }
  }
}

template void best_destination(const BestDestination<double>&, int64_t, int64_t, int16_t*, float*, int64_t*);
template void best_destination(const BestDestination<float>&, int64_t, int64_t, int16_t*, float*, int64_t*);
template void best_destination(const BestDestination<bfloat16>&, int64_t, int64_t, int16_t*, float*, int64_t*);
template void best_destination(const BestDestination<float16>&, int64_t, int64_t, int16_t*, float*, int64_t*);

}  // namespace torchops::kernels::tokens::TORCHOPS_LEVEL
