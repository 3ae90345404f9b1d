#include "engine/warp.h"

#include <bit>

#include "engine/numbers.h"

namespace torchops::simt {
namespace {

// Multiplies a [16, depth] with b [depth, 8]. A word holds `per_word` elements of neighbouring k;
// element(word, i) is the i-th of them.
template <int depth, int per_word, typename Element>
void multiply(Words* of_lane, const Element& element) {
  float a[16][depth];
  float b[depth][8];
  for (int lane = 0; lane < warp_size; ++lane) {
    const uint32_t* words = of_lane[lane];
    const int group = lane / 4;
    const int k = lane % 4 * per_word;
    for (int i = 0; i < per_word; ++i) {
      for (int half = 0; half < 2; ++half) {  // of the depth
        a[group][k + i + half * depth / 2] = element(words[4 + 2 * half], i);
        a[group + 8][k + i + half * depth / 2] = element(words[5 + 2 * half], i);
        b[k + i + half * depth / 2][group] = element(words[8 + half], i);
      }
    }
  }
  for (int lane = 0; lane < warp_size; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8;
      const int column = lane % 4 * 2 + i % 2;
      float sum = std::bit_cast<float>(of_lane[lane][i]);
      for (int k = 0; k < depth; ++k) {
        sum += a[row][k] * b[k][column];
      }
      of_lane[lane][i] = std::bit_cast<uint32_t>(sum);
    }
  }
}

uint16_t halfword(const uint32_t* words, int index) {
  return static_cast<uint16_t>(words[index / 2] >> index % 2 * 16);
}

}  // namespace

template <int value_words>
void gather(Words* of_lane, uint32_t mask) {
  uint32_t values[warp_size][value_words];
  for (int lane = 0; lane < warp_size; ++lane) {
    for (int word = 0; word < value_words; ++word) {
      values[lane][word] = mask >> lane & 1 ? of_lane[lane][1 + word] : 0xffffffff;
    }
  }
  for (int lane = 0; lane < warp_size; ++lane) {
    if (mask >> lane & 1) {
      for (int word = 0; word < value_words; ++word) {
        of_lane[lane][1 + word] = values[of_lane[lane][0]][word];
      }
    }
  }
}
template void gather<1>(Words*, uint32_t);
template void gather<2>(Words*, uint32_t);

void vote(Words* of_lane, uint32_t mask) {
  uint32_t predicates = 0;
  for (int lane = 0; lane < warp_size; ++lane) {
    predicates |= (mask >> lane & 1 && of_lane[lane][0] ? 1U : 0U) << lane;
  }
  for (int lane = 0; lane < warp_size; ++lane) {
    if (mask >> lane & 1) {
      of_lane[lane][0] = predicates;
    }
  }
}

template <int count, bool transposed>
void distribute_matrices(Words* of_lane, uint32_t) {
  uint32_t rows[8 * count][4];
  for (int row = 0; row < 8 * count; ++row) {
    for (int word = 0; word < 4; ++word) {
      rows[row][word] = of_lane[row][word];
    }
  }
  for (int lane = 0; lane < warp_size; ++lane) {
    for (int matrix = 0; matrix < count; ++matrix) {
      const uint32_t (*row)[4] = rows + 8 * matrix;
      const int group = lane / 4;
      const int pair = lane % 4;
      of_lane[lane][matrix] =
          transposed ? halfword(row[2 * pair], group) | static_cast<uint32_t>(halfword(row[2 * pair + 1], group)) << 16
                     : row[group][pair];
    }
  }
}
template void distribute_matrices<2, false>(Words*, uint32_t);
template void distribute_matrices<2, true>(Words*, uint32_t);
template void distribute_matrices<4, false>(Words*, uint32_t);
template void distribute_matrices<4, true>(Words*, uint32_t);

void multiply_bfloat16(Words* of_lane, uint32_t) {
  multiply<16, 2>(of_lane, [](uint32_t word, int i) { return bfloat16_value(halfword(&word, i)); });
}

void multiply_float16(Words* of_lane, uint32_t) {
  multiply<16, 2>(of_lane, [](uint32_t word, int i) { return float16_value(halfword(&word, i)); });
}

void multiply_tf32(Words* of_lane, uint32_t) {
  // The hardware does not read the 13 lowest bits.
  multiply<8, 1>(of_lane, [](uint32_t word, int) { return std::bit_cast<float>(word & 0xffffe000); });
}

}  // namespace torchops::simt
