#pragma once

#include <type_traits>

#include "core/cpu/arena.h"
#include "core/cpu/simd.h"
#include "stf/cpu/packed_groups.h"
#include "stf/cpu/sparse_product_kernel.h"

// What the products with the sparse factor have in common: nonzeros as lists of values and sources, and sums of
// their products with vectors of tokens.

namespace torchops::kernels::stf::TORCHOPS_LEVEL {

inline constexpr int most_vectors = 4;

template <int number>
struct int_constant {
  static constexpr int value = number;
};

// Calls body(a constant) with the number of vectors in a tile of tokens.
template <typename T, typename Body>
inline void for_vectors(int64_t token_tile, const Body& body) {
  switch (token_tile / lanes<T>) {
    case 1:
      return body(int_constant<1>{});
    case 2:
      return body(int_constant<2>{});
    default:
      return body(int_constant<most_vectors>{});
  }
}

// The highest of the indices of `count` nonzeros, which are copied.
template <typename Index>
int32_t copy_indices(const Index* indices, int64_t count, uint16_t* to) {
  int32_t highest = 0;
  for (int64_t at = 0; at < count; ++at) {
    highest = indices[at] > highest ? indices[at] : highest;
    to[at] = indices[at];
  }
  return highest;
}

// Position of the first index out of range among `count` from `begin` on.
template <typename T>
int64_t first_wrong_index(const SparseFactor<T>& factor, int64_t begin, int64_t count) {
  for (int64_t at = begin; at < begin + count; ++at) {
    if (factor.index(at) >= factor.basis_size) {
      return at;
    }
  }
  return -1;
}

// A block of rows as the loops read it.
template <typename T>
struct RowBlock {
  using A = accumulate_t<T>;

  A* values;           // [row_block][blocks][nnz]
  uint16_t* sources;   // [row_block][blocks][nnz]
  int64_t* starts;     // [row_block][blocks][chunks + 1]: where the nonzeros of a chunk of atoms begin
  A* output;           // [row_block][token_tile]
  A* group = nullptr;  // room for the values of a packed factor's group
  int64_t chunk_size;
  int64_t num_chunks;

  template <template <typename> typename Factor>
  RowBlock(Arena* arena, const Factor<T>& factor, int64_t token_tile)
      : chunk_size(sources_of_chunk(factor, token_tile)), num_chunks(parts_of(factor.basis_size, chunk_size)) {
    values = arena->take<A>(row_block * factor.row_size());
    sources = arena->take<uint16_t>(row_block * factor.row_size());
    starts = arena->take<int64_t>(row_block * factor.num_blocks * (num_chunks + 1));
    output = arena->take<A>(row_block * token_tile);
    if constexpr (std::is_same_v<Factor<T>, PackedFactor<T>>) {
      group = arena->take<A>(group_scratch(factor));
    }
  }

  // Reads count rows from `first` on. Returns the position of an index that is out of range, or -1.
  int64_t load(const SparseFactor<T>& factor, int64_t first, int64_t count) const {
    const int64_t size = count * factor.row_size();
    const int64_t begin = first * factor.row_size();
    if (factor.values != nullptr) {
      for_each_vector<T>(size, [&](int64_t at, int used) {
        store_piece(values + at, load_piece(factor.values + begin + at, used), used);
      });
    }
    const int32_t highest = factor.byte_indices
                                ? copy_indices(static_cast<const uint8_t*>(factor.indices) + begin, size, sources)
                                : copy_indices(static_cast<const uint16_t*>(factor.indices) + begin, size, sources);
    if (highest >= factor.basis_size && size > 0) {
      return first_wrong_index(factor, begin, size);
    }
    find_chunks(count * factor.num_blocks, factor.nnz);
    return -1;
  }

  int64_t load(const PackedFactor<T>& factor, int64_t first, int64_t count) const {
    for (int64_t row = 0; row < count; row += rows_per_group) {
      const int64_t index = (first + row) / rows_per_group;
      if (!counts_are_right(factor, index)) {
        return first;
      }
      const A* const of_group = group_values(factor, index, group);
      for (int64_t block = 0; block < factor.num_blocks; ++block) {
        const int64_t at = row * factor.row_size() + block * factor.nnz;
        if (!list_rows(of_group + block * rows_per_group * factor.nnz,
                       factor.mask + (index * factor.num_blocks + block) * factor.basis_size, factor.basis_size,
                       factor.nnz, values + at, sources + at, factor.row_size())) {
          return first;
        }
      }
    }
    find_chunks(count * factor.num_blocks, factor.nnz);
    return -1;
  }

 private:
  void find_chunks(int64_t num_lists, int64_t nnz) const {
    for (int64_t list = 0; list < num_lists; ++list) {
      find_chunks(list * nnz, nnz, starts + list * (num_chunks + 1));
    }
  }

  // Sources that do not increase count as the first chunk's: slower and as right.
  void find_chunks(int64_t begin, int64_t nnz, int64_t* chunk_starts) const {
    bool descends = false;
    for (int64_t e = begin + 1; e < begin + nnz && num_chunks > 1; ++e) {
      descends |= sources[e] < sources[e - 1];
    }
    chunk_starts[0] = begin;
    chunk_starts[num_chunks] = begin + nnz;
    for (int64_t chunk = 1; chunk < num_chunks; ++chunk) {
      chunk_starts[chunk] = descends ? begin + nnz : first_at_least(begin, nnz, chunk * chunk_size);
    }
  }

  int64_t first_at_least(int64_t begin, int64_t count, int64_t source) const {
    while (count > 0) {
      const int64_t half = count / 2;
      const bool below = sources[begin + half] < source;
      begin = below ? begin + half + 1 : begin;
      count = below ? count - half - 1 : half;
    }
    return begin;
  }
};

template <typename Factor>
int64_t rows_in_block(const Factor& factor, int64_t first) {
  const int64_t left = factor.num_rows - first;
  return left < row_block ? left : row_block;
}

// sums [vectors] += the values of a list times the tokens [vectors] of their sources. Neighbours go to sums of
// their own, for an addition waits for the one before.
template <int vectors, typename A>
inline void add_list(const A* values, const uint16_t* sources, int64_t count, const A* tile, A* sums) {
  constexpr int chains = 8 / vectors;
  constexpr int64_t width = vectors * lanes<A>;
  // Without unrolled loops the compiler keeps a second copy of the sums on the stack.
  vec<A> sum[chains][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < chains * vectors; ++i) {
    sum[i / vectors][i % vectors] = i < vectors ? load(sums + i * lanes<A>) : vec<A>{};
  }
  int64_t e = 0;
  for (; e + chains <= count; e += chains) {
#pragma GCC unroll 8
    for (int i = 0; i < chains * vectors; ++i) {
      const A* const source = tile + sources[e + i / vectors] * width;
      sum[i / vectors][i % vectors] += values[e + i / vectors] * load(source + i % vectors * lanes<A>);
    }
  }
  for (; e < count; ++e) {
    const A* const source = tile + sources[e] * width;
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      sum[0][v] += values[e] * load(source + v * lanes<A>);
    }
  }
#pragma GCC unroll 8
  for (int i = vectors; i < chains * vectors; ++i) {
    sum[0][i % vectors] += sum[i / vectors][i % vectors];
  }
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    store(sums + v * lanes<A>, sum[0][v]);
  }
}

}  // namespace torchops::kernels::stf::TORCHOPS_LEVEL
