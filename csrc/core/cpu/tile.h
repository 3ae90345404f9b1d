#pragma once

#include <cstdint>

// Tiles: registers of 16 rows of 64 bytes, multiplied with each other. The include path decides what they are: the
// CPU's here, arrays in tests/cpp/emulated. No other file names their instructions.

#ifndef TORCHOPS_LEVEL
#error "tile.h belongs in *_tiles.cpp files, which are compiled for the level amx"
#endif

#define TILE_FUNCTION inline __attribute__((always_inline))

namespace torchops::kernels::inline TORCHOPS_LEVEL {

// The eight tiles of the thread, numbered from 0, while one of these lives: others in the process configure them as
// they like between two kernel calls, and tiles in use make every switch of threads save 8 KiB.
//
// A tile holds sums, 16 rows of 16 floats, or a left operand, 16 rows of 32 bfloat16 along the depth, or a right
// one, 16 rows of pairs of neighbours along the depth for each of 16 columns.
class Tiles {
 public:
  TILE_FUNCTION Tiles() {
    Configuration configuration{};
    configuration.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      configuration.row_bytes[tile] = 64;
      configuration.rows[tile] = 16;
    }
    // The whole structure is an operand: the compiler's own _tile_loadconfig says that it reads 8 bytes, and g++ 12
    // drops the stores to the others.
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  TILE_FUNCTION ~Tiles() { asm volatile("tilerelease" ::); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int tile>
  TILE_FUNCTION void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
  }

  // Strides are bytes between rows. The compiler's own functions do not say that they read memory.
  template <int tile>
  TILE_FUNCTION void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
  }
  template <int tile>
  TILE_FUNCTION void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
  }

  // sums += left * right: for every sum the even and the odd numbers of the depth are added up apart, each in
  // ascending order from 0, then both together are added to it. Denormal numbers are zeros.
  template <int sums, int left, int right>
  TILE_FUNCTION void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(left), "i"(right));
  }

 private:
  struct Configuration {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
