// How a block of rows is multiplied: `Plain` in float or double, `Half` in bf16 by one of two units of the processor.
//
// An engine says in which type operands lie (In) and results come (Out), how a weight matrix is packed once per expert,
// and how the operands of a weight gradient (sums over rows) lie. `kRows` is what row counts are rounded up to in its
// buffers; rows beyond the last are zeros. kBlock rows are done at a time, in steps of kStep.
#pragma once
#include "half.h"
#include "tiles.h"

namespace mue {

inline int64_t up_to(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Columns [first, first + kLanes) of kLanes rows of `from` (stride ld), transposed; rows and columns past the end are zeros.
template <class T, class From>
inline void load_transposed(Vector<T>* square, const From* from, int64_t ld, int64_t rows, int64_t columns) {
  constexpr int L = kLanes<T>;
  for (int i = 0; i < L; i++) {
    square[i] = Vector<T>{};
    if (i >= rows) continue;
    if constexpr (std::is_same_v<T, double> == std::is_same_v<From, double>) {
      if (columns >= L) { square[i] = load(from + i * ld); continue; }
    }
    for (int64_t j = 0; j < L && j < columns; j++) { T value; put(&value, scalar(from[i * ld + j])); square[i][j] = value; }
  }
  transpose<T>(square);
}

template <class T> struct Plain {
  using In = T;
  using Out = T;
  static constexpr bool kRough = false;
  static constexpr int64_t kRows = 1, kPanel = 2 * kLanes<T>, kBlock = 120, kStep = kTileRows<T>;
  static void begin() {}
  static void end() {}
  static int64_t packed(int64_t K, int64_t N) { return K * up_to(N, kPanel); }

  // Values on their way from one type to another: `count` of them, a vector of them, or what is left of one.
  template <class To, class From> static void convert(To* to, const From* from, int64_t count) { mue::convert(to, from, count); }
  template <class To, class From> static void place_vector(To* to, const From* from, int64_t left) { convert_vector(to, from, left); }
  template <class To> static void put(To* to, Vector<T> value, int64_t left) { store_some<T>(to, value, left); }

  // The panels of B = w^T, with w (N, K).
  static void pack_transposed(T* to, const void* w, int64_t type, int64_t K, int64_t N) {
    with_type(type, [&](auto* typed) {
      auto from = static_cast<decltype(typed)>(const_cast<void*>(w));
      Vector<T> square[kLanes<T>];
      for (int64_t n = 0; n < up_to(N, kPanel); n += kLanes<T>)
        for (int64_t k = 0; k < K; k += kLanes<T>) {
          load_transposed<T>(square, from + n * K + k, K, N - n, K - k);
          T* panel = to + n / kPanel * kPanel * K + n % kPanel + k * kPanel;
          for (int64_t i = 0; i < kLanes<T> && i < K - k; i++) store(panel + i * kPanel, square[i]);
        }
    });
  }

  // The panels of B = w, with w (K, N).
  static void pack(T* to, const void* w, int64_t type, int64_t K, int64_t N) {
    with_type(type, [&](auto* typed) {
      auto from = static_cast<decltype(typed)>(const_cast<void*>(w));
      for (int64_t k = 0; k < K; k++)
        for (int64_t n = 0; n < N; n += kLanes<T>)
          convert_vector(to + n / kPanel * kPanel * K + k * kPanel + n % kPanel, from + k * N + n, N - n);
    });
  }

  static void multiply(int64_t M, int64_t N, int64_t K, const T* a, int64_t lda, const T* b, T* c, int64_t ldc, bool add) {
    mue::multiply<T, true>(M, N, K, a, lda, b, c, ldc, add);
  }

  // Where the vector of columns from c on of row r lies in the right operand of `outer`.
  static T* right(T* b, int64_t r, int64_t c, int64_t rows, int64_t) {
    return b + c / kPanel * kPanel * rows + r * kPanel + c % kPanel;
  }
  static const T* finish_right(const T* b, T*, int64_t, int64_t, int64_t) { return b; }

  // C[M, N] (+)= A^T B over `rows` rows; A (rows, M) row-major, B from finish_right.
  static void outer(int64_t M, int64_t N, int64_t rows, const T* a, int64_t lda, const T* b, T* c, bool add, T*) {
    mue::multiply<T, false>(M, N, rows, a, lda, b, c, N, add);
  }
};

// In pairs (half.h). Widths must be multiples of 32 (the caller sees to it). Products: what multiplies (see below).
template <class Products> struct Half {
  using In = bf16;
  using Out = float;
  static constexpr bool kRough = true;  // activations to four digits
  static constexpr int64_t kLane = kLanes<float>, kPanel = 2 * kLane, kRows = Products::kRows, kBlock = Products::kBlock, kStep = Products::kStep;
  static void begin() { Products::begin(); }
  static void end() { Products::end(); }
  static int64_t packed(int64_t K, int64_t N) { return K * N; }

  template <class To, class From> static void convert(To* to, const From* from, int64_t count) {
    if constexpr (std::is_same_v<To, bf16> && std::is_same_v<From, float>) {
      for (int64_t i = 0; i < count; i += kLane) put(to + i, load(from + i), kLane);
    } else {
      mue::convert(to, from, count);
    }
  }
  template <class To, class From> static void place_vector(To* to, const From* from, int64_t) { convert(to, from, kLane); }
  template <class To> static void put(To* to, Vector<float> value, int64_t) {
    if constexpr (std::is_same_v<To, bf16>) Products::Round::store(to, value);
    else store(to, value);
  }
  template <class From> static Vector<float> wide(const From* from) {
    if constexpr (!std::is_same_v<From, double>) return load(from);
    float narrow[kLane];
    mue::convert(narrow, from, kLane);
    return load(narrow);
  }

  // Where the pairs of rows k and k + 1 lie, from column n on.
  static Pair* place(bf16* b, int64_t k, int64_t n, int64_t K) {
    return reinterpret_cast<Pair*>(b + n / kPanel * kPanel * K + n % kPanel * 2 + k * kPanel);
  }

  static void pack_transposed(bf16* to, const void* w, int64_t type, int64_t K, int64_t N) {
    with_type(type, [&](auto* typed) {
      auto from = static_cast<decltype(typed)>(const_cast<void*>(w));
      Vector<float> square[kLane];
      for (int64_t n = 0; n < N; n += kLane)
        for (int64_t k = 0; k < K; k += 2 * kLane) {
          for (int64_t i = 0; i < kLane; i++) {
            auto row = from + (n + i) * K + k;
            square[i] = Products::Round::along(wide(row), wide(row + kLane));
          }
          transpose<float>(square);
          for (int64_t i = 0; i < kLane; i++) store(place(to, k + 2 * i, n, K), square[i]);
        }
    });
  }

  static void pack(bf16* to, const void* w, int64_t type, int64_t K, int64_t N) {
    with_type(type, [&](auto* typed) {
      auto from = static_cast<decltype(typed)>(const_cast<void*>(w));
      for (int64_t k = 0; k < K; k += 2)
        for (int64_t n = 0; n < N; n += kLane)
          store(place(to, k, n, K), Products::Round::across(wide(from + k * N + n), wide(from + (k + 1) * N + n)));
    });
  }

  static void multiply(int64_t M, int64_t N, int64_t K, const bf16* a, int64_t lda, const bf16* b, float* c, int64_t ldc, bool add) {
    Products::multiply(M, N, K, a, lda, b, c, ldc, add);
  }

  static bf16* right(bf16* b, int64_t r, int64_t c, int64_t, int64_t ld) { return b + r * ld + c; }
  static const bf16* finish_right(const bf16* b, bf16* scratch, int64_t rows, int64_t ld, int64_t N) {
    int64_t K = up_to(rows, kRows);
    for (int64_t k = 0; k < K; k += 2)
      for (int64_t n = 0; n < N; n += kLane) store(place(scratch, k, n, K), paired(b + k * ld + n, b + (k + 1) * ld + n));
    return scratch;
  }

  static void outer(int64_t M, int64_t N, int64_t rows, const bf16* a, int64_t lda, const bf16* b, float* c, bool add, bf16* turned) {
    Products::outer(M, N, up_to(rows, kRows), a, lda, b, c, add, turned);
  }
};

#if defined(MUE_DOT)

// Products of pairs, vector by vector: product.h's tiles.
struct Dot {
  using Round = Rounding;
  static constexpr int64_t kRows = kVectorBytes == 64 ? 2 : 4, kBlock = 120, kStep = kTileRows<Pair>;
  static void begin() {}
  static void end() {}

  static void multiply(int64_t M, int64_t N, int64_t K, const bf16* a, int64_t lda, const bf16* b, float* c, int64_t ldc, bool add) {
    mue::multiply<Pair, true>(M, N, K / 2, reinterpret_cast<const Pair*>(a), lda / 2, reinterpret_cast<const Pair*>(b), c, ldc, add);
  }

  static void outer(int64_t M, int64_t N, int64_t rows, const bf16* a, int64_t lda, const bf16* b, float* c, bool add, bf16* turned) {
    Pair* pairs = reinterpret_cast<Pair*>(turned);
    int64_t apart = M + kLanes<float>;  // not a power of two
    for (int64_t k = 0; k < rows; k += 2)
      for (int64_t m = 0; m < M; m += kLanes<float>)
        store(pairs + k / 2 * apart + m, paired(a + k * lda + m, a + (k + 1) * lda + m));
    mue::multiply<Pair, false>(M, N, rows / 2, pairs, apart, reinterpret_cast<const Pair*>(b), c, N, add);
  }
};

#endif
#if defined(MUE_TILES)

// Products of whole tiles: C in squares of 32, summed 32 terms at a time. Tiles: the instructions, or a model of them.
template <class Tiles> struct Squares {
  using Round = typename Tiles::Round;
  static constexpr int64_t kRows = 32, kBlock = 128, kStep = 32;
  static void begin() { Tiles::configure(); }
  static void end() { Tiles::release(); }

  static void multiply(int64_t M, int64_t N, int64_t K, const bf16* a, int64_t lda, const bf16* b, float* c, int64_t ldc, bool add) {
    for (int64_t n = 0; n < N; n += 32, b += 32 * K)
      for (int64_t m = 0; m < M; m += 32) square(K, a + m * lda, lda, b, c + m * ldc + n, ldc, add);
  }

  // Tiles 0 to 3: C, upper left to lower right; 4, 5: A's rows; 6, 7: B's columns.
  static void square(int64_t K, const bf16* a, int64_t lda, const bf16* b, float* c, int64_t ldc, bool add) {
    float* lower = c + 16 * ldc;
    if (add) {
      Tiles::template load<0>(c, 4 * ldc), Tiles::template load<1>(c + 16, 4 * ldc);
      Tiles::template load<2>(lower, 4 * ldc), Tiles::template load<3>(lower + 16, 4 * ldc);
    } else {
      Tiles::template zero<0>(), Tiles::template zero<1>(), Tiles::template zero<2>(), Tiles::template zero<3>();
    }
    for (int64_t k = 0; k < K; k += 32) {
      Tiles::template load<4>(a + k, 2 * lda), Tiles::template load<5>(a + 16 * lda + k, 2 * lda);
      Tiles::template load<6>(b + 32 * k, 128), Tiles::template load<7>(b + 32 * k + 32, 128);
      Tiles::template add_product<0, 4, 6>(), Tiles::template add_product<1, 4, 7>();
      Tiles::template add_product<2, 5, 6>(), Tiles::template add_product<3, 5, 7>();
    }
    Tiles::template store<0>(c, 4 * ldc), Tiles::template store<1>(c + 16, 4 * ldc);
    Tiles::template store<2>(lower, 4 * ldc), Tiles::template store<3>(lower + 16, 4 * ldc);
  }

  static void outer(int64_t M, int64_t N, int64_t rows, const bf16* a, int64_t lda, const bf16* b, float* c, bool add, bf16* turned) {
    constexpr int64_t L = kLanes<float>;
    Vector<float> block[L];
    for (int64_t k = 0; k < rows; k += 2 * L)
      for (int64_t m = 0; m < M; m += L) {
        for (int64_t i = 0; i < L; i++) block[i] = paired(a + (k + 2 * i) * lda + m, a + (k + 2 * i + 1) * lda + m);
        transpose<float>(block);
        for (int64_t i = 0; i < L; i++) store(reinterpret_cast<Pair*>(turned + (m + i) * rows + k), block[i]);
      }
    multiply(M, N, rows, turned, rows, b, c, N, add);
  }
};

#endif

}  // namespace mue
