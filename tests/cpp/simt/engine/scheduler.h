#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>

#include "engine/language.h"

// Runs a grid: block by block, each thread of a block a fiber. A thread runs until it waits for others,
// then another one that is ready goes on.

namespace torchops::simt {

using Site = std::source_location;  // of a call in a kernel

// A kernel broke a rule of the device; thrown by the launch.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Kernels are executed as in a debug build, where device::debug_assert holds, unless one of these exists.
struct ReleaseBuild {
  ReleaseBuild();
  ~ReleaseBuild();
};
bool is_debug_build();

// ---- launching --------------------------------------------------------------------------------

// Which of the ready threads goes on, and in which order blocks run: the lowest first, the highest
// first, or as the seed says.
enum class Order { forward, reverse, random };
struct Schedule {
  Order order = Order::forward;
  uint32_t seed = 0;
};
void use_schedule(Schedule schedule);  // for the launches to come

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  void (*thread)(const void*);  // what each thread calls with
  const void* argument;
};
void run(const Launch& launch);
int64_t num_launches();  // so far

// ---- for device functions, called in a thread ----------------------------------------------------

inline constexpr int warp_size = 32;
int current_thread();  // its number in the block
inline int current_lane() {
  return current_thread() % warp_size;
}

[[noreturn]] void fail(const std::string& what, Site where);

// Random, and the same in every run with the same schedule.
bool coin();
// Lets other threads run, now and then.
void sometimes_yield();

// Waits until every thread of the block is here; returns in how many the predicate holds.
int meet_block(const char* operation, bool predicate, Site where);

// Waits until every lane of the mask is here. The last one calls combine with what each lane brought,
// one array for each of the 32 lanes, and each lane takes away what is then in its own.
inline constexpr int exchange_words = 12;
using Words = uint32_t[exchange_words];
using Combine = void (*)(Words* of_lane, uint32_t mask);
void exchange(const char* operation, uint32_t mask, uint32_t* words, int count, Combine combine, Site where);

// Waits until every lane of the mask is here, and orders their memory accesses.
void meet_warp(const char* operation, uint32_t mask, Site where);

}  // namespace torchops::simt
