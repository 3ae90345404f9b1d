#include "stf/cpu/sparse_product_kernel.h"

#include "stf/cpu/sparse_product_lists.h"

namespace torchops::kernels::stf::TORCHOPS_LEVEL {
namespace {

template <int vectors, typename T, template <typename> typename Factor>
void atoms_to_rows(const AtomsToRows<T, Factor>& args, const RowBlock<T>& rows, int64_t first, int64_t tile) {
  using A = accumulate_t<T>;
  const Factor<T>& factor = args.factor;
  constexpr int64_t width = vectors * lanes<A>;
  const int64_t count = rows_in_block(factor, first);
  __builtin_memset(rows.output, 0, static_cast<size_t>(row_block * width) * sizeof(A));
  for (int64_t block = 0; block < factor.num_blocks; ++block) {
    const A* const atoms = args.atoms + (block * args.num_tiles() + tile) * factor.basis_size * width;
    for (int64_t chunk = 0; chunk < rows.num_chunks; ++chunk) {
      for (int64_t row = 0; row < count; ++row) {
        const int64_t* const start = rows.starts + (row * factor.num_blocks + block) * (rows.num_chunks + 1) + chunk;
        add_list<vectors>(rows.values + start[0], rows.sources + start[0], start[1] - start[0], atoms,
                          rows.output + row * width);
      }
    }
  }
  for (int64_t row = 0; row < count; row += lanes<A>) {
    const auto used = static_cast<int>(count - row < lanes<A> ? count - row : lanes<A>);
    const vec<A> bias = args.bias == nullptr ? vec<A>{} : load_piece(args.bias + first + row, used);
    for (int64_t v = 0; v < vectors; ++v) {
      turn<A>([&](int i) { return load(rows.output + (row + i) * width + v * lanes<A>); },
              [&](int i, vec<A> numbers) {
                const int64_t token = tile * width + v * lanes<A> + i;
                if (token < args.num_tokens) {
                  store_piece(args.output + token * factor.num_rows + first + row, numbers + bias, used);
                }
              });
    }
  }
}

// ---- gradient to values -----------------------------------------------------------------------

// Nonzeros whose sums over lanes are taken together.
template <typename A>
constexpr int grouped = lanes<A> < 4 ? lanes<A> : 4;

// Neighbours of each added up, at distance `step`: lanes with that bit are the second's.
template <int step, typename A>
inline vec<A> merge(vec<A> first, vec<A> second) {
  vec<typename lane_index<sizeof(A)>::type> near;
  for (int lane = 0; lane < lanes<A>; ++lane) {
    near[lane] = (lane & step ? lanes<A> : 0) + (lane & ~step);
  }
  return __builtin_shuffle(first, second, near) + __builtin_shuffle(first, second, near + step);
}

template <typename A, int bytes>
inline typename vector_of<A, grouped<A>* static_cast<int>(sizeof(A))>::type add_halves(
    typename vector_of<A, bytes>::type value) {
  if constexpr (bytes == grouped<A> * sizeof(A)) {
    return value;
  } else {
    typename vector_of<A, bytes / 2>::type halves[2];
    __builtin_memcpy(halves, &value, sizeof(value));
    return add_halves<A, bytes / 2>(halves[0] + halves[1]);
  }
}

// sums[e] += the sum over tokens of a row times the source of nonzero e.
template <int vectors, typename A>
inline void add_products(const A* row, const uint16_t* sources, int64_t count, const A* tile, A* sums) {
  constexpr int64_t width = vectors * lanes<A>;
  vec<A> numbers[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    numbers[v] = load(row + v * lanes<A>);
  }
  const auto product = [&](int64_t e) {
    const A* const source = tile + sources[e] * width;
    vec<A> sum = numbers[0] * load(source);
#pragma GCC unroll 4
    for (int v = 1; v < vectors; ++v) {
      sum += numbers[v] * load(source + v * lanes<A>);
    }
    return sum;
  };
  int64_t e = 0;
  for (; e + grouped<A> <= count; e += grouped<A>) {
    vec<A> merged;
    if constexpr (grouped<A> == 4) {
      const vec<A> first = merge<1, A>(product(e), product(e + 1));
      merged = merge<2, A>(first, merge<1, A>(product(e + 2), product(e + 3)));
    } else {
      merged = merge<1, A>(product(e), product(e + 1));
    }
    const auto totals = add_halves<A, vector_bytes>(merged);
    for (int i = 0; i < grouped<A>; ++i) {
      sums[e + i] += totals[i];
    }
  }
  for (; e < count; ++e) {
    sums[e] += sum_lanes<A>(product(e));
  }
}

template <int vectors, typename T>
void value_gradient(const ValueGradient<T>& args, const RowBlock<T>& rows, int64_t first, int64_t count) {
  using A = accumulate_t<T>;
  const SparseFactor<T>& factor = args.factor;
  constexpr int64_t width = vectors * lanes<A>;
  for (int64_t tile = 0; tile < args.num_tiles(); ++tile) {
    const A* const tokens = args.rows + (tile * factor.num_rows + first) * width;
    for (int64_t block = 0; block < factor.num_blocks; ++block) {
      const A* const atoms = args.atoms + (block * args.num_tiles() + tile) * factor.basis_size * width;
      for (int64_t chunk = 0; chunk < rows.num_chunks; ++chunk) {
        for (int64_t row = 0; row < count; ++row) {
          const int64_t* const start = rows.starts + (row * factor.num_blocks + block) * (rows.num_chunks + 1) + chunk;
          add_products<vectors>(tokens + row * width, rows.sources + start[0], start[1] - start[0], atoms,
                                rows.values + start[0]);
        }
      }
    }
  }
}

}  // namespace

template <typename T>
int64_t token_tile(int64_t num_tokens) {
  return num_tokens <= lanes<T> ? lanes<T> : num_tokens <= 2 * lanes<T> ? 2 * lanes<T> : most_vectors * lanes<T>;
}

template <typename T>
void token_tiles(const TokenTiles<T>& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  for (int64_t tile = begin; tile < end; ++tile) {
    A* const to = args.tiles + tile * args.size * args.token_tile;
    for (int64_t first = 0; first < args.token_tile; first += lanes<A>) {
      for_each_vector<T>(args.size, [&](int64_t column, int used) {
        turn<A>(
            [&](int i) {
              const int64_t token = tile * args.token_tile + first + i;
              return token < args.num_tokens ? load_piece(args.tokens + token * args.token_stride + column, used)
                                             : vec<A>{};
            },
            [&](int i, vec<A> numbers) {
              if (i < used) {
                store(to + (column + i) * args.token_tile + first, numbers);
              }
            });
      });
    }
  }
}

template <typename T, template <typename> typename Factor>
int64_t sparse_scratch_bytes(const Factor<T>& factor, int64_t token_tile) {
  Arena arena(nullptr);
  RowBlock<T>(&arena, factor, token_tile);
  return arena.bytes();
}

template <typename T, template <typename> typename Factor>
int64_t atoms_to_rows(const AtomsToRows<T, Factor>& args, void* scratch, int64_t begin, int64_t end) {
  Arena arena(scratch);
  const RowBlock<T> rows(&arena, args.factor, args.token_tile);
  int64_t loaded = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit / args.num_tiles() * row_block;
    if (first != loaded) {
      const int64_t wrong = rows.load(args.factor, first, rows_in_block(args.factor, first));
      if (wrong >= 0) {
        return wrong;
      }
      loaded = first;
    }
    for_vectors<T>(args.token_tile, [&](auto vectors) {
      atoms_to_rows<decltype(vectors)::value>(args, rows, first, unit % args.num_tiles());
    });
  }
  return -1;
}

template <typename T>
int64_t value_gradient(const ValueGradient<T>& args, void* scratch, int64_t begin, int64_t end) {
  const SparseFactor<T>& factor = args.factor;
  Arena arena(scratch);
  const RowBlock<T> rows(&arena, factor, args.token_tile);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * row_block;
    const int64_t count = rows_in_block(factor, first);
    const int64_t wrong = rows.load(factor, first, count);
    if (wrong >= 0) {
      return wrong;
    }
    const int64_t size = count * factor.row_size();
    __builtin_memset(rows.values, 0, static_cast<size_t>(size) * sizeof(accumulate_t<T>));
    for_vectors<T>(args.token_tile,
                   [&](auto vectors) { value_gradient<decltype(vectors)::value>(args, rows, first, count); });
    T* const to = args.grad_values + first * factor.row_size();
    for_each_vector<T>(size, [&](int64_t at, int used) { store_piece(to + at, load(rows.values + at), used); });
  }
  return -1;
}

#define TORCHOPS_INSTANTIATE(T)                                                                 \
  template int64_t token_tile<T>(int64_t);                                                      \
  template void token_tiles(const TokenTiles<T>&, int64_t, int64_t);                            \
  template int64_t sparse_scratch_bytes(const SparseFactor<T>&, int64_t);                       \
  template int64_t sparse_scratch_bytes(const PackedFactor<T>&, int64_t);                       \
  template int64_t atoms_to_rows(const AtomsToRows<T>&, void*, int64_t, int64_t);               \
  template int64_t atoms_to_rows(const AtomsToRows<T, PackedFactor>&, void*, int64_t, int64_t); \
  template int64_t value_gradient(const ValueGradient<T>&, void*, int64_t, int64_t);
TORCHOPS_INSTANTIATE(double)
TORCHOPS_INSTANTIATE(float)
TORCHOPS_INSTANTIATE(bfloat16)
TORCHOPS_INSTANTIATE(float16)
#undef TORCHOPS_INSTANTIATE

}  // namespace torchops::kernels::stf::TORCHOPS_LEVEL
