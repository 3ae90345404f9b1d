#include "engine/scheduler.h"

#include <bit>
#include <cstdio>
#include <cstring>
#include <exception>
#include <numeric>
#include <utility>

#include "engine/async_copies.h"
#include "engine/fiber.h"
#include "engine/race_checker.h"
#include "engine/shared_arrays.h"

// Plain arrays and no containers: an inline function that an instrumented file emits as well might be
// the one the linker keeps.

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace torchops::simt {
namespace {

constexpr int max_threads = Fiber::max_fibers;
constexpr int max_warps = max_threads / warp_size;

enum class State { ready, waiting, returned };

struct Thread {
  Fiber fiber;
  State state;
  const char* operation;  // that it waits for
  Site where;
};

// Threads on their way into one operation.
struct Meeting {
  int arrived;
  const char* operation;  // the rest is of the first who arrived
  uint32_t mask;
  Site where;
  // A thread that is through may reach the next meeting before another one has left this one. Two
  // addresses in turn keep what it did in between out of the other's past.
  bool odd;
  char order[2];
};

Schedule schedule;
uint32_t random_state;

const Launch* launch = nullptr;
int64_t launches = 0;
bool debug_build = true;
char launch_end;  // for the race checker
std::exception_ptr failure;
bool abandoning;  // the threads that are left unwind

// The block that runs.
int num_threads;
Thread threads[max_threads];
int current;
int unfinished;
uint32_t ready[max_warps];  // a bit for each lane
Meeting block_meeting;
int holds;                                    // threads in block_meeting whose predicate holds
int held;                                     // the same, of the meeting that ended
Meeting warp_meetings[max_warps][warp_size];  // by the lowest lane of the mask
Words words_of_lane[max_warps][warp_size];

struct Abandoned {};

uint32_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  random_state ^= random_state << 5;
  return random_state;
}

// ---- reports ----------------------------------------------------------------------------------

std::string text(Site where) {
  const char* slash = std::strrchr(where.file_name(), '/');
  return std::string(slash ? slash + 1 : where.file_name()) + ":" + std::to_string(where.line());
}

std::string text(const uint3& index) {
  return "[" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + "]";
}

std::string doing(const Thread& thread) {
  if (thread.state == State::returned) {
    return "returned";
  }
  return std::string("in ") + thread.operation + " at " + text(thread.where);
}

// What the threads do that wait for each other: "threads 0-31 in syncthreads at x.cuh:12, ...".
std::string stuck_threads() {
  std::string all;
  for (int first = 0, end = 0; first < num_threads; first = end) {
    const std::string what = doing(threads[first]);
    while (end < num_threads && doing(threads[end]) == what) {
      ++end;
    }
    all += (first ? ", threads " : "threads ") + std::to_string(first) + "-" + std::to_string(end - 1) + " " + what;
  }
  return all;
}

bool same(const char* a, const char* b) {
  return a == b || std::strcmp(a, b) == 0;
}

bool same(Site a, Site b) {
  return a.line() == b.line() && a.column() == b.column() && same(a.file_name(), b.file_name());
}

// ---- waiting ----------------------------------------------------------------------------------

void set_ready(int thread) {
  threads[thread].state = State::ready;
  ready[thread / warp_size] |= 1U << thread % warp_size;
}

void suspend() {
  threads[current].fiber.suspend();
  if (abandoning) {
    throw Abandoned();
  }
}

void wait(const char* operation, Site where) {
  Thread& thread = threads[current];
  thread.state = State::waiting;
  thread.operation = operation;
  thread.where = where;
  suspend();
}

// True for the last one that is expected.
bool join(Meeting& meeting, const char* operation, uint32_t mask, int expected, Site where) {
  if (meeting.arrived == 0) {
    meeting.operation = operation;
    meeting.mask = mask;
    meeting.where = where;
  } else if (!same(operation, meeting.operation) || mask != meeting.mask || !same(where, meeting.where)) {
    char masks[64] = "";
    if (mask != meeting.mask) {
      std::snprintf(masks, sizeof(masks), " (masks %08x and %08x)", mask, meeting.mask);
    }
    fail(std::string("divergence: this thread is in ") + operation + " while others wait in " + meeting.operation +
             " at " + text(meeting.where) + masks,
         where);
  }
  return ++meeting.arrived == expected;
}

void close(Meeting& meeting) {
  meeting.arrived = 0;
  meeting.odd = !meeting.odd;
}

uint32_t checked_mask(const char* operation, uint32_t mask, Site where) {
  if ((mask >> current_lane() & 1) == 0) {
    fail(std::string(operation) + ": the mask leaves out the calling lane", where);
  }
  return mask;
}

template <typename Last>
void meet_lanes(const char* operation, uint32_t mask, Site where, bool orders_memory, const Last& last) {
  const int warp = current / warp_size;
  Meeting& meeting = warp_meetings[warp][std::countr_zero(checked_mask(operation, mask, where))];
  char* order = &meeting.order[meeting.odd];
  if (orders_memory) {
    race_checker::release(order);
  }
  if (join(meeting, operation, mask, std::popcount(mask), where)) {
    last(words_of_lane[warp]);
    close(meeting);
    for (int lane = 0; lane < warp_size; ++lane) {
      if (mask >> lane & 1 && warp * warp_size + lane != current) {
        set_ready(warp * warp_size + lane);
      }
    }
  } else {
    wait(operation, where);
  }
  if (orders_memory) {
    race_checker::acquire(order);
  }
}

// ---- running ----------------------------------------------------------------------------------

// The thread to go on, or -1.
int next_thread() {
  const int num_warps = num_threads / warp_size;
  const bool random = schedule.order == Order::random;
  const bool reverse = schedule.order == Order::reverse;
  const int first_warp = random ? static_cast<int>(random_bits() % static_cast<uint32_t>(num_warps)) : 0;
  for (int i = 0; i < num_warps; ++i) {
    const int warp = reverse ? num_warps - 1 - i : (first_warp + i) % num_warps;
    const uint32_t lanes = ready[warp];
    if (lanes) {
      const int turn = random ? static_cast<int>(random_bits() % warp_size) : 0;
      const int lane = reverse ? 31 - std::countl_zero(lanes) : std::countr_zero(std::rotr(lanes, turn)) + turn;
      return warp * warp_size + lane % warp_size;
    }
  }
  return -1;
}

void thread_body() {
  if (!abandoning) {
    try {
      launch->thread(launch->argument);
    } catch (const Abandoned&) {
    } catch (...) {
      failure = std::current_exception();
    }
  }
  race_checker::release(&launch_end);
  threads[current].state = State::returned;
  --unfinished;
}

void resume(int thread) {
  current = thread;
  const unsigned number = static_cast<unsigned>(thread);
  threadIdx = {number % blockDim.x, number / blockDim.x % blockDim.y, number / (blockDim.x * blockDim.y)};
  ready[thread / warp_size] &= ~(1U << thread % warp_size);
  threads[thread].fiber.resume();
}

void abandon_threads() {
  abandoning = true;
  for (int thread = 0; thread < num_threads; ++thread) {
    if (threads[thread].state != State::returned) {
      resume(thread);
    }
  }
  abandoning = false;
}

void run_block() {
  unfinished = num_threads;
  block_meeting.arrived = 0;
  holds = 0;
  for (int thread = 0; thread < num_threads; ++thread) {
    warp_meetings[thread / warp_size][thread % warp_size].arrived = 0;
  }
  allow_shared_bytes(launch->shared_bytes);
  Fiber::prepare_stacks(num_threads);
  for (int thread = 0; thread < num_threads; ++thread) {
    char name[64];
    std::snprintf(name, sizeof(name), "block [%u, %u, %u] thread %d", blockIdx.x, blockIdx.y, blockIdx.z, thread);
    threads[thread].fiber.start(thread, name, thread_body);
    set_ready(thread);
    forget_copies(thread);
  }
  while (unfinished > 0 && !failure) {
    const int thread = next_thread();
    if (thread < 0) {
      failure = std::make_exception_ptr(
          Error("deadlock in block " + text(blockIdx) + ": the threads wait for each other: " + stuck_threads()));
      break;
    }
    resume(thread);
  }
  abandon_threads();
  free_shared_arrays();
}

}  // namespace

void use_schedule(Schedule to_use) {
  schedule = to_use;
}

void run(const Launch& to_run) {
  launch = &to_run;
  ++launches;
  gridDim = to_run.grid;
  blockDim = to_run.block;
  const unsigned threads_per_block = blockDim.x * blockDim.y * blockDim.z;
  if (threads_per_block == 0 || threads_per_block > max_threads || threads_per_block % warp_size != 0) {
    throw Error("launch: expected a block of a multiple of 32 threads, at most 1024, got " +
                std::to_string(threads_per_block));
  }
  num_threads = static_cast<int>(threads_per_block);
  random_state = (schedule.seed + 1) * 2654435761U;
  const uint64_t num_blocks = static_cast<uint64_t>(gridDim.x) * gridDim.y * gridDim.z;
  // A stride that has no divisor in common with num_blocks visits every block once.
  uint64_t stride = 1;
  uint64_t block = 0;
  if (schedule.order == Order::reverse) {
    stride = block = num_blocks - 1;
  } else if (schedule.order == Order::random) {
    block = random_bits() % num_blocks;
    do {
      stride = random_bits() % num_blocks;
    } while (std::gcd(stride, num_blocks) != 1);
  }
  for (uint64_t i = 0; i < num_blocks && !failure; ++i, block = (block + stride) % num_blocks) {
    blockIdx = {static_cast<unsigned>(block % gridDim.x), static_cast<unsigned>(block / gridDim.x % gridDim.y),
                static_cast<unsigned>(block / gridDim.x / gridDim.y)};
    run_block();
  }
  race_checker::acquire(&launch_end);
  if (failure) {
    std::rethrow_exception(std::exchange(failure, nullptr));
  }
}

int64_t num_launches() {
  return launches;
}

ReleaseBuild::ReleaseBuild() {
  debug_build = false;
}
ReleaseBuild::~ReleaseBuild() {
  debug_build = true;
}
bool is_debug_build() {
  return debug_build;
}

int current_thread() {
  return current;
}

void fail(const std::string& what, Site where) {
  throw Error(text(where) + ": " + what + " (block " + text(blockIdx) + ", thread " + std::to_string(current) + ")");
}

bool coin() {
  return random_bits() >> 16 & 1;
}

void sometimes_yield() {
  if (coin()) {
    set_ready(current);
    suspend();
  }
}

int meet_block(const char* operation, bool predicate, Site where) {
  char* order = &block_meeting.order[block_meeting.odd];
  race_checker::release(order);
  holds += predicate;
  if (join(block_meeting, operation, 0, num_threads, where)) {
    close(block_meeting);
    held = std::exchange(holds, 0);
    for (int thread = 0; thread < num_threads; ++thread) {
      if (thread != current) {
        set_ready(thread);
      }
    }
  } else {
    wait(operation, where);
  }
  race_checker::acquire(order);
  return held;
}

void exchange(const char* operation, uint32_t mask, uint32_t* words, int count, Combine combine, Site where) {
  uint32_t* slot = words_of_lane[current / warp_size][current_lane()];
  for (int i = 0; i < count; ++i) {
    slot[i] = words[i];
  }
  meet_lanes(operation, mask, where, false, [&](Words* of_lane) { combine(of_lane, mask); });
  for (int i = 0; i < count; ++i) {
    words[i] = slot[i];
  }
}

void meet_warp(const char* operation, uint32_t mask, Site where) {
  meet_lanes(operation, mask, where, true, [](Words*) {});
}

}  // namespace torchops::simt
