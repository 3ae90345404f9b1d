#pragma once

#include "core/scalar.h"

// What a .cu file compiles its launches for, inside of the kernels' namespace.
#define TORCHOPS_FOR_EACH_DTYPE(macro) macro(double) macro(float) macro(bfloat16) macro(float16)
