#include "tokens/cpu/segment_sum_kernel.h"

#include "core/cpu/simd.h"

namespace torchops::kernels::tokens::TORCHOPS_LEVEL {

namespace {

// The members of one group.
template <typename T>
struct Group {
  Rows<const T> input;
  const accumulate_t<T>* weights;  // of the batch row's tokens, or null for 1
  int64_t batch;
  const int64_t* begin;
  const int64_t* end;

  accumulate_t<T> weight(int64_t token) const { return weights == nullptr ? accumulate_t<T>(1) : weights[token]; }
};

// The sums of weight * row over the members, where load_row(row, v) gives vector v of a row.
template <int vectors, typename T, typename Load>
inline __attribute__((always_inline)) void sum_rows(const Group<T>& group, const Load& load_row,
                                                    vec<accumulate_t<T>> (&sum)[vectors]) {
  for (const int64_t* token = group.begin; token != group.end;) {
    const int64_t* const first = token;
    const int64_t* const last = group.end - first < members_per_chain ? group.end : first + members_per_chain;
    vec<accumulate_t<T>> chain[vectors] = {};
    for (; token != last; ++token) {
      const T* row = group.input.row(group.batch, *token);
      const auto weight = group.weight(*token);
      for (int v = 0; v < vectors; ++v) {
        const auto product = weight * load_row(row, v);
        chain[v] = token == first ? product : chain[v] + product;  // 0 + -0 is 0
      }
    }
    for (int v = 0; v < vectors; ++v) {
      sum[v] = first == group.begin ? chain[v] : sum[v] + chain[v];
    }
  }
}

// output[c] = sum of weight * input[c] / divisor for `vectors` vectors of channels from c = first_channel.
template <int vectors, typename T>
void sum_vectors(const Group<T>& group, accumulate_t<T> divisor, int64_t first_channel, T* output) {
  vec<accumulate_t<T>> sum[vectors] = {};
  sum_rows(group, [&](const T* row, int v) { return load(row + first_channel + v * lanes<T>); }, sum);
  for (int v = 0; v < vectors; ++v) {
    store(output + first_channel + v * lanes<T>, sum[v] / divisor);
  }
}

template <typename T>
void sum_partial_vector(const Group<T>& group, accumulate_t<T> divisor, int64_t first_channel, int count, T* output) {
  vec<accumulate_t<T>> sum[1] = {};
  sum_rows(group, [&](const T* row, int) { return load_partial(row + first_channel, count); }, sum);
  store_partial(output + first_channel, sum[0] / divisor, count);
}

// Where tokens merge, rows are read out of order, and the processor's own prefetching loses the thread.
// Inlined, for GCC drops calls of a function that does nothing but prefetch.
template <typename T>
inline __attribute__((always_inline)) void prefetch(const Group<T>& group, int64_t channels) {
  constexpr int64_t line = 64;
  for (const int64_t* token = group.begin; token != group.end; ++token) {
    const char* const row = reinterpret_cast<const char*>(group.input.row(group.batch, *token));
    for (int64_t byte = 0; byte < channels * static_cast<int64_t>(sizeof(T)); byte += line) {
      __builtin_prefetch(row + byte);
    }
  }
}

template <typename T>
void sum_group(const SegmentSum<T>& args, const Group<T>& group, int64_t unit) {
  using A = accumulate_t<T>;
  const int64_t channels = args.num_channels;
  T* output = args.output + unit * channels;
  double sum_of_weights = 0;
  for (const int64_t* token = group.begin; token != group.end; ++token) {
    sum_of_weights += static_cast<double>(group.weight(*token));
  }
  const auto total = static_cast<A>(sum_of_weights);
  if (args.total != nullptr) {
    args.total[unit] = total;
  }
  const bool single = group.end - group.begin == 1;
  if (channels == 0) {
    return;  // rows of nothing may have no address
  }
  if (group.begin == group.end) {
    __builtin_memset(output, 0, static_cast<size_t>(channels) * sizeof(T));
  } else if (single && args.is_copy(total)) {
    copy_row(output, args.input.row(group.batch, *group.begin), channels);
  } else {
    const A divisor = args.normalize && total != 0 ? total : A(1);
    int64_t c = 0;
    for (; c + 4 * lanes<T> <= channels; c += 4 * lanes<T>) {
      sum_vectors<4>(group, divisor, c, output);
    }
    for (; c + lanes<T> <= channels; c += lanes<T>) {
      sum_vectors<1>(group, divisor, c, output);
    }
    if (c < channels) {
      sum_partial_vector(group, divisor, c, static_cast<int>(channels - c), output);
    }
  }
}

}  // namespace

template <typename T>
void segment_sum(const SegmentSum<T>& args, int64_t begin, int64_t end) {
  constexpr int64_t rows_ahead = 2;
  for (int64_t unit = begin; unit < end;) {
    const int64_t batch = unit / args.num_groups;
    const int64_t first = batch * args.num_groups;
    const int64_t last = first + args.num_groups < end ? first + args.num_groups : end;
    const int64_t* const offsets = args.offsets + batch * (args.num_groups + 1);
    const int64_t* const members = args.members + batch * args.num_tokens;
    const auto* const weights = args.weight == nullptr ? nullptr : args.weight + batch * args.num_tokens;
    const auto group = [&](int64_t m) -> Group<T> {
      return {args.input, weights, batch, members + offsets[m], members + offsets[m + 1]};
    };
    for (; unit < last; ++unit) {
      if (unit + rows_ahead < last) {
        prefetch(group(unit - first + rows_ahead), args.num_channels);
      }
      sum_group(args, group(unit - first), unit);
    }
  }
}

template void segment_sum(const SegmentSum<double>&, int64_t, int64_t);
template void segment_sum(const SegmentSum<float>&, int64_t, int64_t);
template void segment_sum(const SegmentSum<bfloat16>&, int64_t, int64_t);
template void segment_sum(const SegmentSum<float16>&, int64_t, int64_t);

}  // namespace torchops::kernels::tokens::TORCHOPS_LEVEL
