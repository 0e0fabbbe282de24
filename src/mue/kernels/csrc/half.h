// bf16 products: operands in pairs of neighbouring terms, and how this processor multiplies and rounds them.
//
// A pair is one element of 32 bits to product.h's tiles, which serve it as they serve floats. Where there are bf16 instructions
// (x86: vdpbf16ps, of AVX512_BF16; Arm: bfmmla) a product of pairs is one of them. They are written in assembly, so that no
// file has to be compiled for them and none runs by accident: whether the processor has them is asked at run time (processor.h).
#pragma once
#include "product.h"
#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

// gcc 11 and clang 12 come with assemblers that know all of these instructions
#if __GNUC__ >= 11 || __clang_major__ >= 12
#if defined(__x86_64__) && defined(__AVX512F__)
#define MUE_DOT 1
#define MUE_TILES 1
#elif defined(__aarch64__)
#define MUE_DOT 1
#endif
#endif

namespace mue {

struct Pair { bf16 even, odd; };

inline Vector<float> load(const Pair* from) { return *reinterpret_cast<const Vector<float>*>(from); }
inline void store(Pair* to, Vector<float> pairs) { *reinterpret_cast<Vector<float>*>(to) = pairs; }

// The bits of two halves of a pair in one lane: each of `even` and `odd` has its own in the upper 16.
inline Vector<float> paired(Vector<float> even, Vector<float> odd) {
  using Wide = VectorOf<float>::wide;
  Wide pair = (reinterpret_cast<Wide&>(even) >> 16) | (reinterpret_cast<Wide&>(odd) & 0xffff0000u);
  return reinterpret_cast<Vector<float>&>(pair);
}

// Pairs of two rows' numbers, column by column.
#if defined(__AVX512BW__)
inline Vector<float> zipped(Vector<float> both) {  // of the halves of one vector
  typedef uint16_t Words __attribute__((vector_size(64), aligned(4), may_alias));
  Words order;
  for (int i = 0; i < 32; i++) order[i] = i / 2 + i % 2 * 16;
  Words words = __builtin_shuffle(reinterpret_cast<Words&>(both), order);
  return reinterpret_cast<Vector<float>&>(words);
}
inline Vector<float> paired(const bf16* even, const bf16* odd) {
  return zipped(Vector<float>(_mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even))),
                                                 _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)), 1)));
}
#else
inline Vector<float> paired(const bf16* even, const bf16* odd) { return paired(load(even), load(odd)); }
#endif

// Rounding by integers, as vector.h does it: for any machine.
struct PlainRounding {
  static void store(bf16* to, Vector<float> value) { mue::store(to, value); }
  // Pairs of (even, odd) lane by lane; of neighbours in `low`, then in `high`.
  static Vector<float> across(Vector<float> even, Vector<float> odd) { return paired(rounded(even), rounded(odd)); }
  static Vector<float> along(Vector<float> low, Vector<float> high) {
    bf16 both[2 * kLanes<float>];
    mue::store(both, low), mue::store(both + kLanes<float>, high);
    return load(reinterpret_cast<float*>(both));
  }
  static Vector<float> rounded(Vector<float> value) {
    bf16 half[kLanes<float>];
    mue::store(half, value);
    return load(half);
  }
};

#if defined(MUE_DOT) && defined(__x86_64__)

struct Rounding {
  static void store(bf16* to, Vector<float> value) {
    VectorOf<float>::half half;
    asm("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(value));
    *reinterpret_cast<VectorOf<float>::half*>(to) = half;
  }
  static Vector<float> across(Vector<float> even, Vector<float> odd) { return zipped(along(even, odd)); }
  static Vector<float> along(Vector<float> low, Vector<float> high) {
    Vector<float> both;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(low), "v"(high));
    return both;
  }
};

template <> struct Term<Pair> {
  using Sum = float;
  static Vector<float> spread(Pair value) {
    float bits;
    std::memcpy(&bits, &value, 4);
    Vector<float> all;
    for (int i = 0; i < kLanes<float>; i++) all[i] = bits;
    return all;
  }
  static void add(Vector<float>& sum, Vector<float> value, Vector<float> b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(b), "v"(value));
  }
};

#elif defined(MUE_DOT)

using Rounding = PlainRounding;
template <> struct Term<Pair> { using Sum = float; };

// Two rows of A by two columns of B, four terms each: `a` and `b` hold two pairs of a row (of a column), then two of the next.
inline void add_square(Vector<float>& sum, Vector<float> a, Vector<float> b) {
  asm(".arch_extension bf16\n\tbfmmla %0.4s, %1.8h, %2.8h" : "+w"(sum) : "w"(a), "w"(b));
}

template <int rows, bool unit_column>
inline __attribute__((always_inline)) void accumulate(int64_t K, const Pair* a, int64_t stride, const Pair* b, Vector<float> (&sum)[rows][2]) {
  using V = Vector<float>;
  using Index = VectorOf<float>::integer;
  constexpr int pairs = (rows + 1) / 2;
  V square[pairs][4];
  for (int i = 0; i < pairs; i++)
    for (int j = 0; j < 4; j++) square[i][j] = V{};
  auto at = [&](int i, int64_t k) { return a + (unit_column ? i * stride + k : i + k * stride); };
  for (int64_t k = 0; k < K; k += 2, b += 16) {
    bool both = k + 1 < K;
    V columns[4];
    for (int half = 0; half < 2; half++) {
      V low = load(b + 4 * half), high = both ? load(b + 8 + 4 * half) : V{};
      columns[2 * half] = __builtin_shuffle(low, high, Index{0, 4, 1, 5});
      columns[2 * half + 1] = __builtin_shuffle(low, high, Index{2, 6, 3, 7});
    }
#pragma GCC unroll 4
    for (int i = 0; i < pairs; i++) {
      int next = 2 * i + 1 < rows ? 2 * i + 1 : 2 * i;
      Pair four[4] = {*at(2 * i, k), both ? *at(2 * i, k + 1) : Pair{}, *at(next, k), both ? *at(next, k + 1) : Pair{}};
      V left = load(four);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) add_square(square[i][j], left, columns[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
    for (int half = 0; half < 2; half++) {
      V first = square[i / 2][2 * half], second = square[i / 2][2 * half + 1];
      sum[i][half] = __builtin_shuffle(first, second, i % 2 ? Index{2, 3, 6, 7} : Index{0, 1, 4, 5});
    }
}

#endif

}  // namespace mue
