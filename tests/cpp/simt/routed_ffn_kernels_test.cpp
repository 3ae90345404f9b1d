// The CUDA kernels of the routed_ffn family on the host, but for its products.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "catch.h"
#include "core/cuda/launch.h"
#include "core/cuda/tiles.h"
#include "numbers.h"
#include "orders.h"
#include "routed_ffn/cuda/activate.cuh"
#include "routed_ffn/cuda/slots.cuh"
#include "routed_ffn/cuda/sort_entries.cuh"

// A race does not depend on the type, and ThreadSanitizer takes its time for every fiber.
#if defined(SIMT_THREAD_SANITIZER) || defined(SIMT_MUTATION)
#define KERNEL_TYPES float
#else
#define KERNEL_TYPES double, float, bfloat16, float16
#endif

namespace torchops::kernels::routed_ffn {
namespace {

// Odd multiples of 1/8, which are no zeros, and exact in every type.
std::vector<double> eighths(int64_t count, uint32_t seed) {
  const auto whole = simt::whole_numbers(static_cast<size_t>(count), seed);
  std::vector<double> result(whole.size());
  std::transform(whole.begin(), whole.end(), result.begin(), [](float x) { return x / 4 + 0.125; });
  return result;
}

template <typename T>
void check_close(const std::vector<T>& actual, const std::vector<double>& expected) {
  constexpr double tolerance = std::is_same_v<T, double>     ? 1e-7
                               : std::is_same_v<T, float>    ? 2e-6
                               : std::is_same_v<T, bfloat16> ? 0.004
                                                             : 0.0005;
  const auto numbers = simt::widened<double>(actual);
  REQUIRE(numbers.size() == expected.size());
  for (size_t i = 0; i < numbers.size(); ++i) {
    CAPTURE(i, numbers[i], expected[i]);
    REQUIRE(std::abs(numbers[i] - expected[i]) <= tolerance * (1 + std::abs(expected[i])));
  }
}

double activation_in_double(const Activation& activation, double x) {
  switch (activation.kind) {
    case ActivationKind::relu:
      return std::max(x, 0.0);
    case ActivationKind::relu2:
      return std::max(x, 0.0) * std::max(x, 0.0);
    case ActivationKind::gelu:
      return x * 0.5 * (1 + std::erf(x / std::sqrt(2.0)));
    case ActivationKind::gelu_tanh:
      return x * 0.5 * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
    case ActivationKind::silu:
      break;
  }
  return x / (1 + std::exp(-activation.alpha * x));
}

// The slope on the side of 0, where the limits are not.
template <typename Function>
double slope(const Function& function, double x) {
  const double step = x > 0 ? -1e-4 : 1e-4;
  return (-3 * function(x) + 4 * function(x + step) - function(x + 2 * step)) / (2 * step);
}

struct ActivationShape {
  Activation activation;
  int64_t size;
  int width;
  int64_t num_rows = 4;
  std::vector<int32_t> offsets = {0, 2, 3};

  int64_t preactivations() const { return activation.preactivations(size); }
  int64_t num_activated() const { return offsets.back(); }
  Groups groups() const { return {offsets.data(), 2, num_rows}; }
  bool is_gated() const { return activation.units != GatedUnits::none; }
  // Where the first (the gate) or the second half of a unit is.
  size_t place(int64_t row, int64_t unit, int64_t half) const {
    const bool by_turns = activation.units == GatedUnits::interleaved;
    return static_cast<size_t>(row * preactivations() + (by_turns ? 2 * unit + half : half * size + unit));
  }
  double gate_value(double gate) const { return activation_in_double(activation, std::min(gate, activation.limit)); }
  double up_value(double up) const {
    return std::clamp(up, -activation.limit, activation.limit) + activation.up_offset;
  }
  double hidden(const std::vector<double>& z, int64_t row, int64_t unit) const {
    const double first = z[place(row, unit, 0)];
    return is_gated() ? gate_value(first) * up_value(z[place(row, unit, 1)]) : activation_in_double(activation, first);
  }
};

std::vector<ActivationShape> activation_shapes() {
  constexpr double none = std::numeric_limits<double>::infinity();
  using Kind = ActivationKind;
#if defined(SIMT_THREAD_SANITIZER)
  return {{{Kind::silu, GatedUnits::interleaved, 1, none, 0}, 70, 1}};
#else
  std::vector<ActivationShape> shapes;
  for (const auto kind : {Kind::relu, Kind::relu2, Kind::gelu, Kind::gelu_tanh, Kind::silu}) {
    shapes.push_back({{kind, GatedUnits::none, 1.5, none, 0}, 35, 1});
  }
  // Rows of more than a pack for each thread, and of less.
  for (const auto units : {GatedUnits::none, GatedUnits::side_by_side, GatedUnits::interleaved}) {
    shapes.push_back({{Kind::silu, units, 1, none, 0}, 300, 4});
    shapes.push_back({{Kind::silu, units, 1.5, none, 0.5}, 6, 2});
    shapes.push_back({{Kind::gelu, units, 1, 1.125, 1}, 70, 1});
  }
  return shapes;
#endif
}

// Packs have 16 bytes of A at most.
template <typename A, typename Body>
void with_width(int width, const Body& body) {
  if (width == 1) {
    body(std::integral_constant<int, 1>{});
  } else if (width == 2 || sizeof(A) == 8) {
    body(std::integral_constant<int, 2>{});
  } else {
    body(std::integral_constant<int, device::widest<A>>{});
  }
}

}  // namespace

TEST_CASE("route sorts entries by block and keeps their order") {
  struct Shape {
    int64_t num_entries, num_blocks;
  };
  // A warp has a piece of 2048 entries, and a block four of them.
  for (const auto& [num_entries, num_blocks] : std::vector<Shape>{{300, 3}, {2100, 40}, {9000, 5}, {0, 2}, {70, 300}}) {
    CAPTURE(num_entries, num_blocks);
    std::vector<int64_t> index;
    for (int64_t entry = 0; entry < num_entries; ++entry) {
      index.push_back(entry * entry % 11 * 7 % (num_blocks + 2) - 1);
    }
    const auto both = simt::same_in_every_order([&] {
      std::vector<int32_t> result(static_cast<size_t>(num_entries + num_blocks + 1), -7);
      Entries entries{
          nullptr, index.data(), num_entries, num_blocks, nullptr, result.data(), result.data() + num_entries};
      std::vector<int32_t> counts(static_cast<size_t>(entries.num_pieces() * (num_blocks + 1)), 77);
      entries.counts = counts.data();
      const int64_t blocks = (entries.num_pieces() + pieces_of_block - 1) / pieces_of_block;
      constexpr int threads = pieces_of_block * device::warp_size;
      device::launch({.grid = blocks, .block = threads}, count_entries, entries);
      device::launch({1, place_threads, device::shared_size<int32_t>(device::max_warps)}, place_pieces, entries);
      device::launch({.grid = blocks, .block = threads}, order_entries, entries);
      return result;
    });
    const auto block_of = [&](int64_t entry) {
      const int64_t block = index[static_cast<size_t>(entry)];
      return block >= 0 && block < num_blocks ? block : num_blocks;
    };
    std::vector<int32_t> expected;
    for (int32_t entry = 0; entry < num_entries; ++entry) {
      expected.push_back(entry);
    }
    std::stable_sort(expected.begin(), expected.end(),
                     [&](int32_t one, int32_t other) { return block_of(one) < block_of(other); });
    for (int64_t block = 0; block <= num_blocks; ++block) {
      expected.push_back(static_cast<int32_t>(std::count_if(expected.begin(), expected.begin() + num_entries,
                                                            [&](int32_t entry) { return block_of(entry) < block; })));
    }
    CHECK(both == expected);
  }
}

TEMPLATE_TEST_CASE("activate", "", KERNEL_TYPES) {
  using T = TestType;
  using A = accumulate_t<T>;
  for (const ActivationShape& shape : activation_shapes()) {
    for (const bool is_wide : {false, true}) {
      for (const bool in_place : {false, true}) {
        CAPTURE(static_cast<int>(shape.activation.kind), static_cast<int>(shape.activation.units), shape.size, is_wide,
                in_place);
        auto z = eighths(shape.num_rows * shape.preactivations(), 1);
        std::vector<A> wide(z.begin(), z.end());
        for (A& number : wide) {
          number *= A(1.001);  // which T rounds
        }
        const auto narrow = is_wide ? [&] {
          std::vector<T> result(wide.size());
          std::transform(wide.begin(), wide.end(), result.begin(), [](A x) { return device::narrow<T>(x); });
          return result;
        }()
                                    : simt::narrowed<T>(z);
        z = simt::widened<double>(narrow);
        const int64_t stride = in_place ? shape.preactivations() : shape.size;
        std::vector<double> expected;
        for (int64_t row = 0; row < shape.num_activated(); ++row) {
          for (int64_t unit = 0; unit < shape.size; ++unit) {
            expected.push_back(shape.hidden(z, row, unit));
          }
        }
        const auto all = simt::same_in_every_order([&] {
          auto preactivation = is_wide ? std::vector<T>(narrow.size()) : narrow;
          std::vector<T> separate(in_place ? 0 : static_cast<size_t>(shape.num_rows * stride));
          T* const hidden = in_place ? preactivation.data() : separate.data();
          with_width<A>(shape.width, [&](auto width) {
            device::launch({shape.num_rows, 64}, activate<width(), T>,
                           Activate<T>{shape.activation, shape.groups(), shape.size, is_wide ? wide.data() : nullptr,
                                       preactivation.data(), hidden, stride});
          });
          std::vector<T> result;
          for (int64_t row = 0; row < shape.num_activated(); ++row) {
            result.insert(result.end(), hidden + row * stride, hidden + row * stride + shape.size);
          }
          if (!in_place) {
            result.insert(result.end(), preactivation.begin(), preactivation.end());
          }
          return result;
        });
        if (!in_place) {
          expected.insert(expected.end(), z.begin(), z.end());
        }
        check_close(all, expected);
      }
    }
  }
}

TEMPLATE_TEST_CASE("activate_backward", "", KERNEL_TYPES) {
  using T = TestType;
  using A = accumulate_t<T>;
  struct Options {
    bool is_wide, in_place, has_plain, has_scale;
  };
  const std::vector<int32_t> order = {2, 0, 3, 1};
  for (const ActivationShape& shape : activation_shapes()) {
    for (const auto [is_wide, in_place, has_plain, has_scale] :
         std::vector<Options>{{false, true, false, true}, {true, false, true, true}, {false, false, true, false}}) {
      CAPTURE(static_cast<int>(shape.activation.kind), static_cast<int>(shape.activation.units), shape.size, is_wide);
      const int64_t count = shape.num_rows * shape.size;
      const auto z = eighths(shape.num_rows * shape.preactivations(), 1), to_output = eighths(count, 2),
                 plain = eighths(count, 3), scale = eighths(shape.num_rows, 4);
      std::vector<double> of_z(z.size(), 9), hidden, dots(order.size(), 3);
      for (int64_t row = 0; row < shape.num_activated(); ++row) {
        const auto entry = static_cast<size_t>(order[static_cast<size_t>(row)]);
        const double factor = has_scale ? scale[entry] : 1;
        for (int64_t unit = 0; unit < shape.size; ++unit) {
          const auto at = static_cast<size_t>(row * shape.size + unit);
          const double value = shape.hidden(z, row, unit);
          const double to_hidden = factor * to_output[at] + (has_plain ? plain[at] : 0);
          hidden.push_back(factor * value);
          dots[entry] += value * to_output[at];
          const size_t first = shape.place(row, unit, 0);
          if (!shape.is_gated()) {
            of_z[first] =
                to_hidden * slope([&](double x) { return activation_in_double(shape.activation, x); }, z[first]);
            continue;
          }
          const size_t second = shape.place(row, unit, 1);
          of_z[first] =
              to_hidden * shape.up_value(z[second]) * slope([&](double x) { return shape.gate_value(x); }, z[first]);
          of_z[second] =
              to_hidden * shape.gate_value(z[first]) * slope([&](double x) { return shape.up_value(x); }, z[second]);
        }
      }
      const auto narrow_z = simt::narrowed<T>(z), narrow_output = simt::narrowed<T>(to_output);
      const std::vector<A> wide_output(to_output.begin(), to_output.end()), plains(plain.begin(), plain.end()),
          scales(scale.begin(), scale.end());
      std::vector<T> hiddens;
      std::vector<A> sums;
      const auto grad = simt::same_in_every_order([&] {
        auto rounded = narrow_output;
        hiddens = in_place ? std::vector<T>() : std::vector<T>(static_cast<size_t>(count));
        sums.assign(order.size(), A(3));
        auto gradient = simt::narrowed<T>(std::vector<double>(z.size(), 9));
        ActivateBackward<T> args{shape.activation,
                                 shape.groups(),
                                 shape.size,
                                 narrow_z.data(),
                                 is_wide ? wide_output.data() : nullptr,
                                 is_wide ? nullptr : rounded.data(),
                                 has_plain ? plains.data() : nullptr,
                                 has_scale ? scales.data() : nullptr,
                                 order.data(),
                                 gradient.data(),
                                 in_place ? rounded.data() : hiddens.data(),
                                 sums.data()};
        with_width<A>(shape.width, [&](auto width) {
          device::launch({device::tiles_of(shape.num_rows, activation_warps), activation_threads},
                         activate_backward<width(), T>, args);
          if (in_place) {
            hiddens = rounded;
          }
          // None of the three.
          args.grad_preactivation = args.hidden = nullptr;
          args.dots = nullptr;
          device::launch({device::tiles_of(shape.num_rows, activation_warps), activation_threads},
                         activate_backward<width(), T>, args);
        });
        return gradient;
      });
      check_close(grad, simt::widened<double>(simt::narrowed<T>(of_z)));
      hiddens.resize(hidden.size());
      check_close(hiddens, hidden);
      check_close(sums, dots);
    }
  }
}

TEMPLATE_TEST_CASE("slot_sums", "", KERNEL_TYPES) {
  using T = TestType;
  using A = accumulate_t<T>;
  const std::vector<int32_t> offsets = {0, 4}, places = {2, 0, 4, 3, 1, 5, -7, 3, 1000, 2};
  for (const int64_t size : {5, 48}) {
    for (const bool plain : {false, true}) {
      CAPTURE(size, plain);
      const auto rows = eighths(6 * size, 1), gate = eighths(10, 2), bias = eighths(size, 3);
      std::vector<double> expected;
      for (size_t token = 0; token < 5; ++token) {
        for (int64_t c = 0; c < size; ++c) {
          double sum = plain ? 0 : bias[static_cast<size_t>(c)];
          for (size_t slot = 2 * token; slot < 2 * token + 2; ++slot) {
            const int32_t place = places[slot];
            sum += 0 <= place && place < 4 ? (plain ? 1 : gate[slot]) * rows[static_cast<size_t>(place * size + c)] : 0;
          }
          expected.push_back(sum);
        }
      }
      const std::vector<A> sums(rows.begin(), rows.end()), gates(gate.begin(), gate.end());
      const auto biases = simt::narrowed<T>(bias);
      check_close(simt::same_in_every_order([&] {
                    std::vector<T> output(expected.size());
                    with_width<A>(size % 4 == 0 ? 4 : 1, [&](auto width) {
                      device::launch({5, 32}, slot_sums<width(), T>,
                                     SlotSums<T>{{offsets.data(), 1, 6},
                                                 5,
                                                 2,
                                                 size,
                                                 sums.data(),
                                                 places.data(),
                                                 plain ? nullptr : gates.data(),
                                                 plain ? nullptr : biases.data(),
                                                 output.data()});
                    });
                    return output;
                  }),
                  expected);
    }
  }
}

TEMPLATE_TEST_CASE("slot_dots", "", KERNEL_TYPES) {
  using T = TestType;
  using A = accumulate_t<T>;
  constexpr int64_t size = 70, stride = 72;
  const std::vector<int32_t> offsets = {0, 2, 5}, lines = {0, 1, 0, 2, 1, 2}, order = {1, 3, 0, 4, 2, 5};
  const auto rows = eighths(6 * size, 1), tokens = eighths(3 * stride, 2);
  std::vector<double> expected(6, 2);
  for (size_t row = 0; row < 5; ++row) {
    for (size_t c = 0; c < size; ++c) {
      expected[static_cast<size_t>(order[row])] +=
          rows[row * size + c] * tokens[static_cast<size_t>(lines[row]) * stride + c];
    }
  }
  const std::vector<A> sums(rows.begin(), rows.end());
  const auto narrow_tokens = simt::narrowed<T>(tokens);
  check_close(simt::same_in_every_order([&] {
                std::vector<A> dots(6, A(2));
                device::launch({device::tiles_of(6, slot_dots_warps), slot_dots_warps * device::warp_size},
                               slot_dots<T>,
                               SlotDots<T>{{offsets.data(), 2, 6},
                                           size,
                                           sums.data(),
                                           {narrow_tokens.data(), stride, lines.data()},
                                           order.data(),
                                           dots.data()});
                return dots;
              }),
              expected);
}

TEST_CASE("place_rows") {
  const auto place = [](const std::vector<int32_t>& order) {
    return simt::same_in_every_order([&] {
      const auto rows = static_cast<int64_t>(order.size());
      std::vector<int32_t> tokens_and_places(2 * order.size(), 77);
      int32_t* const tokens = tokens_and_places.data();
      device::launch({device::tiles_of(rows, place_rows_threads), place_rows_threads}, place_rows,
                     Placing{order.data(), rows, 3, tokens, tokens + rows});
      return tokens_and_places;
    });
  };
  CHECK(place({5, 0, 4, 2, 1, 3}) == std::vector<int32_t>{1, 0, 1, 0, 0, 1, 1, 4, 3, 5, 2, 0});
  CHECK_THROWS_WITH(place({0, 2}), Catch::Matchers::Contains("an order's entry is in 0..M-1"));
  const simt::ReleaseBuild release_build;
  CHECK(place({1, -4, 3}) == std::vector<int32_t>{0, -1, -1, 77, 0, 77});
}

}  // namespace torchops::kernels::routed_ffn
