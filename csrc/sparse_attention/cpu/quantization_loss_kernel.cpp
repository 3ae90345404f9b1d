#include "sparse_attention/cpu/quantization_loss_kernel.h"

#include "sparse_attention/cpu/codeword_distances.h"

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {
namespace {

// A part and how it weights the codewords of its subspace. Vectors are those of codewords, or where that is said those
// of channels. With `most` = codeword_group the loops over vectors have a known length.
template <typename T, int64_t most>
class WeightedCodewords {
 public:
  using A = accumulate_t<T>;

  WeightedCodewords(const Parts<T>& parts, int64_t m) : parts_(parts), codebook_(parts.codebook(m)) {}

  void look_at(const T* part) {
    part_ = part;
    Nearest<A> nearest;
    vec<A> total = {};
    for (int64_t first = 0; first < padded(); first += codeword_group) {
      const auto distances = measure_group(parts_, part, codebook_, first);
      for (int piece = 0; piece < vectors_of_group<A>; ++piece) {
        const int64_t number = first + piece * lanes<A>;
        nearest.show(distances.vectors[piece], number);
        // What stands behind the last codeword has no weight, and a distance that has no gradient.
        const auto there = lane_numbers<Index>() < static_cast<Index>(parts_.num_codewords - number);
        const vec<A> distance = there ? distances.vectors[piece] : vec<A>{};
        const vec<A> least = broadcast(static_cast<A>(least_distance));
        const vec<A> weight = there ? 1 / (distance < least ? least : distance) : vec<A>{};
        distances_[number / lanes<A>] = distance;
        weights_[number / lanes<A>] = weight;
        total += weight;
      }
    }
    nearest_ = nearest.code();
    const vec<A> divisor = broadcast(sum_lanes<A>(total));
    for (int v = 0; v < num_vectors(); ++v) {
      weights_[v] = weights_[v] / divisor;
    }
  }

  // Calls body(channel, count, x - z, y, y - z) with vectors of channels, of which the first `count` count, the others
  // are 0.
  template <typename Body>
  inline __attribute__((always_inline)) void for_each_channels(const Body& body) const {
    for_each_vector<T>(parts_.subspace, [&](int64_t channel, int count) {
      vec<A> nearest = {};
      for (int c = 0; c < count; ++c) {
        nearest[c] = row(channel + c)[nearest_];
      }
      const vec<A> mixed = sums(channel, count, [&](int v, vec<A> codewords, A) { return weights_[v] * codewords; });
      body(channel, count, load_piece(part_ + channel, count) - nearest, mixed, mixed - nearest);
    });
  }

  // How the loss grows with the distances, given that it grows by y - z with y.
  void find_slopes() {
    for (int v = 0; v < num_vectors(); ++v) {
      slopes_[v] = vec<A>{};
    }
    vec<A> with_mean = {};
    for_each_channels([&](int64_t channel, int count, vec<A>, vec<A> mixed, vec<A> towards) {
      with_mean += mixed * towards;
      for (int c = 0; c < count; ++c) {
        for (int v = 0; v < num_vectors(); ++v) {
          slopes_[v] += towards[c] * load(row(channel + c) + v * lanes<A>);
        }
      }
    });
    const vec<A> mean = broadcast(sum_lanes<A>(with_mean));
    for (int v = 0; v < num_vectors(); ++v) {
      const vec<A> slope = weights_[v] * (mean - slopes_[v]) / distances_[v];
      slopes_[v] = distances_[v] > static_cast<A>(least_distance) ? slope : vec<A>{};
    }
  }

  // The gradient to the part, for channels.
  inline __attribute__((always_inline)) vec<A> gradient(int64_t channel, int count, vec<A> residual) const {
    return residual +
           sums(channel, count, [&](int v, vec<A> codewords, A x) { return slopes_[v] * sign(x - codewords); });
  }

  // Adds the gradient to codewords, for channels.
  inline __attribute__((always_inline)) void add_gradient(int64_t channel, int count, vec<A> residual, vec<A> towards,
                                                          A* sum) const {
    const vec<A> channels = load_piece(part_ + channel, count);
    for (int c = 0; c < count; ++c) {
      A* const to = sum + (channel + c) * padded();
      for (int v = 0; v < num_vectors(); ++v) {
        const vec<A> side = sign(channels[c] - load(row(channel + c) + v * lanes<A>));
        store(to + v * lanes<A>, load(to + v * lanes<A>) + (towards[c] * weights_[v] - slopes_[v] * side));
      }
      to[nearest_] -= towards[c] + residual[c];
    }
  }

 private:
  using Index = typename lane_index<sizeof(A)>::type;

  int64_t padded() const { return most == codeword_group ? most : parts_.padded(); }
  int num_vectors() const { return static_cast<int>(padded() / lanes<A>); }
  const A* row(int64_t channel) const { return codebook_ + channel * padded(); }

  static inline __attribute__((always_inline)) vec<A> sign(vec<A> value) {
    const vec<A> one = broadcast(A{1});
    return (value > 0 ? one : vec<A>{}) - (value < 0 ? one : vec<A>{});
  }

  // Over codewords, of term(vector, codewords, the part's number), for a vector of channels.
  template <typename Term>
  inline __attribute__((always_inline)) vec<A> sums(int64_t channel, int count, const Term& term) const {
    const vec<A> channels = load_piece(part_ + channel, count);
    vec<A> of_channels[lanes<A>] = {};
    for (int c = 0; c < count; ++c) {
      for (int v = 0; v < num_vectors(); ++v) {
        of_channels[c] += term(v, load(row(channel + c) + v * lanes<A>), channels[c]);
      }
    }
    return sums_of_lanes(of_channels);
  }

  const Parts<T>& parts_;
  const A* codebook_;
  const T* part_ = nullptr;
  int64_t nearest_ = 0;
  vec<A> distances_[most / lanes<A>];
  vec<A> weights_[most / lanes<A>];
  vec<A> slopes_[most / lanes<A>];
};

template <int64_t most, typename T>
void loss_of_units(const QuantizationLoss<T>& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t piece = unit / args.parts.num_subspaces, m = unit % args.parts.num_subspaces;
    WeightedCodewords<T, most> weighted(args.parts, m);
    double sum = 0;
    for (int64_t row = args.pieces.begin(piece); row < args.pieces.end(piece); ++row) {
      weighted.look_at(args.parts.part(row, m));
      vec<A> squares = {};
      weighted.for_each_channels([&](int64_t, int, vec<A> residual, vec<A>, vec<A> towards) {
        squares += residual * residual + towards * towards;
      });
      sum += static_cast<double>(sum_lanes<A>(squares));
    }
    args.sums[unit] = sum;
  }
}

template <int64_t most, typename T>
void gradient_of_units(const QuantizationGradient<T>& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const A factor = args.factor();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t piece = unit / args.parts.num_subspaces, m = unit % args.parts.num_subspaces;
    WeightedCodewords<T, most> weighted(args.parts, m);
    A* const sum = args.piece_gradients == nullptr ? nullptr : args.piece_gradient(unit);
    if (sum != nullptr) {
      __builtin_memset(sum, 0, static_cast<size_t>(args.codebook_size()) * sizeof(A));
    }
    for (int64_t row = args.pieces.begin(piece); row < args.pieces.end(piece); ++row) {
      weighted.look_at(args.parts.part(row, m));
      weighted.find_slopes();
      weighted.for_each_channels([&](int64_t channel, int count, vec<A> residual, vec<A>, vec<A> towards) {
        if (args.grad_input != nullptr) {
          T* const to = args.grad_input + args.parts.offset(row, m) + channel;
          store_piece(to, factor * weighted.gradient(channel, count, residual), count);
        }
        if (sum != nullptr) {
          weighted.add_gradient(channel, count, residual, towards, sum);
        }
      });
    }
  }
}

}  // namespace

template <typename T>
void quantization_loss(const QuantizationLoss<T>& args, int64_t begin, int64_t end) {
  if (args.parts.padded() == codeword_group) {
    loss_of_units<codeword_group>(args, begin, end);
  } else {
    loss_of_units<most_codewords>(args, begin, end);
  }
}

template <typename T>
void quantization_gradient(const QuantizationGradient<T>& args, int64_t begin, int64_t end) {
  if (args.parts.padded() == codeword_group) {
    gradient_of_units<codeword_group>(args, begin, end);
  } else {
    gradient_of_units<most_codewords>(args, begin, end);
  }
}

template <typename T>
void sum_piece_gradients(const QuantizationGradient<T>& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const A factor = args.factor();
  for_each_vector<A>(end - begin, [&](int64_t first, int count) {
    vec<A> sum = {};
    for (int64_t piece = 0; piece < args.pieces.num_pieces; ++piece) {
      sum += load_piece(args.piece_gradients + piece * args.num_sums() + begin + first, count);
    }
    store_piece(args.grad_codewords + begin + first, factor * sum, count);
  });
}

#define TORCHOPS_INSTANTIATE(T)                                                          \
  template void quantization_loss(const QuantizationLoss<T>&, int64_t, int64_t);         \
  template void quantization_gradient(const QuantizationGradient<T>&, int64_t, int64_t); \
  template void sum_piece_gradients(const QuantizationGradient<T>&, int64_t, int64_t);
TORCHOPS_INSTANTIATE(double)
TORCHOPS_INSTANTIATE(float)
TORCHOPS_INSTANTIATE(bfloat16)
TORCHOPS_INSTANTIATE(float16)

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
