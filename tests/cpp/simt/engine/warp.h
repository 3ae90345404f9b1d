#pragma once

#include "engine/scheduler.h"

// What the lanes of a warp make of what each of them brought to an exchange.

namespace torchops::simt {

// Brought: a source lane and a value in words 1 to `value_words`. Taken away: the source lane's value,
// or all ones (as floating-point numbers: NaN) if that lane does not take part.
template <int value_words>
void gather(Words* of_lane, uint32_t mask);
extern template void gather<1>(Words*, uint32_t);
extern template void gather<2>(Words*, uint32_t);

// Brought: a predicate. Taken away: the predicates of all lanes, a bit each.
void vote(Words* of_lane, uint32_t mask);

// Brought: 16 bytes, a row of a matrix. Taken away: the lane's fragments of `count` 8x8 matrices.
template <int count, bool transposed>
void distribute_matrices(Words* of_lane, uint32_t mask);
extern template void distribute_matrices<2, false>(Words*, uint32_t);
extern template void distribute_matrices<2, true>(Words*, uint32_t);
extern template void distribute_matrices<4, false>(Words*, uint32_t);
extern template void distribute_matrices<4, true>(Words*, uint32_t);

// Brought: the lane's fragments of c (4 words), a (4) and b (2). Taken away: that of c + a b.
void multiply_bfloat16(Words* of_lane, uint32_t mask);
void multiply_float16(Words* of_lane, uint32_t mask);
void multiply_tf32(Words* of_lane, uint32_t mask);

}  // namespace torchops::simt
