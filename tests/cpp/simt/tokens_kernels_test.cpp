// The CUDA kernels of the tokens family on the host, next to the CPU kernels of the lowest level, which
// compute the same in the same order: on whole numbers the bits are equal.

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "catch.h"
#include "core/cpu/aligned_buffer.h"
#include "core/cuda/launch.h"
#include "numbers.h"
#include "orders.h"
#include "tokens/cpu/best_destination_kernel.h"
#include "tokens/cpu/gather_rows_kernel.h"
#include "tokens/cpu/segment_sum_kernel.h"
#include "tokens/cpu/weight_gradient_kernel.h"
#include "tokens/cuda/assign_matched_tokens.cuh"
#include "tokens/cuda/best_destination.cuh"
#include "tokens/cuda/gather_rows.cuh"
#include "tokens/cuda/group_members.cuh"
#include "tokens/cuda/pair_matched_tokens.cuh"
#include "tokens/cuda/segment_sum.cuh"
#include "tokens/cuda/topk_assignment.cuh"
#include "tokens/cuda/weight_gradient.cuh"

// A race does not depend on the type, and ThreadSanitizer takes its time for every fiber.
#if defined(SIMT_THREAD_SANITIZER) || defined(SIMT_MUTATION)
#define KERNEL_TYPES float
#else
#define KERNEL_TYPES double, float, bfloat16, float16
#endif

namespace torchops::kernels::tokens {
namespace {

// Bytes as vectors can be compared and hold; a bool of std::vector has no address.
using Mask = std::vector<uint8_t>;

const bool* data_or_null(const Mask& mask) {
  return mask.empty() ? nullptr : reinterpret_cast<const bool*>(mask.data());
}

template <typename T>
Rows<const T> rows_of(const std::vector<T>& tensor, int64_t num_rows, int64_t num_channels) {
  return {tensor.data(), num_rows * num_channels, num_channels};
}

template <typename T>
std::vector<accumulate_t<T>> weights(int64_t count, uint32_t seed) {
  const auto numbers = simt::whole_numbers(static_cast<size_t>(count), seed);
  // Zeros and negative ones among them.
  return {numbers.begin(), numbers.end()};
}

// A batch with an assignment of values out of range as well, which a release build takes for -1.
struct Assigned {
  int64_t batch, num_tokens, num_groups, num_channels;
  std::vector<int64_t> given;    // with values out of range
  std::vector<int64_t> meant;    // without
  std::vector<int64_t> offsets;  // [B, M + 1]
  std::vector<int64_t> members;  // [B, N], -1 behind the last

  Assigned(int64_t batch, int64_t num_tokens, int64_t num_groups, int64_t num_channels)
      : batch(batch), num_tokens(num_tokens), num_groups(num_groups), num_channels(num_channels) {
    const auto random = simt::whole_numbers(static_cast<size_t>(batch * num_tokens), 5);
    for (const float number : random) {
      const auto value = static_cast<int64_t>(number);
      given.push_back(value == 8    ? num_groups
                      : value == -8 ? int64_t{1} << 40
                      : value == -7 ? -5
                                    : (value + 7) % (num_groups + 1) - 1);
      meant.push_back(0 <= given.back() && given.back() < num_groups ? given.back() : -1);
    }
    members.assign(meant.size(), -1);
    for (int64_t b = 0; b < batch; ++b) {
      int64_t next = 0;
      for (int64_t m = 0; m < num_groups; ++m) {
        offsets.push_back(next);
        for (int64_t i = 0; i < num_tokens; ++i) {
          if (meant[b * num_tokens + i] == m) {
            members[b * num_tokens + next++] = i;
          }
        }
      }
      offsets.push_back(next);
    }
  }
};

const std::vector<Assigned> assigned_batches = {
#if !defined(SIMT_THREAD_SANITIZER)
    {1, 600, 2, 8}, {1, 300, 290, 3},
#endif
    {2, 11, 3, 16}, {1, 70, 9, 5},    {2, 5, 12, 24}, {1, 1, 1, 1}};

}  // namespace

TEST_CASE("group_members sorts tokens by group and keeps their order") {
  const simt::ReleaseBuild release_build;
  auto batches = assigned_batches;
  batches.push_back({1, 300, 3, 1});  // a warp takes more than one round
  for (const auto& batch : batches) {
    CAPTURE(batch.num_tokens, batch.num_groups);
    // Behind the last member nothing is written.
    const auto both = simt::same_in_every_order([&] {
      std::vector<int64_t> result(batch.offsets.size() + batch.members.size(), -1);
      std::vector<int32_t> counts(static_cast<size_t>(batch.batch * group_members_warps * batch.num_groups), 77);
      device::launch(
          {batch.batch, group_members_warps * device::warp_size, device::shared_size<int32_t>(device::max_warps)},
          group_members,
          GroupMembers{batch.given.data(), result.data(), result.data() + batch.offsets.size(), counts.data(),
                       batch.num_tokens, batch.num_groups});
      return result;
    });
    auto expected = batch.offsets;
    expected.insert(expected.end(), batch.members.begin(), batch.members.end());
    CHECK(both == expected);
  }
}

TEMPLATE_TEST_CASE("segment_sum", "", KERNEL_TYPES) {
  using A = accumulate_t<TestType>;
  for (const auto& batch : assigned_batches) {
    const auto input = simt::narrowed<TestType>(
        simt::whole_numbers(static_cast<size_t>(batch.batch * batch.num_tokens * batch.num_channels), 1));
    const auto weight = weights<TestType>(batch.batch * batch.num_tokens, 2);
    const int64_t units = batch.batch * batch.num_groups;
    for (const bool weighted : {false, true}) {
      for (const bool normalize : {false, true}) {
        CAPTURE(batch.num_tokens, batch.num_groups, weighted, normalize);
        SegmentSum<TestType> args{rows_of(input, batch.num_tokens, batch.num_channels),
                                  weighted ? weight.data() : nullptr,
                                  batch.offsets.data(),
                                  batch.members.data(),
                                  nullptr,
                                  nullptr,
                                  batch.num_tokens,
                                  batch.num_groups,
                                  batch.num_channels,
                                  normalize};
        std::vector<TestType> expected(static_cast<size_t>(units * batch.num_channels));
        std::vector<A> expected_total(static_cast<size_t>(units));
        args.output = expected.data();
        args.total = expected_total.data();
        baseline::segment_sum(args, 0, units);

        std::vector<A> total(expected_total.size());
        const auto run = [&](auto width) {
          return simt::widened(simt::same_in_every_order([&] {
            std::vector<TestType> output(expected.size());
            args.output = output.data();
            args.total = total.data();
            device::launch({units, 32}, segment_sum<decltype(width)::value, TestType>, args);
            return output;
          }));
        };
        CHECK(run(std::integral_constant<int, 1>{}) == simt::widened(expected));
        CHECK(total == expected_total);
        if (batch.num_channels % device::widest<TestType> == 0) {
          CHECK(run(std::integral_constant<int, device::widest<TestType>>{}) == simt::widened(expected));
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("gather_rows", "", KERNEL_TYPES) {
  const simt::ReleaseBuild release_build;
  for (const auto& batch : assigned_batches) {
    const int64_t units = batch.batch * batch.num_tokens;
    const auto source = simt::narrowed<TestType>(
        simt::whole_numbers(static_cast<size_t>(batch.batch * batch.num_groups * batch.num_channels), 1));
    const auto residual =
        simt::narrowed<TestType>(simt::whole_numbers(static_cast<size_t>(units * batch.num_channels), 2));
    const auto weight = weights<TestType>(units, 3);
    const auto total = weights<TestType>(batch.batch * batch.num_groups, 4);
    for (const bool with_residual : {false, true}) {
      for (const bool scaled : {false, true}) {
        CAPTURE(batch.num_tokens, batch.num_groups, with_residual, scaled);
        GatherRows<TestType> args{rows_of(source, batch.num_groups, batch.num_channels),
                                  batch.meant.data(),
                                  scaled ? weight.data() : nullptr,
                                  scaled ? total.data() : nullptr,
                                  {},
                                  nullptr,
                                  batch.num_tokens,
                                  batch.num_groups,
                                  batch.num_channels};
        if (with_residual) {
          args.residual = rows_of(residual, batch.num_tokens, batch.num_channels);
        }
        std::vector<TestType> expected(residual.size());
        args.output = expected.data();
        baseline::gather_rows(args, 0, units);

        args.assign = batch.given.data();
        const auto run = [&](auto width) {
          return simt::widened(simt::same_in_every_order([&] {
            std::vector<TestType> output(expected.size());
            args.output = output.data();
            device::launch({units, 32}, gather_rows<decltype(width)::value, TestType>, args);
            return output;
          }));
        };
        CHECK(run(std::integral_constant<int, 1>{}) == simt::widened(expected));
        if (batch.num_channels % device::widest<TestType> == 0) {
          CHECK(run(std::integral_constant<int, device::widest<TestType>>{}) == simt::widened(expected));
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("weight_gradient", "", KERNEL_TYPES) {
  using A = accumulate_t<TestType>;
  for (const auto& batch : assigned_batches) {
    const int64_t units = batch.batch * batch.num_groups;
    const auto rows = [&](int64_t count, uint32_t seed) {
      return simt::narrowed<TestType>(
          simt::whole_numbers(static_cast<size_t>(batch.batch * count * batch.num_channels), seed));
    };
    const auto input = rows(batch.num_tokens, 1), grad = rows(batch.num_groups, 3);
    const auto grad_total = weights<TestType>(units, 4);
    const auto weight = weights<TestType>(batch.batch * batch.num_tokens, 2);
    const auto total = weights<TestType>(units, 5);
    for (const bool normalize : {false, true}) {
      for (const bool of_rows : {true, false}) {
        if (normalize && !of_rows) {
          continue;  // nothing to normalise
        }
        CAPTURE(batch.num_tokens, batch.num_groups, normalize, of_rows);
        WeightGradient<TestType> args{rows_of(input, batch.num_tokens, batch.num_channels),
                                      rows_of(grad, batch.num_groups, batch.num_channels),
                                      normalize ? nullptr : grad_total.data(),
                                      normalize ? weight.data() : nullptr,
                                      normalize ? total.data() : nullptr,
                                      batch.offsets.data(),
                                      batch.members.data(),
                                      nullptr,
                                      batch.num_tokens,
                                      batch.num_groups,
                                      of_rows ? batch.num_channels : 0};
        // Dropped tokens stay as they are.
        std::vector<A> expected(batch.members.size(), A(77));
        args.grad_weight = expected.data();
        baseline::weight_gradient(args, 0, units);
        const auto actual = simt::same_in_every_order([&] {
          std::vector<A> output(expected.size(), A(77));
          args.grad_weight = output.data();
          device::launch({units, weight_gradient_threads}, weight_gradient<TestType>, args);
          return output;
        });
        CHECK(actual == expected);
      }
    }
  }
}

TEST_CASE("an assignment out of range stops a debug build of every kernel that reads one") {
  const std::vector<float> numbers(4);
  const auto row = rows_of(numbers, 1, 4);
  std::vector<float> output(4);
  std::vector<int64_t> offsets(2), members(1);
  std::vector<int32_t> counts(group_members_warps);
  const auto line = Catch::Matchers::Contains("assigned_group.cuh:");
  const auto reason = Catch::Matchers::Contains("assertion: an assignment is in -1..num_groups-1");
  for (const int64_t value : {int64_t{-2}, int64_t{1}, int64_t{1} << 40}) {
    const GroupMembers grouped{&value, offsets.data(), members.data(), counts.data(), 1, 1};
    CHECK_THROWS_WITH(
        device::launch({1, group_members_warps * device::warp_size, device::shared_size<int32_t>(device::max_warps)},
                       group_members, grouped),
        line && reason);
    const GatherRows<float> gathered{row, &value, nullptr, nullptr, {}, output.data(), 1, 1, 4};
    CHECK_THROWS_WITH(device::launch({1, 32}, gather_rows<1, float>, gathered), line && reason);
  }
}

namespace {

// What the best_destination kernels of both devices find.
struct Matches {
  std::vector<int32_t> similarity;
  std::vector<int64_t> destination;
};

template <typename T>
struct Metric {
  int64_t batch, num_tokens, num_features, num_protected;
  std::vector<T> metric;
  Mask padding;

  BestDestination<T> args(Matches& matches) const {
    BestDestination<T> result{rows_of(metric, num_tokens, num_features),
                              data_or_null(padding),
                              nullptr,
                              nullptr,
                              num_tokens,
                              num_features,
                              num_protected,
                              num_sources(num_tokens, num_protected)};
    matches.similarity.resize(static_cast<size_t>(batch * result.num_sources));
    matches.destination.resize(matches.similarity.size());
    result.similarity = matches.similarity.data();
    result.destination = matches.destination.data();
    return result;
  }

  Matches on_cpu() const {
    Matches matches;
    const auto launch = args(matches);
    const auto columns = static_cast<size_t>(best_destination_columns(num_tokens));
    AlignedBuffer<int16_t> integers(2 * columns * static_cast<size_t>(integer_pairs(num_features)));
    AlignedBuffer<float> inverse_lengths(columns);
    std::vector<int64_t> positions(static_cast<size_t>(num_tokens));
    baseline::best_destination(launch, 0, batch * launch.blocks_per_row(), integers.data(), inverse_lengths.data(),
                               positions.data());
    return matches;
  }

  Matches on_cuda() const {
    Matches matches;
    simt::same_in_every_order([&] {
      const auto launch = args(matches);
      device::launch(
          {batch * ((launch.num_sources + match_tile - 1) / match_tile), match_threads, match_shared_bytes<T>},
          best_destination<T>, launch);
      auto both = matches.destination;
      both.insert(both.end(), matches.similarity.begin(), matches.similarity.end());
      return both;
    });
    return matches;
  }
};

// Signs, of which many tie, and with an odd number of features numbers that are alike: similarities have the same bits
// on both devices whatever the numbers.
template <typename T>
std::vector<Metric<T>> metrics() {
  std::vector<Metric<T>> result;
  for (const auto& [batch, tokens, features, num_protected] : {std::array<int64_t, 4>{2, 12, 4, 0},
                                                               {1, 150, 16, 1},
                                                               {2, 9, 16, 2},
                                                               {1, 7, 64, 3},
                                                               {1, 2, 4, 0},
                                                               {1, 40, 35, 1}}) {
    auto numbers = simt::whole_numbers(static_cast<size_t>(batch * tokens * features), 1);
    for (size_t i = 0; i < numbers.size(); ++i) {
      const auto feature = static_cast<float>(i % static_cast<size_t>(features));
      numbers[i] = features % 2 == 0 ? (numbers[i] < 0 ? -1.0F : 1.0F) : 0.3F * feature - 4 + 0.017F * numbers[i];
    }
    // A row of zeros, one with a NaN, and one whose squares overflow.
    std::fill_n(numbers.begin(), features, 0.0F);
    if (tokens > 6) {
      numbers[3 * features] = NAN;
      const float huge = std::is_same_v<T, float16> ? 3e4F : 2e38F;
      for (int64_t k = 0; k < features; ++k) {
        numbers[5 * features + k] *= huge;
      }
    }
    result.push_back({batch, tokens, features, num_protected, simt::narrowed<T>(numbers), {}});
    // Some padding, and so much that some of it has to be dropped.
    for (const bool most : {false, true}) {
      Mask padding(static_cast<size_t>(batch * tokens));
      for (int64_t i = 0; i < batch * tokens; ++i) {
        padding[i] = i % tokens >= num_protected && (most ? i % 5 != 0 : i % 3 == 1);
      }
      result.push_back({batch, tokens, features, num_protected, simt::narrowed<T>(numbers), padding});
    }
  }
  return result;
}

}  // namespace

TEMPLATE_TEST_CASE("best_destination", "", KERNEL_TYPES) {
  for (const auto& metric : metrics<TestType>()) {
    CAPTURE(metric.num_tokens, metric.num_features, metric.num_protected, metric.padding.empty());
    const auto expected = metric.on_cpu(), actual = metric.on_cuda();
    CHECK(actual.destination == expected.destination);
    for (size_t s = 0; s < expected.destination.size(); ++s) {
      // Where nothing is found there is no similarity to speak of.
      CHECK((expected.destination[s] < 0 || actual.similarity[s] == expected.similarity[s]));
    }
  }
}

TEST_CASE("pair_matched_tokens and assign_matched_tokens follow the ranks") {
  for (const auto& metric : metrics<float>()) {
    const int64_t first = first_source(metric.num_protected);
    const int64_t most = (metric.num_tokens - metric.num_protected) / 2;
    auto matches = metric.on_cpu();
    const int64_t sources = num_sources(metric.num_tokens, metric.num_protected);
    for (const int64_t removed : {int64_t{0}, int64_t{1}, most / 2, most}) {
      CAPTURE(metric.num_tokens, metric.num_protected, removed, metric.padding.empty());
      // Where nothing is removed no similarity is read.
      const MatchedTokens args{removed == 0 ? nullptr : matches.similarity.data(),
                               removed == 0 ? nullptr : matches.destination.data(),
                               data_or_null(metric.padding),
                               metric.num_tokens,
                               sources,
                               first,
                               removed};
      std::vector<int64_t> pairs;
      std::vector<int64_t> assignment;
      for (int64_t b = 0; b < metric.batch; ++b) {
        std::vector<int64_t> order;
        for (int64_t s = 0; s < sources; ++s) {
          if (matches.destination[b * sources + s] >= 0) {
            order.push_back(s);
          }
        }
        std::stable_sort(order.begin(), order.end(), [&](int64_t one, int64_t other) {
          return matches.similarity[b * sources + one] > matches.similarity[b * sources + other];
        });
        order.resize(static_cast<size_t>(std::min<int64_t>(removed, static_cast<int64_t>(order.size()))));
        std::vector<std::pair<int64_t, int64_t>> row;
        for (const int64_t s : order) {
          row.emplace_back(first + 2 * s, matches.destination[b * sources + s]);
        }
        for (int64_t i = metric.num_tokens; i-- > 0 && static_cast<int64_t>(row.size()) < removed;) {
          if (metric.padding[b * metric.num_tokens + i]) {
            row.emplace_back(i, -1);
          }
        }
        std::vector<int64_t> groups(static_cast<size_t>(metric.num_tokens), 0);
        for (const auto& [source, destination] : row) {
          pairs.push_back(source);
          pairs.push_back(destination);
          groups[source] = -1;
        }
        int64_t next = 0;
        for (int64_t& group : groups) {
          group = group == 0 ? next++ : group;
        }
        for (const auto& [source, destination] : row) {
          groups[source] = destination < 0 ? -1 : groups[destination];
        }
        assignment.insert(assignment.end(), groups.begin(), groups.end());
      }

      const auto assigned = simt::same_in_every_order([&] {
        std::vector<int64_t> result(assignment.size());
        device::launch({metric.batch, matched_tokens_threads, device::BlockMemory::bytes}, assign_matched_tokens, args,
                       result.data());
        return result;
      });
      CHECK(assigned == assignment);

      const auto paired = simt::same_in_every_order([&] {
        const auto count = static_cast<size_t>(metric.batch * removed);
        std::vector<int64_t> unordered(count), merged(count), into(count), result;
        device::launch({metric.batch, matched_tokens_threads, device::BlockMemory::bytes}, pair_matched_tokens, args,
                       unordered.data(), merged.data(), into.data());
        for (size_t i = 0; i < count; ++i) {
          result.push_back(merged[i]);
          result.push_back(into[i]);
        }
        return result;
      });
      CHECK(paired == pairs);
    }
  }
}

TEMPLATE_TEST_CASE("topk_assignment", "", KERNEL_TYPES) {
  for (const auto& [batch, tokens, num_protected] :
       {std::array<int64_t, 3>{2, 20, 1}, {1, 600, 0}, {2, 5, 5}, {1, 1, 0}}) {
    auto numbers = simt::whole_numbers(static_cast<size_t>(batch * tokens), 3);
    for (size_t i = 0; i < numbers.size(); i += 7) {
      numbers[i] = i % 2 == 0 ? NAN : i % 3 == 0 ? INFINITY : -INFINITY;
    }
    std::replace(numbers.begin(), numbers.end(), 3.0F, -0.0F);
    const auto scores = simt::narrowed<TestType>(numbers);
    for (const bool padded : {false, true}) {
      Mask padding(padded ? numbers.size() : 0);
      for (size_t i = 0; i < padding.size(); ++i) {
        padding[i] = static_cast<int64_t>(i) % tokens >= num_protected && i % 4 == 2;
      }
      for (const int64_t kept : {int64_t{0}, (tokens - num_protected) / 3, tokens - num_protected}) {
        for (const bool fuse : {false, true}) {
          CAPTURE(tokens, num_protected, padded, kept, fuse);
          std::vector<int64_t> expected;
          for (int64_t b = 0; b < batch; ++b) {
            const auto is_padding = [&](int64_t i) { return padded && padding[b * tokens + i] != 0; };
            const auto score = [&](int64_t i) { return numbers[b * tokens + i]; };
            std::vector<int64_t> order;
            for (int64_t i = num_protected; i < tokens; ++i) {
              order.push_back(i);
            }
            std::stable_sort(order.begin(), order.end(), [&](int64_t one, int64_t other) {
              const auto tier = [&](int64_t i) { return is_padding(i) ? 2 : std::isnan(score(i)) ? 1 : 0; };
              return tier(one) != tier(other) ? tier(one) < tier(other) : tier(one) == 0 && score(one) > score(other);
            });
            std::sort(order.begin(), order.begin() + kept);
            for (int64_t i = 0; i < tokens; ++i) {
              const auto found = std::find(order.begin(), order.begin() + kept, i);
              const int64_t rest = fuse && !is_padding(i) ? num_protected + kept : -1;
              expected.push_back(i < num_protected               ? i
                                 : found == order.begin() + kept ? rest
                                                                 : num_protected + (found - order.begin()));
            }
          }
          const auto actual = simt::same_in_every_order([&] {
            std::vector<int64_t> result(expected.size());
            device::launch({batch, topk_threads, device::BlockMemory::bytes}, topk_assignment<TestType>,
                           TopkAssignment<TestType>{scores.data(), data_or_null(padding), result.data(), tokens,
                                                    num_protected, kept, fuse});
            return result;
          });
          CHECK(actual == expected);
        }
      }
    }
  }
}

}  // namespace torchops::kernels::tokens
