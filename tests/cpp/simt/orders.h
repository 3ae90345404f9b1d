#pragma once

#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "engine/scheduler.h"

namespace torchops::simt {

struct NamedSchedule {
  const char* name;
  Schedule schedule;
};

#if defined(SIMT_THREAD_SANITIZER)
// It finds races in any order, and takes a millisecond for every thread of a grid.
inline constexpr NamedSchedule schedules[] = {{"forward", {Order::forward, 0}}};
#else
inline constexpr NamedSchedule schedules[] = {
    {"forward", {Order::forward, 0}}, {"random 1", {Order::random, 1}}, {"reverse", {Order::reverse, 2}},
    {"random 3", {Order::random, 3}}, {"random 4", {Order::random, 4}}, {"random 5", {Order::random, 5}},
};
#endif

// What compute() returns, a vector that kernels have filled, provided that it has the same bits in every
// order of threads and blocks.
template <typename Compute>
auto same_in_every_order(const Compute& compute) {
  std::invoke_result_t<Compute> first;
  for (const auto& [name, schedule] : schedules) {
    use_schedule(schedule);
    auto result = compute();
    if (&name == &schedules[0].name) {
      first = std::move(result);
    } else if (result.size() != first.size() ||
               (!result.empty() && std::memcmp(result.data(), first.data(), first.size() * sizeof(first[0])) != 0)) {
      throw Error(std::string("the results of the orders ") + schedules[0].name + " and " + name + " differ");
    }
  }
  use_schedule({});
  return first;
}

}  // namespace torchops::simt
