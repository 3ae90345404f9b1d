#include "engine/async_copies.h"

#include "engine/fiber.h"

namespace torchops::simt {
namespace {

constexpr unsigned capacity = 64;

struct Queue {
  AsyncCopy copies[capacity];  // a ring
  unsigned group_of[capacity];
  unsigned first;
  unsigned end;
  unsigned open_group;
};
Queue queues[Fiber::max_fibers];

bool take(Queue& queue, AsyncCopy* copy) {
  *copy = queue.copies[queue.first % capacity];
  ++queue.first;
  return true;
}

}  // namespace

void defer(const AsyncCopy& copy, Site where) {
  Queue& queue = queues[current_thread()];
  if (queue.end - queue.first == capacity) {
    fail("a thread has more asynchronous copies under way than the engine holds", where);
  }
  queue.copies[queue.end % capacity] = copy;
  queue.group_of[queue.end % capacity] = queue.open_group;
  ++queue.end;
}

void close_group() {
  ++queues[current_thread()].open_group;
}

bool take_due(int pending, AsyncCopy* copy) {
  Queue& queue = queues[current_thread()];
  const bool due = queue.first != queue.end &&
                   queue.group_of[queue.first % capacity] + static_cast<unsigned>(pending) < queue.open_group;
  return due && take(queue, copy);
}

bool take_any(AsyncCopy* copy) {
  Queue& queue = queues[current_thread()];
  return queue.first != queue.end && take(queue, copy);
}

void forget_copies(int thread) {
  queues[thread].first = queues[thread].end = queues[thread].open_group = 0;
}

}  // namespace torchops::simt
