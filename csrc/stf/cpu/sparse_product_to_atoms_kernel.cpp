#include "stf/cpu/sparse_product_lists.h"

namespace torchops::kernels::stf::TORCHOPS_LEVEL {
namespace {

// Counting sort by atoms.
template <typename Index, typename T>
void sort_chunk(const SortedFactor<T>& args, int64_t chunk, int64_t block) {
  const SparseFactor<T>& factor = args.factor;
  const int64_t count = args.rows_in_chunk(chunk), first = args.first_nonzero(chunk, block);
  const int64_t offset = (chunk * args.chunk_rows * factor.num_blocks + block) * factor.nnz;
  const auto* const indices = static_cast<const Index*>(factor.indices) + offset;
  const T* const values = factor.values + offset;
  int32_t* const starts = args.starts + args.first_start(chunk, block);
  // First how many nonzeros an atom has, then where the next of them goes.
  int32_t* const next = starts + 1;
  __builtin_memset(starts, 0, static_cast<size_t>(factor.basis_size + 1) * sizeof(int32_t));
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t e = 0; e < factor.nnz; ++e) {
      ++next[indices[row * factor.row_size() + e]];
    }
  }
  int32_t begin = 0;
  for (int64_t atom = 0; atom < factor.basis_size; ++atom) {
    const int32_t size = next[atom];
    next[atom] = begin;
    begin += size;
  }
  accumulate_t<T>* const sorted_values = args.values + first;
  uint16_t* const sorted_rows = args.rows + first;
  // A few atoms at a time, so that the places that are written to stay in the nearest cache: a row is followed up to
  // the first atom behind them.
  constexpr int64_t atoms_at_a_time = 128;
  uint16_t done[most_sources] = {};
  for (int64_t limit = atoms_at_a_time; limit < factor.basis_size + atoms_at_a_time; limit += atoms_at_a_time) {
    for (int64_t row = 0; row < count; ++row) {
      const Index* const atoms = indices + row * factor.row_size();
      const int64_t begin = done[row];
      int64_t end = begin;
      while (end < factor.nnz && atoms[end] < limit) {
        ++end;
      }
      done[row] = static_cast<uint16_t>(end);
      for_each_vector<T>(end - begin, [&](int64_t at, int used) {
        accumulate_t<T> numbers[lanes<T>];
        store(numbers, load_piece(values + row * factor.row_size() + begin + at, used));
        for (int i = 0; i < used; ++i) {
          const int32_t to = next[atoms[begin + at + i]]++;
          sorted_values[to] = numbers[i];
          sorted_rows[to] = static_cast<uint16_t>(row);
        }
      });
    }
  }
}

// A packed factor has the order of atoms within its groups.
template <typename T>
void merge_groups(const SortedFactor<T>& args, const PackedFactor<T>& factor, int64_t chunk, int64_t block) {
  const int64_t first_group = chunk * args.chunk_rows / rows_per_group;
  const int64_t num_groups = parts_of(args.rows_in_chunk(chunk), rows_per_group);
  const T* const end = factor.values + factor.num_groups() * rows_per_group * factor.row_size();
  const T* values[most_sources / rows_per_group];
  for (int64_t group = 0; group < num_groups; ++group) {
    values[group] = factor.values + ((first_group + group) * factor.num_blocks + block) * rows_per_group * factor.nnz;
  }
  const int64_t first = args.first_nonzero(chunk, block);
  const int64_t behind = first + args.rows_in_chunk(chunk) * factor.nnz;
  int64_t at = first;
  int32_t* const starts = args.starts + args.first_start(chunk, block);
  starts[0] = 0;
  for (int64_t atom = 0; atom < factor.basis_size; ++atom) {
    for (int64_t group = 0; group < num_groups; ++group) {
      const uint16_t mask = factor.mask[((first_group + group) * factor.num_blocks + block) * factor.basis_size + atom];
      const int count = append_column(values[group], end, mask, group * rows_per_group, args.values + at,
                                      args.rows + at, behind - at);
      values[group] += count;
      at += count;
    }
    starts[atom + 1] = static_cast<int32_t>(at - first);
  }
}

// The sums of a block of atoms, from all rows.
template <int vectors, typename T>
void gather_rows(const SortedRowsToAtoms<T>& args, int64_t block, int64_t first_atom, int64_t count, int64_t tile,
                 accumulate_t<T>* sums) {
  using A = accumulate_t<T>;
  const SortedFactor<T>& sorted = args.sorted;
  constexpr int64_t width = vectors * lanes<A>;
  __builtin_memset(sums, 0, static_cast<size_t>(atom_block * width) * sizeof(A));
  for (int64_t chunk = 0; chunk < sorted.num_chunks(); ++chunk) {
    const A* const rows = args.rows + (tile * sorted.factor.num_rows + chunk * sorted.chunk_rows) * width;
    const int32_t* const starts = sorted.starts + sorted.first_start(chunk, block) + first_atom;
    const int64_t first = sorted.first_nonzero(chunk, block);
    for (int64_t atom = 0; atom < count; ++atom) {
      add_list<vectors>(sorted.values + first + starts[atom], sorted.rows + first + starts[atom],
                        starts[atom + 1] - starts[atom], rows, sums + atom * width);
    }
  }
}

// Adds a block of rows to the atoms' sums of a tile, row by row: two rows may share an atom.
template <int vectors, typename T>
void scatter_rows(const RowBlock<T>& rows, const SparseFactor<T>& factor, int64_t count, int64_t block,
                  const accumulate_t<T>* tile, accumulate_t<T>* sums) {
  using A = accumulate_t<T>;
  for (int64_t row = 0; row < count; ++row) {
    const A* const values = rows.values + row * factor.row_size() + block * factor.nnz;
    const uint16_t* const atoms = rows.sources + row * factor.row_size() + block * factor.nnz;
    vec<A> tokens[vectors];
    for (int v = 0; v < vectors; ++v) {
      tokens[v] = load(tile + (row * vectors + v) * lanes<A>);
    }
    for (int64_t e = 0; e < factor.nnz; ++e) {
      A* const atom = sums + atoms[e] * (vectors * lanes<A>);
      for (int v = 0; v < vectors; ++v) {
        store(atom + v * lanes<A>, load(atom + v * lanes<A>) + values[e] * tokens[v]);
      }
    }
  }
}

// Sums [K][token_tile] of `count` atoms from `first` on, in the order of tokens: sum_of(atom, offset in the tile).
template <typename T, typename SumOf>
inline void store_atoms(T* output, int64_t num_tokens, int64_t basis_size, int64_t first_token, int64_t token_tile,
                        int64_t first, int64_t count, const SumOf& sum_of) {
  using A = accumulate_t<T>;
  for (int64_t offset = 0; offset < token_tile; offset += lanes<A>) {
    for_each_vector<A>(count, [&](int64_t atom, int used) {
      turn<A>([&](int i) { return i < used ? sum_of(atom + i, offset) : vec<A>{}; },
              [&](int i, vec<A> numbers) {
                const int64_t token = first_token + offset + i;
                if (token < num_tokens) {
                  store_piece(output + token * basis_size + first + atom, numbers, used);
                }
              });
    });
  }
}

}  // namespace

template <typename T>
bool sorting_pays(int64_t num_tokens) {
  return num_tokens > most_vectors * lanes<T>;
}

template <typename T>
int64_t sort_rows(const SortedFactor<T>& args, int64_t begin, int64_t end) {
  const SparseFactor<T>& factor = args.factor;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * args.chunk_rows * factor.row_size();
    const int64_t size = args.rows_in_chunk(chunk) * factor.row_size();
    int64_t highest = 0;
    const auto highest_of = [&](const auto* indices) {
      int32_t highest = 0;
      for (int64_t at = first; at < first + size; ++at) {
        highest = indices[at] > highest ? indices[at] : highest;
      }
      return highest;
    };
    highest = factor.byte_indices ? highest_of(static_cast<const uint8_t*>(factor.indices))
                                  : highest_of(static_cast<const uint16_t*>(factor.indices));
    if (highest >= factor.basis_size && size > 0) {
      return first_wrong_index(factor, first, size);
    }
    for (int64_t block = 0; block < factor.num_blocks; ++block) {
      factor.byte_indices ? sort_chunk<uint8_t>(args, chunk, block) : sort_chunk<uint16_t>(args, chunk, block);
    }
  }
  return -1;
}

template <typename T>
int64_t sort_packed_rows(const SortedFactor<T>& args, const PackedFactor<T>& factor, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * args.chunk_rows;
    for (int64_t row = first; row < first + args.rows_in_chunk(chunk); row += rows_per_group) {
      if (!counts_are_right(factor, row / rows_per_group)) {
        return row;
      }
    }
    for (int64_t block = 0; block < factor.num_blocks; ++block) {
      merge_groups(args, factor, chunk, block);
    }
  }
  return -1;
}

template <typename T>
int64_t sorted_scratch_bytes(int64_t token_tile) {
  return atom_block * token_tile * static_cast<int64_t>(sizeof(accumulate_t<T>));
}

template <typename T>
void sorted_rows_to_atoms(const SortedRowsToAtoms<T>& args, void* scratch, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  A* const sums = static_cast<A*>(scratch);
  const int64_t size = args.sorted.factor.basis_size;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t tile = unit % args.num_tiles();
    const int64_t block = unit / args.num_tiles() / args.num_atom_blocks();
    const int64_t first = unit / args.num_tiles() % args.num_atom_blocks() * atom_block;
    const int64_t count = size - first < atom_block ? size - first : atom_block;
    for_vectors<T>(args.token_tile,
                   [&](auto vectors) { gather_rows<decltype(vectors)::value>(args, block, first, count, tile, sums); });
    store_atoms(args.output + block * args.num_tokens * size, args.num_tokens, size, tile * args.token_tile,
                args.token_tile, first, count,
                [&](int64_t atom, int64_t offset) { return load(sums + atom * args.token_tile + offset); });
  }
}

template <typename T>
int64_t rows_to_atoms(const RowsToAtoms<T>& args, void* scratch, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const SparseFactor<T>& factor = args.factor;
  Arena arena(scratch);
  const RowBlock<T> rows(&arena, factor, args.token_tile);
  const int64_t block_size = args.num_tiles() * factor.basis_size * args.token_tile;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t part = unit / args.num_tiles(), tile = unit % args.num_tiles();
    A* const sums = args.sums + part * factor.num_blocks * block_size + tile * factor.basis_size * args.token_tile;
    for (int64_t block = 0; block < factor.num_blocks; ++block) {
      __builtin_memset(sums + block * block_size, 0,
                       static_cast<size_t>(factor.basis_size * args.token_tile) * sizeof(A));
    }
    const int64_t last = (part + 1) * args.part_size();
    for (int64_t first = part * args.part_size(); first < last && first < factor.num_rows; first += row_block) {
      const int64_t count = rows_in_block(factor, first);
      const int64_t wrong = rows.load(factor, first, count);
      if (wrong >= 0) {
        return wrong;
      }
      const A* const tokens = args.rows + (tile * factor.num_rows + first) * args.token_tile;
      for (int64_t block = 0; block < factor.num_blocks; ++block) {
        for_vectors<T>(args.token_tile, [&](auto vectors) {
          scatter_rows<decltype(vectors)::value>(rows, factor, count, block, tokens, sums + block * block_size);
        });
      }
    }
  }
  return -1;
}

template <typename T>
void add_parts(const RowsToAtoms<T>& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t size = args.factor.basis_size;
  const int64_t part_size = args.factor.num_blocks * args.num_tiles() * size * args.token_tile;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit / args.num_tiles(), tile = unit % args.num_tiles();
    const A* const sums = args.sums + unit * size * args.token_tile;
    store_atoms(args.output + block * args.num_tokens * size, args.num_tokens, size, tile * args.token_tile,
                args.token_tile, 0, size, [&](int64_t atom, int64_t offset) {
                  vec<A> sum = {};
                  for (int64_t part = 0; part < args.num_parts(); ++part) {
                    sum += load(sums + part * part_size + atom * args.token_tile + offset);
                  }
                  return sum;
                });
  }
}

#define TORCHOPS_INSTANTIATE(T)                                                                        \
  template bool sorting_pays<T>(int64_t);                                                              \
  template int64_t sort_rows(const SortedFactor<T>&, int64_t, int64_t);                                \
  template int64_t sort_packed_rows(const SortedFactor<T>&, const PackedFactor<T>&, int64_t, int64_t); \
  template int64_t sorted_scratch_bytes<T>(int64_t);                                                   \
  template void sorted_rows_to_atoms(const SortedRowsToAtoms<T>&, void*, int64_t, int64_t);            \
  template int64_t rows_to_atoms(const RowsToAtoms<T>&, void*, int64_t, int64_t);                      \
  template void add_parts(const RowsToAtoms<T>&, int64_t, int64_t);
TORCHOPS_INSTANTIATE(double)
TORCHOPS_INSTANTIATE(float)
TORCHOPS_INSTANTIATE(bfloat16)
TORCHOPS_INSTANTIATE(float16)
#undef TORCHOPS_INSTANTIATE

}  // namespace torchops::kernels::stf::TORCHOPS_LEVEL
