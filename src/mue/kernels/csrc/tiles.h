// The matrix unit's instructions (AMX: tiles of 16 rows of 64 bytes), and a model of them for machines without.
#pragma once
#include "half.h"

#if defined(MUE_TILES)

namespace mue {

struct AmxTiles {
  using Round = Rounding;
  struct alignas(64) Shape {  // what ldtilecfg reads: palette 1, then bytes of a row and rows of each tile
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static void configure() {
    static const Shape shape;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  static void release() { asm volatile("tilerelease"); }
  template <int t> static void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(t)); }
  template <int t> static void load(const void* from, int64_t apart) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(apart), "i"(t) : "memory");
  }
  template <int t> static void store(void* to, int64_t apart) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(apart), "i"(t) : "memory");
  }
  // c (16 x 16 floats) += a (16 rows of 16 pairs) b (16 pairs of rows, 16 columns)
  template <int c, int a, int b> static void add_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
};

// The same by loops, as the processor's manual describes the instructions.
struct TileModel {
  using Round = PlainRounding;
  struct Tile { uint8_t row[16][64]; };
  static inline thread_local Tile tile[8];
  static void configure() { std::memset(tile, 0, sizeof(tile)); }
  static void release() {}
  template <int t> static void zero() { tile[t] = {}; }
  template <int t> static void load(const void* from, int64_t apart) {
    for (int r = 0; r < 16; r++) std::memcpy(tile[t].row[r], static_cast<const char*>(from) + r * apart, 64);
  }
  template <int t> static void store(void* to, int64_t apart) {
    for (int r = 0; r < 16; r++) std::memcpy(static_cast<char*>(to) + r * apart, tile[t].row[r], 64);
  }
  template <int c, int a, int b> static void add_product() {
    for (int m = 0; m < 16; m++)
      for (int n = 0; n < 16; n++) {
        float sum;
        std::memcpy(&sum, tile[c].row[m] + 4 * n, 4);
        for (int k = 0; k < 16; k++) {
          Pair left, right;
          std::memcpy(&left, tile[a].row[m] + 4 * k, 4), std::memcpy(&right, tile[b].row[k] + 4 * n, 4);
          sum += scalar(left.even) * scalar(right.even);
          sum += scalar(left.odd) * scalar(right.odd);
        }
        std::memcpy(tile[c].row[m] + 4 * n, &sum, 4);
      }
  }
};

}  // namespace mue

#endif
