#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "../core/export.h"

// Routed feed-forward layers (SPT), and experts of mixtures: a router chooses for every token which blocks of weights
// compute it. docs/routed_ffn.md has the mathematics.

namespace torchops {

// index int32 or int64 [T, k] -> order int32 [T k], the flat positions of index sorted by block, stable; offsets int32
// [num_blocks + 1]. Entries that name no block come last, behind the last offset.
TORCHOPS_API std::tuple<at::Tensor, at::Tensor> route(const at::Tensor& index, c10::SymInt num_blocks);

}  // namespace torchops
