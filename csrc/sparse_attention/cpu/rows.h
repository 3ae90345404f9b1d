#pragma once

#include "core/cpu/elements.h"

// What one query computes with rows that lie apart: those of the keys that a run of its list names.

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {

// Rows of a tensor by their number.
template <typename T>
struct RowsByNumber {
  const T* data;
  int64_t stride;

  const T* at(int32_t row) const { return data + row * stride; }
};

// A row of products' left side: whole vectors of elements, zeros behind the last number.
template <typename E>
constexpr int64_t vectors_of(int64_t size) {
  return divide_up(size, lane_count<E> * element<E>::depth);
}
template <typename E, typename T>
void load_row(const T* from, int64_t size, typename element<E>::vector* to) {
  constexpr int64_t step = lane_count<E> * element<E>::depth;
  for (int64_t d = 0; d < size; d += step) {
    *to++ = load_elements<E>(from + d, size - d);
  }
}

// Numbers, padded with zeros to whole vectors.
template <typename T>
void load_numbers(const T* from, int64_t size, accumulate_t<T>* to) {
  for_each_vector<T>(size, [&](int64_t d, int lanes_used) { store(to + d, load_piece(from + d, lanes_used)); });
}

// Fetches a row, for it is as far apart from the last one as numbers in a list are.
template <typename T>
inline __attribute__((always_inline)) void prefetch_row(const T* row, int64_t size) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t d = 0; d < size; d += line) {
    __builtin_prefetch(row + d);
  }
}

// products[e] = row . rows[numbers[e]], each added up in the same order wherever it stands; whole vectors are written.
// Meanwhile rows of the same numbers of `later` are fetched, which has data unless nobody reads them.
template <typename E, typename T>
void products_with_rows(const typename element<E>::vector* row, const RowsByNumber<T>& rows, int64_t size,
                        const int32_t* numbers, int64_t count, const RowsByNumber<T>& later, int64_t later_size,
                        sum_t<E>* products) {
  using A = sum_t<E>;
  constexpr int64_t at_once = lanes<A>;
  constexpr int64_t step = lane_count<E> * element<E>::depth;
  const int64_t whole = size / step;
  for (int64_t first = 0; first < count; first += at_once) {
    const T* from[at_once];
    for (int64_t e = 0; e < at_once; ++e) {
      const int32_t number = numbers[first + e < count ? first + e : count - 1];
      from[e] = rows.at(number);
      if (later.data != nullptr) {
        prefetch_row(later.at(number), later_size);
      }
    }
    vec<A> sums[at_once];
#pragma GCC unroll 16
    for (int64_t e = 0; e < at_once; ++e) {
      sums[e] = vec<A>{};
    }
    for (int64_t v = 0; v < whole; ++v) {
      const auto left = row[v];
#pragma GCC unroll 16
      for (int64_t e = 0; e < at_once; ++e) {
        sums[e] = multiply_add_lanes(left, load_elements<E>(from[e] + v * step, step), sums[e]);
      }
    }
    if (whole * step < size) {
      for (int64_t e = 0; e < at_once; ++e) {
        sums[e] =
            multiply_add_lanes(row[whole], load_elements<E>(from[e] + whole * step, size - whole * step), sums[e]);
      }
    }
    store(products + first, sums_of_lanes(sums));
  }
}

// Calls body(first, count<vectors>) for stretches of a row of num_vectors vectors.
inline constexpr int stretch = 8;
template <typename Body>
inline __attribute__((always_inline)) void for_stretches(int64_t num_vectors, const Body& body) {
  int64_t first = 0;
  for (; first + stretch <= num_vectors; first += stretch) {
    body(first, count<stretch>{});
  }
  if (first + 4 <= num_vectors) {
    body(first, count<4>{});
    first += 4;
  }
  switch (num_vectors - first) {
    case 1:
      return body(first, count<1>{});
    case 2:
      return body(first, count<2>{});
    case 3:
      return body(first, count<3>{});
    default:
      return;
  }
}

// to = to * rescale + sum over e of weights[e] rows[numbers[e]]: several sums by turns where vectors are few, for the
// latency of an addition. `to` has whole vectors.
template <typename T>
void add_weighted_rows(const RowsByNumber<T>& rows, int64_t size, const int32_t* numbers,
                       const accumulate_t<T>* weights, int64_t number, accumulate_t<T> rescale, accumulate_t<T>* to) {
  using A = accumulate_t<T>;
  const auto add = [&](int64_t first, auto vectors, const auto& load_vector) {
    constexpr int n = decltype(vectors)::value, turns = n >= stretch ? 1 : 2;
    vec<A> sums[turns][n];
    for (int turn = 0; turn < turns; ++turn) {
      for (int v = 0; v < n; ++v) {
        sums[turn][v] = vec<A>{};
      }
    }
    const auto add_row = [&](int64_t e, int turn) {
      const T* const row = rows.at(numbers[e]) + first;
      for (int v = 0; v < n; ++v) {
        sums[turn][v] += weights[e] * load_vector(row + v * lanes<T>);
      }
    };
    int64_t e = 0;
    for (; e + turns <= number; e += turns) {
      for (int turn = 0; turn < turns; ++turn) {
        add_row(e + turn, turn);
      }
    }
    if (e < number) {
      add_row(e, 0);
    }
    for (int v = 0; v < n; ++v) {
      A* const here = to + first + v * lanes<T>;
      vec<A> sum = sums[0][v];
      for (int turn = 1; turn < turns; ++turn) {
        sum += sums[turn][v];
      }
      store(here, load(here) * rescale + sum);
    }
  };
  for_stretches(size / lanes<T>, [&](int64_t vector, auto vectors) {
    add(vector * lanes<T>, vectors, [](const T* from) { return load(from); });
  });
  if (const int rest = static_cast<int>(size % lanes<T>); rest > 0) {
    add(size - rest, count<1>{}, [rest](const T* from) { return load_partial(from, rest); });
  }
}

// sums[numbers[e]] += weights[e] row, where rows of sums are whole vectors, num_vectors each.
template <typename A>
void add_to_rows(A* sums, int64_t num_vectors, const int32_t* numbers, const A* weights, int64_t number, const A* row) {
  for_stretches(num_vectors, [&](int64_t first, auto vectors) {
    constexpr int n = decltype(vectors)::value;
    vec<A> from[n];
    for (int v = 0; v < n; ++v) {
      from[v] = load(row + (first + v) * lanes<A>);
    }
    for (int64_t e = 0; e < number; ++e) {
      A* const to = sums + (numbers[e] * num_vectors + first) * lanes<A>;
      for (int v = 0; v < n; ++v) {
        store(to + v * lanes<A>, load(to + v * lanes<A>) + weights[e] * from[v]);
      }
    }
  });
}

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
