#pragma once

// The C++ API of torchops: one header per family, every operator a function in namespace torchops of
// the same name as in Python. All of them go through torch's dispatcher, so gradients, autocast and
// tracing work as they do from Python.

#include "routed_ffn/routed_ffn.h"
#include "span_attention/span_attention.h"
#include "sparse_attention/sparse_attention.h"
#include "stf/stf.h"
#include "tokens/tokens.h"
