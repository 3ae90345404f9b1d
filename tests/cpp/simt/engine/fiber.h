#pragma once

#include <boost/context/fiber.hpp>

#include <cstddef>

namespace torchops::simt {

// One thread of the device: a function with a stack of its own, that runs until it suspends itself.
// The sanitizers are told of every switch.
class Fiber {
 public:
  static constexpr int max_fibers = 1024;

  // Call before the fibers of a block are started.
  static void prepare_stacks(int count);

  void start(int number, const char* name, void (*body)());
  // Called outside the fiber: runs it until it suspends or its body ends.
  void resume();
  // Called in the fiber.
  void suspend();

 private:
  void leave(bool for_ever);
  void arrived();

  boost::context::fiber inside_;   // the fiber, while it does not run
  boost::context::fiber outside_;  // who resumed it, while it does
  void (*body_)() = nullptr;
  bool ended_ = false;
  [[maybe_unused]] void* stack_ = nullptr;
  [[maybe_unused]] void* sanitizer_inside_ = nullptr;
  [[maybe_unused]] void* sanitizer_outside_ = nullptr;
  [[maybe_unused]] const void* outside_stack_ = nullptr;
  [[maybe_unused]] size_t outside_stack_size_ = 0;
};

}  // namespace torchops::simt
