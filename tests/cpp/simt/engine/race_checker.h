#pragma once

// What ThreadSanitizer is told, in programs built with it. The engine itself is compiled without
// -fsanitize=thread: it passes data between threads where the device has no memory order to promise,
// and only these calls create one.

#if defined(SIMT_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char* file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char* file, int line);
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif

namespace torchops::simt::race_checker {

#if defined(SIMT_THREAD_SANITIZER)

// What came before release(at) happened before what comes after acquire(at).
inline void release(void* at) {
  __tsan_release(at);
}
inline void acquire(void* at) {
  __tsan_acquire(at);
}

// malloc, free and memset count as writes of the caller. Within this scope they do not.
struct IgnoreScope {
  IgnoreScope() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~IgnoreScope() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

#else

inline void release(void*) {
}
inline void acquire(void*) {
}
struct IgnoreScope {
  IgnoreScope() {}
};

#endif

}  // namespace torchops::simt::race_checker
