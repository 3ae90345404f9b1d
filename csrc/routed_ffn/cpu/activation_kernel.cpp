#include "routed_ffn/cpu/activation_kernel.h"

#include "routed_ffn/cpu/activation_functions.h"

namespace torchops::kernels::routed_ffn::TORCHOPS_LEVEL {
namespace {

// The lanes with even or odd numbers of two vectors that follow each other.
template <int first, typename A>
vec<A> every_other(vec<A> one, vec<A> other) {
  vec<typename lane_index<sizeof(A)>::type> order;
  for (int lane = 0; lane < lanes<A>; ++lane) {
    order[lane] = 2 * lane + first;
  }
  return __builtin_shuffle(one, other, order);
}

// A gate and a value for each of a vector of hidden units.
template <typename A>
struct Pair {
  vec<A> gate;
  vec<A> value;
};

// `first` and `used` count hidden units of a row of `size`.
template <typename T>
inline __attribute__((always_inline)) Pair<accumulate_t<T>> load_pair(const Activation& activation, const T* row,
                                                                      int64_t size, int64_t first, int used) {
  using A = accumulate_t<T>;
  if (activation.units == GatedUnits::side_by_side) {
    return {load_piece(row + first, used), load_piece(row + size + first, used)};
  }
  const int in_one = 2 * used < lanes<T> ? 2 * used : lanes<T>;
  const vec<A> one = load_piece(row + 2 * first, in_one),
               other = load_piece(row + 2 * first + in_one, 2 * used - in_one);
  return {every_other<0, A>(one, other), every_other<1, A>(one, other)};
}

template <typename T>
inline __attribute__((always_inline)) void store_pair(const Activation& activation, T* row, int64_t size, int64_t first,
                                                      int used, Pair<accumulate_t<T>> pair) {
  if (activation.units == GatedUnits::side_by_side) {
    store_piece(row + first, pair.gate, used);
    store_piece(row + size + first, pair.value, used);
    return;
  }
  const int in_one = 2 * used < lanes<T> ? 2 * used : lanes<T>;
  store_piece(row + 2 * first, interleave<0>(pair.gate, pair.value), in_one);
  store_piece(row + 2 * first + in_one, interleave<1>(pair.gate, pair.value), 2 * used - in_one);
}

// What a gated unit multiplies, and whether a gradient goes through the limits.
template <typename A>
struct Limited {
  vec<A> gate;
  vec<A> value;
  bool has_limit;
  A limit;

  Limited(const Activation& activation, const Pair<A>& pair)
      : gate(pair.gate),
        value(pair.value),
        has_limit(activation.limit < static_cast<double>(__builtin_inf())),
        limit(static_cast<A>(activation.limit)) {
    if (has_limit) {
      const vec<A> most = limit + vec<A>{};
      gate = gate > most ? most : gate;
      value = value > most ? most : value < -most ? -most : value;
    }
    value += static_cast<A>(activation.up_offset);
  }
  vec<A> to_gate(const Pair<A>& pair, vec<A> grad) const {
    return has_limit ? pair.gate <= limit ? grad : vec<A>{} : grad;
  }
  vec<A> to_value(const Pair<A>& pair, vec<A> grad) const {
    return has_limit ? (pair.value <= limit) & (pair.value >= -limit) ? grad : vec<A>{} : grad;
  }
};

template <ActivationKind kind, typename T>
void activate_rows(const Activate<T>& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t width = args.activation.preactivations(args.size);
  const A alpha = static_cast<A>(args.activation.alpha);
  for (int64_t i = begin; i < end; ++i) {
    T* const row = args.preactivation + i * width;
    if (args.wide_preactivation != nullptr) {
      const A* const wide = args.wide_preactivation + i * width;
      for_each_vector<T>(
          width, [&](int64_t first, int used) { store_piece(row + first, load_piece(wide + first, used), used); });
    }
    T* const hidden = args.hidden + i * args.hidden_stride;
    for_each_vector<T>(args.size, [&](int64_t first, int used) {
      if (args.activation.units == GatedUnits::none) {
        store_piece(hidden + first, activated<kind, A>(load_piece(row + first, used), alpha).value, used);
        return;
      }
      const Limited<A> limited(args.activation, load_pair(args.activation, row, args.size, first, used));
      store_piece(hidden + first, activated<kind, A>(limited.gate, alpha).value * limited.value, used);
    });
  }
}

template <ActivationKind kind, typename T>
void activate_backward_rows(const ActivateBackward<T>& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t size = args.size, width = args.activation.preactivations(size);
  const A alpha = static_cast<A>(args.activation.alpha);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t entry = args.order[i];
    const T* const row = args.preactivation + i * width;
    const A scale = args.scale == nullptr ? A(1) : args.scale[entry];
    vec<A> dots = {};
    for_each_vector<T>(size, [&](int64_t first, int used) {
      const int64_t place = i * size + first;
      const vec<A> of_output = args.wide_output_gradient != nullptr
                                   ? load_piece(args.wide_output_gradient + place, used)
                                   : load_piece(args.output_gradient + place, used);
      vec<A> grad = scale * of_output;
      if (args.plain_gradient != nullptr) {
        grad += load_piece(args.plain_gradient + place, used);
      }
      vec<A> hidden;
      if (args.activation.units == GatedUnits::none) {
        const auto [value, derivative] = activated<kind, A>(load_piece(row + first, used), alpha);
        hidden = value;
        if (args.grad_preactivation != nullptr) {
          store_piece(args.grad_preactivation + i * width + first, derivative * grad, used);
        }
      } else {
        const auto pair = load_pair(args.activation, row, size, first, used);
        const Limited<A> limited(args.activation, pair);
        const auto [value, derivative] = activated<kind, A>(limited.gate, alpha);
        hidden = value * limited.value;
        if (args.grad_preactivation != nullptr) {
          store_pair(args.activation, args.grad_preactivation + i * width, size, first, used,
                     {limited.to_gate(pair, derivative * limited.value * grad), limited.to_value(pair, value * grad)});
        }
      }
      dots += hidden * of_output;
      if (args.hidden != nullptr) {
        store_piece(args.hidden + place, scale * hidden, used);
      }
    });
    if (args.dots != nullptr) {
      args.dots[entry] += sum_lanes<A>(dots);
    }
  }
}

template <ActivationKind number>
struct activation_kind {
  static constexpr ActivationKind kind = number;
};

template <typename Body>
void with_kind(ActivationKind kind, const Body& body) {
  switch (kind) {
    case ActivationKind::relu:
      return body(activation_kind<ActivationKind::relu>{});
    case ActivationKind::relu2:
      return body(activation_kind<ActivationKind::relu2>{});
    case ActivationKind::gelu:
      return body(activation_kind<ActivationKind::gelu>{});
    case ActivationKind::gelu_tanh:
      return body(activation_kind<ActivationKind::gelu_tanh>{});
    case ActivationKind::silu:
      return body(activation_kind<ActivationKind::silu>{});
  }
}

}  // namespace

template <typename T>
void activate(const Activate<T>& args, int64_t begin, int64_t end) {
  with_kind(args.activation.kind,
            [&](auto activation) { activate_rows<decltype(activation)::kind>(args, begin, end); });
}

template <typename T>
void activate_backward(const ActivateBackward<T>& args, int64_t begin, int64_t end) {
  with_kind(args.activation.kind,
            [&](auto activation) { activate_backward_rows<decltype(activation)::kind>(args, begin, end); });
}

#define TORCHOPS_INSTANTIATE(T)                                 \
  template void activate(const Activate<T>&, int64_t, int64_t); \
  template void activate_backward(const ActivateBackward<T>&, int64_t, int64_t);
TORCHOPS_INSTANTIATE(double)
TORCHOPS_INSTANTIATE(float)
TORCHOPS_INSTANTIATE(bfloat16)
TORCHOPS_INSTANTIATE(float16)
#undef TORCHOPS_INSTANTIATE

}  // namespace torchops::kernels::routed_ffn::TORCHOPS_LEVEL
