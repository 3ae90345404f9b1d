#include "tokens/cpu/best_destination_kernel.h"

#include "core/cpu/matrix_product.h"
#include "core/cpu/simd.h"

namespace torchops::kernels::tokens::TORCHOPS_LEVEL {
namespace {

static_assert(panel_columns<float> <= 64, "best_destination_scratch counts on it");
static_assert(source_block % tile_rows == 0);

// Features summed in one chain. Short chains keep the error below half a similarity step.
constexpr int64_t chain_length = 64;
constexpr int32_t no_similarity = nan_similarity - 1;
// Adding it to a float of magnitude below 2^22 rounds that to an integer, ties to even.
constexpr float rounding = 0x1.8p23f;

template <typename T>
vec<accumulate_t<T>> squares(const T* row, int64_t size) {
  vec<accumulate_t<T>> sum = {};
  for_each_vector<T>(size, [&](int64_t k, int count) {
    const auto value = load_piece(row + k, count);
    sum += value * value;
  });
  return sum;
}

template <typename T>
accumulate_t<T> largest_magnitude(const T* row, int64_t size) {
  vec<accumulate_t<T>> largest = {};
  for_each_vector<T>(size, [&](int64_t k, int count) {
    const auto value = load_piece(row + k, count);
    const auto magnitude = value < 0 ? -value : value;
    largest = magnitude > largest ? magnitude : largest;
  });
  return largest_lane<accumulate_t<T>>(largest);
}

// output = row / divisor as float.
template <typename T>
void divide(const T* row, int64_t size, accumulate_t<T> divisor, float* output) {
  for_each_vector<T>(size, [&](int64_t k, int count) {
    const auto value = load_piece(row + k, count) / divisor;
    if constexpr (sizeof(accumulate_t<T>) == sizeof(float)) {
      store_piece(output + k, value, count);
    } else {
      const auto narrowed = __builtin_convertvector(value, typename vector_of<float, vector_bytes / 2>::type);
      __builtin_memcpy(output + k, &narrowed, static_cast<size_t>(count) * sizeof(float));
    }
  });
}

// output = row / its Euclidean norm as float: zeros for a row of zeros, NaNs for one with a NaN or an
// infinity in it.
template <typename T>
void normalize(const T* row, int64_t size, float* output) {
  using A = accumulate_t<T>;
  constexpr A too_small = sizeof(A) == sizeof(float) ? A(1e-30) : A(1e-250);
  constexpr A too_large = sizeof(A) == sizeof(float) ? A(1e+30) : A(1e+250);
  const A sum = sum_lanes<A>(squares(row, size));
  if (!(sum < too_small || sum > too_large)) {
    divide(row, size, A(__builtin_sqrt(sum)), output);
    return;
  }
  // Squares have vanished or overflowed, or lost accuracy: bring the largest magnitude to 1 first.
  const A largest = largest_magnitude(row, size);
  divide(row, size, largest == 0 ? A(1) : largest, output);
  if (largest != 0) {
    normalize(output, size, output);
  }
}

// Best destination so far of each of a tile's rows, lane by lane.
struct Best {
  vfloat similarity[tile_rows];  // rounded, plus `rounding`
  vint vector[tile_rows];        // index of the vector of lanes it was found in
};

}  // namespace

template <typename T>
void best_destination(const BestDestination<T>& args, int64_t begin, int64_t end, float* scratch, int64_t* positions) {
  constexpr int columns = panel_columns<float>;
  const int64_t depth = args.num_features;
  float* const sources = scratch;
  float* const panels = scratch + source_block * depth;
  const auto is_padding = [&](int64_t batch, int64_t position) {
    return args.padding != nullptr && args.padding[batch * args.num_tokens + position];
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
        float* panel = panels + column / columns * columns * depth + column % columns;
        if (column < num_destinations) {
          normalize(args.metric.row(batch, positions[column]), depth, sources);
          for (int64_t d = 0; d < depth; ++d) {
            panel[d * columns] = sources[d];
          }
        } else {
          // Similar to nothing: a NaN never displaces a destination of the same lane.
          for (int64_t d = 0; d < depth; ++d) {
            panel[d * columns] = __builtin_nanf("");
          }
        }
      }
    }
    for (int64_t s = 0; s < count; ++s) {
      normalize(args.metric.row(batch, args.first_source() + 2 * (first + s)), depth, sources + s * depth);
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
          vfloat cosine[tile_rows][count_of_vectors] = {};
          for (int64_t d = 0; d < depth; d += chain_length) {
            vfloat part[tile_rows][count_of_vectors];
            product_tile({sources + tile * depth + d, depth, 1}, panels + (p * depth + d) * columns, columns,
                         depth - d < chain_length ? depth - d : chain_length, part);
            for (int row = 0; row < tile_rows; ++row) {
              for (int v = 0; v < count_of_vectors; ++v) {
                cosine[row][v] += part[row][v];
              }
            }
          }
          for (int row = 0; row < tile_rows; ++row) {
            for (int v = 0; v < count_of_vectors; ++v) {
              const vfloat value = cosine[row][v] * similarity_steps + rounding;
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

template void best_destination(const BestDestination<double>&, int64_t, int64_t, float*, int64_t*);
template void best_destination(const BestDestination<float>&, int64_t, int64_t, float*, int64_t*);
template void best_destination(const BestDestination<bfloat16>&, int64_t, int64_t, float*, int64_t*);
template void best_destination(const BestDestination<float16>&, int64_t, int64_t, float*, int64_t*);

}  // namespace torchops::kernels::tokens::TORCHOPS_LEVEL
