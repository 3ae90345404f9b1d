#include "engine/fiber.h"

#include <sys/mman.h>

#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(SIMT_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#endif

namespace torchops::simt {
namespace {

constexpr size_t page = 4096;
constexpr size_t stack_bytes = 64 * page;
constexpr size_t stride = page + stack_bytes;  // a guard page below each stack

char* stacks = nullptr;
int stack_count = 0;

void map_stacks(int count) {
  void* memory =
      mmap(nullptr, count * stride, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::bad_alloc();
  }
  stacks = static_cast<char*>(memory);
  stack_count = count;
  for (int number = 0; number < count; ++number) {
    mprotect(stacks + number * stride + page, stack_bytes, PROT_READ | PROT_WRITE);
  }
}

// Boost.Context's idea of an allocator; the stacks belong to `stacks`.
struct Stack {
  char* bottom;
  boost::context::stack_context allocate() {
    boost::context::stack_context context;
    context.size = stack_bytes;
    context.sp = bottom + stack_bytes;
    return context;
  }
  void deallocate(boost::context::stack_context&) {}
};

}  // namespace

void Fiber::prepare_stacks(int count) {
#if defined(SIMT_THREAD_SANITIZER)
  // Threads of different blocks are not ordered, so one block's stacks would look like a race with
  // those of the block before it, at the same addresses. Fresh mappings have no past.
  if (stacks != nullptr) {
    munmap(stacks, stack_count * stride);
  }
  map_stacks(count);
#else
  if (stacks == nullptr) {
    map_stacks(max_fibers);
  }
  static_cast<void>(count);
#endif
}

void Fiber::start(int number, [[maybe_unused]] const char* name, void (*body)()) {
  stack_ = stacks + number * stride + page;
  body_ = body;
  ended_ = false;
#if defined(__SANITIZE_ADDRESS__)
  // The last frames of the stack's former owner were left and not returned from.
  __asan_unpoison_memory_region(stack_, stack_bytes);
  sanitizer_inside_ = nullptr;
#elif defined(SIMT_THREAD_SANITIZER)
  sanitizer_inside_ = __tsan_create_fiber(0);
  __tsan_set_fiber_name(sanitizer_inside_, name);
#endif
  inside_ = boost::context::fiber(std::allocator_arg, Stack{static_cast<char*>(stack_)},
                                  [this](boost::context::fiber&& outside) {
                                    outside_ = std::move(outside);
                                    arrived();
                                    body_();
                                    ended_ = true;
                                    leave(true);
                                    return std::move(outside_);
                                  });
}

void Fiber::resume() {
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, stack_, stack_bytes);
#elif defined(SIMT_THREAD_SANITIZER)
  sanitizer_outside_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(sanitizer_inside_, __tsan_switch_to_fiber_no_sync);
#endif
  inside_ = std::move(inside_).resume();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#elif defined(SIMT_THREAD_SANITIZER)
  if (ended_) {
    __tsan_destroy_fiber(sanitizer_inside_);
  }
#endif
}

void Fiber::suspend() {
  leave(false);
  outside_ = std::move(outside_).resume();
  arrived();
}

void Fiber::leave([[maybe_unused]] bool for_ever) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &sanitizer_inside_, outside_stack_, outside_stack_size_);
#elif defined(SIMT_THREAD_SANITIZER)
  __tsan_switch_to_fiber(sanitizer_outside_, __tsan_switch_to_fiber_no_sync);
#endif
}

void Fiber::arrived() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(sanitizer_inside_, &outside_stack_, &outside_stack_size_);
#endif
}

}  // namespace torchops::simt

// What the sanitizers of a program are set to; the environment can still change it.
#define SIMT_EXPORTED extern "C" __attribute__((visibility("default")))
#if defined(__SANITIZE_ADDRESS__)
// A kernel allocates nothing, and looking for leaks needs rights that containers withhold.
SIMT_EXPORTED const char* __asan_default_options() {
  return "detect_leaks=0";
}
SIMT_EXPORTED const char* __ubsan_default_options() {
  return "halt_on_error=1:print_stacktrace=1";
}
#elif defined(SIMT_THREAD_SANITIZER)
SIMT_EXPORTED const char* __tsan_default_options() {
  return "halt_on_error=1";
}
#endif
