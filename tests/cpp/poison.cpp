#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <cstring>

// Preloaded, it fills what a program allocates with 0xff: NaN in every floating dtype, -1 in every integer. A result
// that depends on memory nobody wrote then is wrong in every run. calloc is left alone, and of large memory all but the
// beginning: tests of tensors with more than 2^31 elements count on pages that are never touched.

extern "C" {

void* __libc_malloc(size_t size);
void* __libc_memalign(size_t alignment, size_t size);

}  // extern "C"

namespace {

constexpr size_t most = size_t{256} << 20;

void* poisoned(void* memory, size_t size) {
  return memory == nullptr ? nullptr : std::memset(memory, 0xff, size < most ? size : most);
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void* malloc(size_t size) noexcept {
  return poisoned(__libc_malloc(size), size);
}

__attribute__((visibility("default"))) void* memalign(size_t alignment, size_t size) noexcept {
  return poisoned(__libc_memalign(alignment, size), size);
}

__attribute__((visibility("default"))) void* aligned_alloc(size_t alignment, size_t size) noexcept {
  return memalign(alignment, size);
}

__attribute__((visibility("default"))) int posix_memalign(void** memory, size_t alignment, size_t size) noexcept {
  *memory = memalign(alignment, size);
  return *memory == nullptr ? ENOMEM : 0;
}

}  // extern "C"
