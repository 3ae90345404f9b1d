#pragma once

#include <cstring>
#include <limits>

#include "core/cuda/block.cuh"
#include "sparse_attention/cuda/launches.h"

namespace torchops::kernels::sparse_attention {

// A thread has a key at a time.
inline constexpr int score_threads = 128;
// Channels of keys in shared memory, and how far apart they lie there: those that threads read at a time are in
// different banks.
inline constexpr int score_channels = 16;
inline constexpr int score_stride = score_channels + 1;

// What becomes of the products of a row.
template <typename A>
struct ScoreRow {
  A weight;
  bool begins;     // the heads of its query
  bool completes;  // them
  int32_t end;     // behind the last key that its query sees
  int32_t list;    // of the unit, which it completes; or -1
};

// The shared memory of a block.
template <typename A>
struct ScoreMemory {
  int32_t* sums;         // [max_warps]
  int32_t* histogram;    // [256 + 2]
  A* rows;               // [D][score_rows]
  A* tile;               // [score_threads][score_stride]
  ScoreRow<A>* of_rows;  // [score_rows]

  static constexpr size_t bytes(int64_t head_dim) {
    return device::shared_size<int32_t>(device::max_warps) + device::shared_size<int32_t>(256 + 2) +
           device::shared_size<A>(static_cast<size_t>(head_dim) * score_rows) +
           device::shared_size<A>(score_threads * score_stride) + device::shared_size<ScoreRow<A>>(score_rows);
  }

  __device__ explicit ScoreMemory(int64_t head_dim) {
    device::SharedMemory memory;
    sums = memory.take<int32_t>(device::max_warps);
    histogram = memory.take<int32_t>(256 + 2);
    rows = memory.take<A>(static_cast<size_t>(head_dim) * score_rows);
    tile = memory.take<A>(score_threads * score_stride);
    of_rows = memory.take<ScoreRow<A>>(score_rows);
  }
};

// Numbers in their order as integers above 0, which is a NaN; -0 is 0.
template <typename A>
__device__ ordered_score_t<A> ordered_score(A score) {
  using Bits = ordered_score_t<A>;
  const A value = score + A(0);
  Bits bits;
  memcpy(&bits, &value, sizeof(bits));
  constexpr Bits sign = Bits{1} << (8 * sizeof(Bits) - 1);
  return value != value ? Bits{0} : (bits & sign) != 0 ? ~bits : bits | sign;
}

// Lists one behind the other, of one head of the lists, whose queries are multiplied with the same keys.
template <typename T>
struct ScoreUnit {
  using A = accumulate_t<T>;

  const ScoreChoice<T>& args;
  Sequence sequence;
  int64_t batch, list_head, first_list, num_lists;
  Range queries;

  __device__ ScoreUnit(const ScoreChoice<T>& args, int64_t unit) : args(args) {
    const int64_t units = score_units_of_head(args);
    batch = unit / units / args.list_heads();
    list_head = unit / units % args.list_heads();
    first_list = unit % units * score_lists(args);
    num_lists = device::min(score_lists(args), args.num_lists() - first_list);
    sequence = args.sequence(batch);
    queries = args.queries_of_lists(first_list, num_lists);
  }

  // Behind the last key that a query may see, resp. one of the unit.
  __device__ int32_t end(int64_t query) const { return static_cast<int32_t>(end_of_keys(args.rule, sequence, query)); }
  __device__ int32_t end() const { return end(queries.end - 1); }

  // Rows are the heads that go by a list, for each query.
  __device__ int64_t num_rows() const { return (queries.end - queries.begin) * args.heads_of_list(); }
  __device__ int64_t query_of(int64_t row) const { return queries.begin + row / args.heads_of_list(); }
  __device__ int64_t head_of(int64_t row) const { return list_head + row % args.heads_of_list(); }
  __device__ int64_t kv_head_of(int64_t row) const { return head_of(row) / args.sizes.group_size(); }
  // Rows from this one on that have the same keys, score_rows at most.
  __device__ int rows_from(int64_t row) const {
    const int64_t group = args.sizes.group_size();
    const int64_t rest = device::min(num_rows() - row, args.weights == nullptr ? score_rows : group - row % group);
    return static_cast<int>(device::min(rest, int64_t{score_rows}));
  }
};

// Rows from this one on, and zeros behind them.
template <typename T>
__device__ void load_rows(const ScoreUnit<T>& unit, int64_t first, int count,
                          const ScoreMemory<accumulate_t<T>>& memory) {
  using A = accumulate_t<T>;
  const ScoreChoice<T>& args = unit.args;
  const auto head_dim = static_cast<int>(args.sizes.head_dim), thread = static_cast<int>(threadIdx.x);
  for (int i = 0; i < score_rows; ++i) {
    const T* const from =
        i < count ? args.query.row(unit.batch, unit.head_of(first + i), unit.query_of(first + i)) : nullptr;
    for (int c = thread; c < head_dim; c += score_threads) {
      memory.rows[c * score_rows + i] = i < count ? device::widen(from[c]) : A(0);
    }
  }
  if (thread < count) {
    const int64_t row = first + thread, heads = args.heads_of_list(), query = unit.query_of(row);
    const int64_t list = query / args.rule.query_block;
    const bool completes = row % heads + 1 == heads;
    const bool is_last = completes && query + 1 == args.queries_of_lists(list, 1).end;
    memory.of_rows[thread] = {args.weights == nullptr ? A(0) : args.weight(unit.batch, row % heads, query),
                              row % heads == 0, completes, unit.end(query),
                              is_last ? static_cast<int32_t>(list - unit.first_list) : -1};
  }
}

// Products of rows with the thread's key, first + threadIdx.x, by way of tiles of all threads' keys.
template <typename T>
__device__ void multiply_rows(const ScoreUnit<T>& unit, int64_t kv_head, int32_t first, int32_t end,
                              const accumulate_t<T>* rows, accumulate_t<T>* tile,
                              accumulate_t<T> (&products)[score_rows]) {
  const auto head_dim = static_cast<int>(unit.args.sizes.head_dim), thread = static_cast<int>(threadIdx.x);
  for (auto& product : products) {
    product = 0;
  }
  for (int slice = 0; slice < head_dim; slice += score_channels) {
    const int channels = device::min(score_channels, head_dim - slice);
    device::syncthreads();  // the tile before has been read, and rows are there
    for (int i = thread; i < score_threads * score_channels; i += score_threads) {
      const int key = i / score_channels, c = i % score_channels;
      if (first + key < end && c < channels) {
        tile[key * score_stride + c] = device::widen(unit.args.key.row(unit.batch, kv_head, first + key)[slice + c]);
      }
    }
    device::syncthreads();
    if (first + thread < end) {
      for (int c = 0; c < channels; ++c) {
        const accumulate_t<T> key = tile[thread * score_stride + c];
#pragma unroll
        for (int i = 0; i < score_rows; ++i) {
          products[i] += rows[(slice + c) * score_rows + i] * key;
        }
      }
    }
  }
}

// The largest score of each list of a unit for the keys that its queries see, in the order of numbers; 0 where there is
// none. scores are [num_lists][stride].
template <typename T>
__device__ void score_keys(const ScoreUnit<T>& unit, const ScoreMemory<accumulate_t<T>>& memory,
                           ordered_score_t<accumulate_t<T>>* scores, int64_t stride) {
  using A = accumulate_t<T>;
  using Bits = ordered_score_t<A>;
  const ScoreChoice<T>& args = unit.args;
  const A* const biases = args.key_biases_of(unit.batch);
  const int32_t end = unit.end();
  const int64_t num_rows = unit.num_rows();
  const bool stay = unit.rows_from(0) == num_rows;
  for (int32_t first = 0; first < end; first += score_threads) {
    const int32_t key = first + static_cast<int32_t>(threadIdx.x);
    const bool hidden = key < end && biases != nullptr && biases[key] == -std::numeric_limits<A>::infinity();
    A sum = 0;
    Bits largest = 0;
    int count;
    for (int64_t row = 0; row < num_rows; row += count) {
      count = unit.rows_from(row);
      if (first == 0 || !stay) {
        device::syncthreads();  // rows before have been read
        load_rows(unit, row, count, memory);
      }
      A products[score_rows];
      multiply_rows(unit, unit.kv_head_of(row), first, end, memory.rows, memory.tile, products);
#pragma unroll
      for (int i = 0; i < score_rows; ++i) {
        if (i >= count) {
          continue;
        }
        const ScoreRow<A> of_row = memory.of_rows[i];
        A score = args.relu && products[i] < A(0) ? A(0) : products[i];
        if (args.weights != nullptr) {
          sum = (of_row.begins ? A(0) : sum) + of_row.weight * score;
          score = sum;
        }
        if (of_row.completes && key < of_row.end && !hidden) {
          largest = device::max(largest, ordered_score(score));
        }
        if (of_row.list >= 0) {
          if (key < end) {
            scores[of_row.list * stride + key] = largest;
          }
          largest = 0;
        }
      }
    }
  }
}

// The num_chosen largest of `count` scores: entries, ascending, from `first_name` on.
template <typename Bits, typename Memory>
__device__ void choose_largest(const Bits* scores, int32_t count, int32_t first_name, int32_t wanted, int32_t* list,
                               const Memory& memory) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  int32_t seen = 0;
  for (int32_t first = 0; first < count; first += score_threads) {
    seen += device::syncthreads_count(first + thread < count && scores[first + thread] != 0);
  }
  device::Selection last{0, 0};
  if (seen > wanted) {
    last = device::select_largest<8 * sizeof(Bits)>([&](int32_t i) { return uint64_t{scores[i]}; }, count, wanted,
                                                    memory.histogram);
  }
  int32_t number = 0, ties_before = 0;
  for (int32_t first = 0; first < count; first += score_threads) {
    const int32_t i = first + thread;
    const Bits score = i < count ? scores[i] : Bits{0};
    const bool tie = i < count && score == last.threshold;
    int32_t ties, here;
    const int32_t rank = ties_before + device::exclusive_sum(tie ? 1 : 0, memory.sums, ties);
    const bool chosen = i < count && (score > last.threshold || (tie && rank < last.ties));
    const int32_t place = number + device::exclusive_sum(chosen ? 1 : 0, memory.sums, here);
    if (chosen) {
      list[place] = first_name + i;
    }
    ties_before += ties;
    number += here;
  }
  for (int32_t i = number + thread; i < wanted; i += score_threads) {
    list[i] = -1;
  }
}

// Blocks of score_threads, each with memory for the scores of a unit, go through all units. Three of them on a
// multiprocessor leave registers enough that none are spilled.
template <typename T>
__global__ void __launch_bounds__(score_threads, 3)
    choose_by_scores(ScoreChoice<T> args, ScoreScratch<accumulate_t<T>> scratch, int32_t* indices) {
  using Bits = ordered_score_t<accumulate_t<T>>;
  const ScoreMemory<accumulate_t<T>> memory(args.sizes.head_dim);
  Bits* const of_block = scratch.scores + blockIdx.x * score_lists(args) * scratch.stride;
  const int64_t units = score_choice_units(args);
  for (int64_t index = blockIdx.x; index < units; index += scratch.num_blocks) {
    const ScoreUnit<T> unit(args, index);
    score_keys(unit, memory, of_block, scratch.stride);
    device::syncthreads();  // for blocks of keys
    for (int64_t i = 0; i < unit.num_lists; ++i) {
      const int64_t list = unit.first_list + i;
      const int32_t end = unit.end(args.queries_of_lists(list, 1).end - 1);
      const Names names = names_of(args.rule, unit.sequence, end);
      const Bits* scores = of_block + i * scratch.stride;
      if (args.rule.block_size > 1) {
        Bits* const of_names = of_block + i * scratch.stride + args.sizes.num_keys;
        for (int64_t name = threadIdx.x; name < names.count; name += score_threads) {
          const Range keys = listed_keys(args.rule, unit.sequence, names.first + name);
          Bits largest = 0;
          for (int64_t key = keys.begin; key < keys.end && key < end; ++key) {
            largest = device::max(largest, scores[key]);
          }
          of_names[name] = largest;  // which the same thread reads again
        }
        scores = of_names;
      }
      choose_largest(scores, static_cast<int32_t>(names.count), static_cast<int32_t>(names.first),
                     static_cast<int32_t>(args.num_chosen),
                     indices + args.offset_of_list(unit.batch, unit.list_head, list), memory);
    }
  }
}

}  // namespace torchops::kernels::sparse_attention
