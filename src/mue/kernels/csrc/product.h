// Matrix products on packed panels. C is row-major; A is read by strides; B lies in panels of kPanel columns,
// each K rows of kPanel consecutive values, so that the inner loop streams through memory.
//
// T: float or double, or Pair (half.h), two neighbouring terms of a sum in bf16; K then counts pairs, and C is float.
#pragma once
#include "vector.h"

namespace mue {

// What a sum of products of T's is, a value of A as `add` wants it, and sum + value * b.
template <class T> struct Term {
  using Sum = T;
  static T spread(T value) { return value; }
  static void add(Vector<T>& sum, T value, Vector<T> b) { sum += value * b; }
};
template <class T> using Sum = typename Term<T>::Sum;

// Rows of a register tile: two vectors of columns each; two more registers hold B and one a value of A.
// (double is for checking numerics, not for speed: a small tile keeps the build short.)
template <class T> constexpr int kTileRows = sizeof(T) == 8 ? 4 : kVectorBytes == 64 ? 12 : 6;

// A register tile's sums, with A[i, k] at a[i * stride + k] (unit_column) or a[i + k * stride].
template <int rows, bool unit_column, class T>
inline __attribute__((always_inline)) void accumulate(int64_t K, const T* a, int64_t stride, const T* b, Vector<Sum<T>> (&sum)[rows][2]) {
  constexpr int L = kLanes<Sum<T>>;
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = Vector<Sum<T>>{};
  for (int64_t k = 0; k < K; k++, b += 2 * L) {
    Vector<Sum<T>> b0 = load(b), b1 = load(b + L);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
      auto value = Term<T>::spread(unit_column ? a[i * stride + k] : a[i + k * stride]);
      Term<T>::add(sum[i][0], value, b0);
      Term<T>::add(sum[i][1], value, b1);
    }
  }
}

// C[rows, columns] (+)= A B.
template <class T, int rows, bool unit_column>
void tile(int64_t K, const T* a, int64_t stride, const T* b, Sum<T>* c, int64_t ldc, int64_t columns, bool add) {
  using S = Sum<T>;
  constexpr int L = kLanes<S>;
  Vector<S> sum[rows][2];
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) __builtin_prefetch(c + i * ldc, 1), __builtin_prefetch(c + i * ldc + L, 1);
  accumulate<rows, unit_column>(K, a, stride, b, sum);
  S edge[rows * 2 * L];  // where the tile is wider than C
  S* to = columns == 2 * L ? c : edge;
  int64_t ld = columns == 2 * L ? ldc : 2 * L;
  if (add && to == c) {
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) sum[i][0] += load(c + i * ldc), sum[i][1] += load(c + i * ldc + L);
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) store(to + i * ld, sum[i][0]), store(to + i * ld + L, sum[i][1]);
  if (to == c) return;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++) c[i * ldc + j] = (add ? c[i * ldc + j] : 0) + edge[i * ld + j];
}

// Rows from m to M in tiles of `rows`, then the rest in one tile: several smaller ones would each wait for their own sums.
template <class T, int rows, bool unit_column>
void tiles(int64_t m, int64_t M, int64_t K, const T* a, int64_t stride, const T* b, Sum<T>* c, int64_t ldc, int64_t columns,
           bool add) {
  for (; m + rows <= M; m += rows)
    tile<T, rows, unit_column>(K, a + m * (unit_column ? stride : 1), stride, b, c + m * ldc, ldc, columns, add);
  if constexpr (rows > 1)
    if (m < M) tiles<T, rows - 1, unit_column>(m, M, K, a, stride, b, c, ldc, columns, add);
}

// C[M, N] (+)= A B, A as in `tile`, B in panels.
template <class T, bool unit_column>
void multiply(int64_t M, int64_t N, int64_t K, const T* a, int64_t stride, const T* b, Sum<T>* c, int64_t ldc, bool add) {
  constexpr int64_t kPanel = 2 * kLanes<Sum<T>>;
  for (int64_t n = 0; n < N; n += kPanel, b += K * kPanel)
    tiles<T, kTileRows<T>, unit_column>(0, M, K, a, stride, b, c + n, ldc, N - n < kPanel ? N - n : kPanel, add);
}

// A square of kLanes x kLanes values, transposed in registers: exchange of halves, quarters, ...
template <class T, int step = kLanes<T> / 2> inline __attribute__((always_inline)) void transpose(Vector<T>* row) {
  constexpr int L = kLanes<T>;
  typename VectorOf<T>::integer low, high;
  for (int c = 0; c < L; c++) low[c] = c & step ? L + (c ^ step) : c, high[c] = c & step ? L + c : c ^ step;
#pragma GCC unroll 16
  for (int i = 0; i < L; i++) {
    if (i & step) continue;
    Vector<T> a = row[i], b = row[i | step];
    row[i] = __builtin_shuffle(a, b, low);
    row[i | step] = __builtin_shuffle(a, b, high);
  }
  if constexpr (step > 1) transpose<T, step / 2>(row);
}

}  // namespace mue
