#include "span_attention/cpu/decode_kernel.h"

#include "core/cpu/exponential.h"
#include "span_attention/cpu/tiles.h"
#include "span_attention/pieces.h"

namespace torchops::kernels::span_attention::TORCHOPS_LEVEL {
namespace {

// Keys whose scores are computed at a time.
constexpr int64_t key_block = 128;
// Pieces have this many keys at least, and there are no more than it takes to give many threads equal shares.
constexpr int64_t least_piece = 512;
constexpr int64_t most_units = 256;
// More rows are worth packing the keys, those of 16 bits sooner, for they are widened on the way; for as many as a tile
// has, a head that is the only one is split all the same.
template <typename T>
constexpr int64_t most_rows = sizeof(T) == 2 ? 8 : 16;
constexpr int64_t most_rows_of_one_head = query_tile;

template <typename A>
constexpr A minus_infinity = -static_cast<A>(__builtin_inf());

constexpr int64_t num_pieces(const Sizes& sizes, const Span& span) {
  return span_attention::num_pieces(sizes, span, least_piece, sizes.batch * sizes.num_kv_heads, most_units);
}

// What pieces give for each row of the output, without having divided by the sum.
template <typename A>
struct Partials {
  A* output;   // [B * Hq * Lq][pieces][columns]
  A* largest;  // [B * Hq * Lq][pieces]
  A* sum;      // [B * Hq * Lq][pieces]: of exp(score - largest)

  Partials(Arena* arena, const Sizes& sizes, int64_t pieces) {
    const int64_t count = sizes.batch * sizes.num_heads * sizes.num_queries * pieces;
    output = arena->take<A>(count * columns_of<A>(sizes.value_dim));
    largest = arena->take<A>(count);
    sum = arena->take<A>(count);
  }
};

// A block of keys, for all rows.
template <typename E>
struct Scratch {
  using A = sum_t<E>;
  using Vector = typename element<E>::vector;

  Vector* queries;  // [rows][vectors of D], padded with zeros
  A* scores;        // [rows][key_block], then exp(score - largest)
  A* output;        // [rows][columns]
  vec<A>* sum;      // [rows]: lane by lane
  A* largest;       // [rows]
  A* rescale;       // [rows]: what was summed up before is to be multiplied by

  Scratch(Arena* arena, const Sizes& sizes) {
    const int64_t rows = rows_of(sizes);
    queries = arena->take<Vector>(rows * vectors(sizes));
    scores = arena->take<A>(rows * key_block);
    output = arena->take<A>(rows * columns_of<A>(sizes.value_dim));
    sum = arena->take<vec<A>>(rows);
    largest = arena->take<A>(rows);
    rescale = arena->take<A>(rows);
  }

  static constexpr int64_t step = lane_count<E> * element<E>::depth;
  static constexpr int64_t vectors(const Sizes& sizes) { return divide_up(sizes.head_dim, step); }

  template <typename T>
  void load_queries(const Attention<T>& args, int64_t batch, int64_t kv_head) const {
    const Sizes& sizes = args.sizes;
    Vector* to = queries;
    for (int64_t row = 0; row < rows_of(sizes); ++row) {
      const int64_t head = kv_head * sizes.group_size() + row / sizes.num_queries;
      const T* const from = args.query.row(batch, head, row % sizes.num_queries);
      for (int64_t d = 0; d < sizes.head_dim; d += step) {
        *to++ = load_elements<E>(from + d, sizes.head_dim - d);
      }
    }
  }

  void clear(const Sizes& sizes) const {
    for (int64_t row = 0; row < rows_of(sizes); ++row) {
      largest[row] = minus_infinity<A>;
      sum[row] = vec<A>{};
    }
    __builtin_memset(output, 0, static_cast<size_t>(rows_of(sizes) * columns_of<A>(sizes.value_dim)) * sizeof(A));
  }
};

// Rows of keys or values that will be read soon, fetched line by line beside other work: a block of the one follows a
// block of the other, too short for the processor to see it coming.
template <typename T>
struct Ahead {
  const T* next;
  int64_t row_stride;
  int64_t row_size;
  int64_t rows_left;

  inline __attribute__((always_inline)) void fetch(int64_t rows) {
    constexpr int64_t line = 64 / sizeof(T);
    for (; rows > 0 && rows_left > 0; --rows, --rows_left, next += row_stride) {
      for (int64_t d = 0; d < row_size; d += line) {
        __builtin_prefetch(next + d);
      }
    }
  }
};

// Calls body(count<n>{}, first) for groups of n rows, of which each reads keys and values once.
template <int most, typename Body>
inline __attribute__((always_inline)) void for_row_groups(int64_t num_rows, const Body& body) {
  int64_t row = 0;
  if constexpr (most >= 4) {
    for (; row + 4 <= num_rows; row += 4) {
      body(count<4>{}, row);
    }
  }
  for (; row + 2 <= num_rows; row += 2) {
    body(count<2>{}, row);
  }
  if (row < num_rows) {
    body(count<1>{}, row);
  }
}

// Products of queries with a block of keys, as scores. Behind the last key the products are its own again. `has_rest`:
// rows are no whole number of vectors.
template <int rows, bool has_rest, typename E, typename T>
void multiply_keys(const Attention<T>& args, const Scratch<E>& scratch, int64_t first_row, const T* keys,
                   int64_t num_keys, Ahead<T>& ahead) {
  using A = sum_t<E>;
  constexpr int64_t keys_at_once = lanes<A> / rows, step = Scratch<E>::step;
  const int64_t vectors = Scratch<E>::vectors(args.sizes), rest = args.sizes.head_dim - (vectors - 1) * step;
  const auto* const queries = scratch.queries + first_row * vectors;
  A* const scores = scratch.scores + first_row * key_block;
  for (int64_t first = 0; first < num_keys; first += keys_at_once) {
    const T* of_key[keys_at_once];
    for (int64_t key = 0; key < keys_at_once; ++key) {
      of_key[key] = keys + (first + key < num_keys ? first + key : num_keys - 1) * args.key.row_stride;
    }
    ahead.fetch(keys_at_once);
    vec<A> products[lanes<A>];
    for (auto& product : products) {
      product = vec<A>{};
    }
    const auto* query = queries;
    int64_t d = 0;
    const auto add = [&](int64_t used) __attribute__((always_inline)) {
      for (int64_t key = 0; key < keys_at_once; ++key) {
        const auto elements = load_elements<E>(of_key[key] + d, used);
        for (int64_t row = 0; row < rows; ++row) {
          vec<A>& sum = products[row * keys_at_once + key];
          sum = multiply_add_lanes(query[row * vectors], elements, sum);
        }
      }
      d += step;
      ++query;
    };
    for (int64_t vector = has_rest ? 1 : 0; vector < vectors; ++vector) {
      add(step);
    }
    if constexpr (has_rest) {
      add(rest);
    }
    const vec<A> sums = sums_of_lanes(products);
    for (int64_t row = 0; row < rows; ++row) {
      __builtin_memcpy(scores + row * key_block + first, reinterpret_cast<const A*>(&sums) + row * keys_at_once,
                       keys_at_once * sizeof(A));
    }
  }
}

// Products become scores, and those weights, exp(score - largest); a row sees the keys of `seen`.
template <typename E>
void compute_weights(const Scratch<E>& scratch, int64_t row, int64_t num_keys, Range seen, sum_t<E> scale,
                     const sum_t<E>* bias) {
  using A = sum_t<E>;
  using Lane = typename lane_index<sizeof(A)>::type;
  A* const scores = scratch.scores + row * key_block;
  vec<A> highest = broadcast(minus_infinity<A>);
  for (int64_t key = 0; key < num_keys; key += lanes<A>) {
    vec<A> score = scale * load(scores + key);
    if (bias != nullptr) {
      score += load_piece(bias + key, static_cast<int>(num_keys - key < lanes<A> ? num_keys - key : lanes<A>));
    }
    const Range here = seen.within(key, lanes<A>);
    if (here.end - here.begin < lanes<A>) {
      const vec<Lane> lane = lane_numbers<Lane>();
      score = (lane >= static_cast<Lane>(here.begin < lanes<A> ? here.begin : lanes<A>)) &
                      (lane < static_cast<Lane>(here.end > 0 ? here.end : 0))
                  ? score
                  : broadcast(minus_infinity<A>);
    }
    highest = score > highest ? score : highest;
    store(scores + key, score);
  }
  const A before = scratch.largest[row], here = largest_lane<A>(highest);
  const A largest = here > before ? here : before;
  // While a row has seen nothing, any number serves to subtract.
  const A shift = largest == minus_infinity<A> ? A(0) : largest;
  const A rescale = largest == before ? A(1) : exp_of(before - shift);
  vec<A> sum = scratch.sum[row] * rescale;
  for (int64_t key = 0; key < num_keys; key += lanes<A>) {
    const vec<A> weight = exp(load(scores + key) - shift);
    sum += weight;
    store(scores + key, weight);
  }
  scratch.sum[row] = sum;
  scratch.largest[row] = largest;
  scratch.rescale[row] = rescale;
}

// Adds the weighted sums of a block of values, in columns from `first` on.
template <int rows, int vectors, typename E, typename T, typename Load>
inline __attribute__((always_inline)) void add_columns(const Attention<T>& args, const Scratch<E>& scratch,
                                                       int64_t first_row, int64_t first, const T* values,
                                                       int64_t num_keys, Ahead<T>& ahead, const Load& load_value) {
  using A = sum_t<E>;
  const A* const weights = scratch.scores + first_row * key_block;
  vec<A> sums[rows][vectors];
  for (auto& of_row : sums) {
    for (auto& sum : of_row) {
      sum = vec<A>{};
    }
  }
  const T* from = values + first;
  for (int64_t key = 0; key < num_keys; ++key, from += args.value.row_stride) {
    ahead.fetch(1);
    vec<A> value[vectors];
    for (int v = 0; v < vectors; ++v) {
      value[v] = load_value(from + v * lanes<A>);
    }
    for (int row = 0; row < rows; ++row) {
      for (int v = 0; v < vectors; ++v) {
        sums[row][v] += weights[row * key_block + key] * value[v];
      }
    }
  }
  for (int row = 0; row < rows; ++row) {
    A* to = scratch.output + (first_row + row) * columns_of<A>(args.sizes.value_dim) + first;
    for (int v = 0; v < vectors; ++v, to += lanes<A>) {
      store(to, load(to) * scratch.rescale[first_row + row] + sums[row][v]);
    }
  }
}

template <int rows, typename E, typename T>
void add_values(const Attention<T>& args, const Scratch<E>& scratch, int64_t first_row, const T* values,
                int64_t num_keys, Ahead<T>& ahead) {
  using A = sum_t<E>;
  // As many sums as it takes to keep the multipliers busy.
  constexpr int vectors = rows == 4 ? tile_vectors : 8 / rows;
  const int64_t size = args.sizes.value_dim, whole = size / lanes<A>;
  const auto whole_value = [](const T* from) { return load(from); };
  int64_t v = 0;
  for (; v + vectors <= whole; v += vectors) {
    add_columns<rows, vectors>(args, scratch, first_row, v * lanes<A>, values, num_keys, ahead, whole_value);
  }
  for (; v + 2 <= whole; v += 2) {
    add_columns<rows, 2>(args, scratch, first_row, v * lanes<A>, values, num_keys, ahead, whole_value);
  }
  for (; v < whole; ++v) {
    add_columns<rows, 1>(args, scratch, first_row, v * lanes<A>, values, num_keys, ahead, whole_value);
  }
  if (const int rest = static_cast<int>(size % lanes<A>); rest > 0) {
    add_columns<rows, 1>(args, scratch, first_row, size - rest, values, num_keys, ahead,
                         [rest](const T* from) { return load_partial(from, rest); });
  }
}

template <typename E, typename T>
void compute_piece(const Attention<T>& args, const Scratch<E>& scratch, int64_t batch, int64_t kv_head, Range keys,
                   const TileSpans& spans) {
  using A = sum_t<E>;
  const Sizes& sizes = args.sizes;
  const int64_t num_rows = rows_of(sizes);
  constexpr int most = lanes<A> < 4 ? 2 : 4;
  scratch.load_queries(args, batch, kv_head);
  scratch.clear(sizes);
  for (int64_t first = keys.begin; first < keys.end; first += key_block) {
    const int64_t num_keys = keys.end - first < key_block ? keys.end - first : key_block;
    const int64_t keys_left = keys.end - first - num_keys;
    const T* const values = args.value.row(batch, kv_head, first);
    Ahead<T> next_values{values, args.value.row_stride, sizes.value_dim, num_keys};
    for_row_groups<most>(num_rows, [&](auto rows, int64_t row) {
      const T* const of_block = args.key.row(batch, kv_head, first);
      if (sizes.head_dim % Scratch<E>::step == 0) {
        multiply_keys<decltype(rows)::value, false>(args, scratch, row, of_block, num_keys, next_values);
      } else {
        multiply_keys<decltype(rows)::value, true>(args, scratch, row, of_block, num_keys, next_values);
      }
    });
    const A* const bias = args.key_bias == nullptr ? nullptr : args.key_bias + batch * sizes.num_keys + first;
    for (int64_t row = 0; row < num_rows; ++row) {
      compute_weights(scratch, row, num_keys, spans.keys[row].within(first, num_keys), args.scale, bias);
    }
    Ahead<T> next_keys{args.key.row(batch, kv_head, first + num_keys), args.key.row_stride, sizes.head_dim,
                       keys_left < key_block ? keys_left : key_block};
    for_row_groups<most>(num_rows, [&](auto rows, int64_t row) {
      add_values<decltype(rows)::value>(args, scratch, row, values, num_keys, next_keys);
    });
  }
}

}  // namespace

template <typename T>
int64_t decode_pieces(const Attention<T>& args) {
  const bool one_head = args.sizes.batch * args.sizes.num_kv_heads == 1;
  const bool few = rows_of(args.sizes) <= (one_head ? most_rows_of_one_head : most_rows<T>);
  return few ? num_pieces(args.sizes, args.span) : 0;
}

template <typename T>
int64_t decode_partial_bytes(const Attention<T>& args) {
  Arena arena(nullptr);
  Partials<accumulate_t<T>>(&arena, args.sizes, num_pieces(args.sizes, args.span));
  return arena.bytes();
}

template <typename T>
int64_t decode_scratch_bytes(const Attention<T>& args) {
  Arena arena(nullptr);
  Scratch<multiplicand_t<T>>(&arena, args.sizes);
  return arena.bytes();
}

template <typename T>
void decode(const Attention<T>& args, void* partials, void* scratch, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const Sizes& sizes = args.sizes;
  const int64_t pieces = num_pieces(sizes, args.span), columns = columns_of<A>(sizes.value_dim);
  Arena of_partials(partials), of_scratch(scratch);
  const Partials<A> results(&of_partials, sizes, pieces);
  const Scratch<multiplicand_t<T>> buffers(&of_scratch, sizes);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t piece = unit % pieces, head = unit / pieces;
    const int64_t batch = head / sizes.num_kv_heads, kv_head = head % sizes.num_kv_heads;
    const Sequence sequence = args.sequence(batch);
    const Range keys =
        keys_of_piece(visible_keys(args.span, sequence, Range{0, sizes.num_queries}), piece, pieces, key_block);
    if (keys.empty()) {
      continue;
    }
    compute_piece(args, buffers, batch, kv_head, keys,
                  TileSpans(args.span, sequence, 0, sizes.num_queries, sizes.group_size()));
    for (int64_t row = 0; row < rows_of(sizes); ++row) {
      const int64_t index = (head * rows_of(sizes) + row) * pieces + piece;
      results.largest[index] = buffers.largest[row];
      results.sum[index] = sum_lanes<A>(buffers.sum[row]);
      copy_row(results.output + index * columns, buffers.output + row * columns, columns);
    }
  }
}

template <typename T>
void decode_merge(const AttentionForward<T>& args, void* partials, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const int64_t pieces = num_pieces(sizes, inputs.span), columns = columns_of<A>(sizes.value_dim);
  Arena arena(partials);
  const Partials<A> results(&arena, sizes, pieces);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t query = row % sizes.num_queries, head = row / sizes.num_queries % sizes.num_heads;
    const int64_t batch = row / sizes.num_queries / sizes.num_heads;
    const Range keys = visible_keys(inputs.span, inputs.sequence(batch), Range{0, sizes.num_queries});
    const A* const largest_of = results.largest + row * pieces;
    const A* const sum_of = results.sum + row * pieces;
    A* const output = results.output + row * pieces * columns;
    const A sink = inputs.sink == nullptr ? minus_infinity<A> : inputs.sink[head];
    int64_t used = 0;
    A largest = minus_infinity<A>;
    for (; used < pieces && !keys_of_piece(keys, used, pieces, key_block).empty(); ++used) {
      largest = largest_of[used] > largest ? largest_of[used] : largest;
    }
    largest = sink > largest ? sink : largest;
    const A shift = largest == minus_infinity<A> ? A(0) : largest;
    A sum = 0;
    for (int64_t piece = 0; piece < used; ++piece) {
      const A weight = exp_of(largest_of[piece] - shift);
      const A* const from = output + piece * columns;
      sum += sum_of[piece] * weight;
      for (int64_t d = 0; d < columns; d += lanes<A>) {
        store(output + d, piece == 0 ? load(from + d) * weight : load(output + d) + load(from + d) * weight);
      }
    }
    sum += inputs.sink == nullptr ? A(0) : exp_of(sink - shift);
    if (args.logsumexp != nullptr) {
      args.logsumexp[row] = largest + log(sum);
    }
    const A factor = used == 0 || sum == 0 ? A(0) : 1 / sum;
    T* const to = args.output.row(batch, head, query);
    for_each_vector<T>(sizes.value_dim, [&](int64_t d, int lanes_used) {
      store_piece(to + d, used == 0 ? vec<A>{} : load(output + d) * factor, lanes_used);
    });
  }
}

#define TORCHOPS_INSTANTIATE(T)                                              \
  template int64_t decode_pieces(const Attention<T>&);                       \
  template int64_t decode_partial_bytes(const Attention<T>&);                \
  template int64_t decode_scratch_bytes(const Attention<T>&);                \
  template void decode(const Attention<T>&, void*, void*, int64_t, int64_t); \
  template void decode_merge(const AttentionForward<T>&, void*, int64_t, int64_t);
TORCHOPS_INSTANTIATE(double)
TORCHOPS_INSTANTIATE(float)
TORCHOPS_INSTANTIATE(bfloat16)
TORCHOPS_INSTANTIATE(float16)
#undef TORCHOPS_INSTANTIATE

}  // namespace torchops::kernels::span_attention::TORCHOPS_LEVEL
