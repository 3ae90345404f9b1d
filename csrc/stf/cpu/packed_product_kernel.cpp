#include "stf/cpu/packed_product_kernel.h"

#include "core/cpu/arena.h"
#include "stf/cpu/packed_groups.h"

namespace torchops::kernels::stf::TORCHOPS_LEVEL {
namespace {

// Sums for `tokens` tokens; even and odd columns apart, for an addition waits for the one before.
template <int tokens, typename T>
void add_columns(const PackedAtomsToRows<T>& args, const accumulate_t<T>* values, int64_t group, int64_t token) {
  using A = accumulate_t<T>;
  const PackedFactor<T>& factor = args.factor;
  constexpr int chains = tokens < 4 ? 4 : 2;
  RowGroup<A> sum[chains][tokens] = {};
  for (int64_t block = 0; block < factor.num_blocks; ++block) {
    const uint16_t* const mask = factor.mask + (group * factor.num_blocks + block) * factor.basis_size;
    const A* const atoms = args.atoms + (block * args.num_tokens + token) * factor.basis_size;
    const auto add = [&](int64_t column, int chain) {
      const RowGroup<A> rows = spread(values, mask[column]);
      values += __builtin_popcount(mask[column]);
      for (int t = 0; t < tokens; ++t) {
        for (int v = 0; v < RowGroup<A>::vectors; ++v) {
          sum[chain][t].part[v] += atoms[t * factor.basis_size + column] * rows.part[v];
        }
      }
    };
    int64_t column = 0;
    for (; column + chains <= factor.basis_size; column += chains) {
      for (int chain = 0; chain < chains; ++chain) {
        add(column + chain, chain);
      }
    }
    for (; column < factor.basis_size; ++column) {
      add(column, 0);
    }
  }
  const int64_t first = group * rows_per_group;
  const auto num_rows = static_cast<int>(factor.rows_in_group(group));
  for (int t = 0; t < tokens; ++t) {
    for (int v = 0; v < RowGroup<A>::vectors && v * lanes<A> < num_rows; ++v) {
      const int used = num_rows - v * lanes<A> < lanes<A> ? num_rows - v * lanes<A> : lanes<A>;
      vec<A> total = sum[0][t].part[v];
      for (int chain = 1; chain < chains; ++chain) {
        total += sum[chain][t].part[v];
      }
      if (args.bias != nullptr) {
        total += load_piece(args.bias + first + v * lanes<A>, used);
      }
      store_piece(args.output + (token + t) * factor.num_rows + first + v * lanes<A>, total, used);
    }
  }
}

// Adds groups of rows, with the values of each, to the sums of columns, [K][tokens] of 16 partial sums: several at
// a time, for what takes the time is to load and store the sums.
template <int tokens, int groups, typename T>
void add_groups(const PackedRowsToAtoms<T>& args, const accumulate_t<T>* const (&first_values)[groups], int64_t group,
                int64_t block, int64_t token, RowGroup<accumulate_t<T>>* sums) {
  using A = accumulate_t<T>;
  const PackedFactor<T>& factor = args.factor;
  const uint16_t* mask[groups];
  const A* values[groups];
  RowGroup<A> numbers[groups][tokens];
  for (int g = 0; g < groups; ++g) {
    mask[g] = factor.mask + ((group + g) * factor.num_blocks + block) * factor.basis_size;
    values[g] = first_values[g] + block * rows_per_group * factor.nnz;
    for (int t = 0; t < tokens; ++t) {
      const A* const row = args.rows + ((token + t) * factor.num_groups() + group + g) * rows_per_group;
      __builtin_memcpy(&numbers[g][t], row, sizeof(numbers[g][t]));
    }
  }
  for (int64_t column = 0; column < factor.basis_size; ++column) {
    RowGroup<A> rows[groups];
    for (int g = 0; g < groups; ++g) {
      rows[g] = spread(values[g], mask[g][column]);
      values[g] += __builtin_popcount(mask[g][column]);
    }
    for (int t = 0; t < tokens; ++t) {
      for (int v = 0; v < RowGroup<A>::vectors; ++v) {
        vec<A> sum = sums[column * tokens + t].part[v];
        for (int g = 0; g < groups; ++g) {
          sum += rows[g].part[v] * numbers[g][t].part[v];
        }
        sums[column * tokens + t].part[v] = sum;
      }
    }
  }
}

template <typename A>
inline constexpr int tokens_of_sums = RowGroup<A>::vectors == 1 ? 8 : 4;

template <int tokens, typename T>
void add_part(const PackedRowsToAtoms<T>& args, int64_t part, int64_t token, RowGroup<accumulate_t<T>>* sums,
              accumulate_t<T>* scratch) {
  using A = accumulate_t<T>;
  const PackedFactor<T>& factor = args.factor;
  const int64_t first = part * args.groups_of_part;
  const int64_t last =
      first + args.groups_of_part < factor.num_groups() ? first + args.groups_of_part : factor.num_groups();
  for (int64_t block = 0; block < factor.num_blocks; ++block) {
    for (int64_t at = 0; at < factor.basis_size * tokens; ++at) {
      sums[at] = {};
    }
    int64_t group = first;
    for (; group + 2 <= last; group += 2) {
      const A* const values[] = {group_values(factor, group, scratch),
                                 group_values(factor, group + 1, scratch + group_scratch(factor))};
      add_groups<tokens, 2>(args, values, group, block, token, sums);
    }
    if (group < last) {
      const A* const values[] = {group_values(factor, group, scratch)};
      add_groups<tokens, 1>(args, values, group, block, token, sums);
    }
    for (int t = 0; t < tokens; ++t) {
      A* const to = args.sums + ((part * factor.num_blocks + block) * args.num_tokens + token + t) * factor.basis_size;
      for (int64_t column = 0; column < factor.basis_size; ++column) {
        const RowGroup<A>& rows = sums[column * tokens + t];
        vec<A> total = rows.part[0];
        for (int v = 1; v < RowGroup<A>::vectors; ++v) {
          total += rows.part[v];
        }
        to[column] = sum_lanes<A>(total);
      }
    }
  }
}

template <typename T>
struct Scratch {
  using A = accumulate_t<T>;

  A* values;          // of two groups
  RowGroup<A>* sums;  // [K][tokens_of_sums<A>]

  Scratch(Arena* arena, const PackedFactor<T>& factor) {
    values = arena->take<A>(2 * group_scratch(factor));
    sums = arena->take<RowGroup<A>>(factor.basis_size * tokens_of_sums<A>);
  }
};

}  // namespace

template <typename T>
int64_t packed_scratch_bytes(const PackedFactor<T>& factor) {
  Arena arena(nullptr);
  Scratch<T>(&arena, factor);
  return arena.bytes();
}

template <typename T>
bool packed_atoms_to_rows(const PackedAtomsToRows<T>& args, void* scratch, int64_t begin, int64_t end) {
  constexpr int most = RowGroup<accumulate_t<T>>::vectors == 1 ? 8 : 4;
  Arena arena(scratch);
  const Scratch<T> buffers(&arena, args.factor);
  for (int64_t group = begin; group < end; ++group) {
    if (!counts_are_right(args.factor, group)) {
      return false;
    }
    const auto* const values = group_values(args.factor, group, buffers.values);
    int64_t token = 0;
    for (; token + most <= args.num_tokens; token += most) {
      add_columns<most>(args, values, group, token);
    }
    for (; token + 2 <= args.num_tokens; token += 2) {
      add_columns<2>(args, values, group, token);
    }
    if (token < args.num_tokens) {
      add_columns<1>(args, values, group, token);
    }
  }
  return true;
}

template <typename T>
bool packed_rows_to_atoms(const PackedRowsToAtoms<T>& args, void* scratch, int64_t begin, int64_t end) {
  Arena arena(scratch);
  const Scratch<T> buffers(&arena, args.factor);
  for (int64_t part = begin; part < end; ++part) {
    for (int64_t group = part * args.groups_of_part;
         group < (part + 1) * args.groups_of_part && group < args.factor.num_groups(); ++group) {
      if (!counts_are_right(args.factor, group)) {
        return false;
      }
    }
    constexpr int most = tokens_of_sums<accumulate_t<T>>;
    int64_t token = 0;
    for (; token + most <= args.num_tokens; token += most) {
      add_part<most>(args, part, token, buffers.sums, buffers.values);
    }
    for (; token + 4 <= args.num_tokens; token += 4) {
      add_part<4>(args, part, token, buffers.sums, buffers.values);
    }
    for (; token < args.num_tokens; ++token) {
      add_part<1>(args, part, token, buffers.sums, buffers.values);
    }
  }
  return true;
}

template <typename T>
bool packed_code(const PackedCode<T>& args, void* scratch, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const PackedFactor<T>& factor = args.factor;
  Arena arena(scratch);
  const Scratch<T> buffers(&arena, factor);
  for (int64_t group = begin; group < end; ++group) {
    if (!counts_are_right(factor, group)) {
      return false;
    }
    const A* values = group_values(factor, group, buffers.values);
    const uint16_t* mask = factor.mask + group * factor.num_blocks * factor.basis_size;
    for (int64_t block = 0; block < factor.num_blocks; ++block) {
      for_each_vector<T>(factor.basis_size, [&](int64_t first, int count) {
        RowGroup<A> columns[lanes<A>] = {};
        for (int column = 0; column < count; ++column) {
          columns[column] = spread(values, *mask);
          values += __builtin_popcount(*mask++);
        }
        for (int v = 0; v < RowGroup<A>::vectors; ++v) {
          turn<A>([&](int column) { return columns[column].part[v]; },
                  [&](int lane, vec<A> numbers) {
                    const int64_t row = group * rows_per_group + v * lanes<A> + lane;
                    if (row < factor.num_rows) {
                      T* const to = args.code + (row * factor.num_blocks + block) * factor.basis_size + first;
                      store_piece(to, numbers, count);
                    }
                  });
        }
      });
    }
  }
  return true;
}

#define TORCHOPS_INSTANTIATE(T)                                                             \
  template bool packed_code(const PackedCode<T>&, void*, int64_t, int64_t);                 \
  template int64_t packed_scratch_bytes(const PackedFactor<T>&);                            \
  template bool packed_atoms_to_rows(const PackedAtomsToRows<T>&, void*, int64_t, int64_t); \
  template bool packed_rows_to_atoms(const PackedRowsToAtoms<T>&, void*, int64_t, int64_t);
TORCHOPS_INSTANTIATE(double)
TORCHOPS_INSTANTIATE(float)
TORCHOPS_INSTANTIATE(bfloat16)
TORCHOPS_INSTANTIATE(float16)
#undef TORCHOPS_INSTANTIATE

}  // namespace torchops::kernels::stf::TORCHOPS_LEVEL
