#pragma once

// The instructions that kernel files name. The include path decides what they are: the compiler's here, plain C++ for
// tests of a level that the CPU at hand does not have.

#if defined(__SSE2__)
#include <immintrin.h>
#endif
