// How a block of rows is multiplied: `Plain` in float or double by product.h, `Brgemm` in bf16 by the matrix unit.
//
// An engine says in which type operands lie (In) and results come (Out), how a weight matrix is packed once per expert,
// and how the operands of a weight gradient (sums over rows) lie. `kRows` is what row counts are rounded up to in its
// buffers; rows beyond the last are zeros. kBlock rows are done at a time, in steps of kStep.
#pragma once
#include "product.h"

namespace c10 { struct BFloat16; }
namespace at::native::cpublas {  // torch's own headers would add half a minute to the build
void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_C, const c10::BFloat16* A,
            const c10::BFloat16* B, float* C, bool is_vnni);
void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

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
  static constexpr int64_t kRows = 1, kPanel = 2 * kLanes<T>, kBlock = 120, kStep = kTileRows<T>;
  static void release() {}
  static int64_t packed(int64_t K, int64_t N) { return K * up_to(N, kPanel); }

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

// Pairs of neighbouring rows interleaved: the layout (K/2, columns, 2) in which matrix units read bf16.
inline Vector<float> interleaved(const bf16* even, const bf16* odd) {
  using Wide = VectorOf<float>::wide;
  Vector<float> a = load(even), b = load(odd);  // the bits of each lie in the upper half
  Wide pair = (reinterpret_cast<Wide&>(a) >> 16) | reinterpret_cast<Wide&>(b);
  return reinterpret_cast<Vector<float>&>(pair);
}

// Widths must be multiples of kRows (the caller sees to it).
template <bool emulated> struct Brgemm {
  using In = bf16;
  using Out = float;
  static constexpr int64_t kRows = 32, kLane = kLanes<float>, kBlock = 128, kStep = 32;
  static int64_t panel(int64_t N) { return N % 64 == 0 ? 64 : 32; }
  static void release() { if constexpr (!emulated) at::native::cpublas::brgemm_release(true); }
  static int64_t packed(int64_t K, int64_t N) { return K * N; }

  static void pack_transposed(bf16* to, const void* w, int64_t type, int64_t K, int64_t N) {
    with_type(type, [&](auto* typed) {
      auto from = static_cast<decltype(typed)>(const_cast<void*>(w));
      Vector<float> square[kLane];
      bf16 pairs[2 * kLane];
      int64_t P = panel(N);
      for (int64_t n = 0; n < N; n += kLane)
        for (int64_t k = 0; k < K; k += 2 * kLane) {
          for (int64_t i = 0; i < kLane; i++) {
            convert(pairs, from + (n + i) * K + k, 2 * kLane);
            square[i] = load(reinterpret_cast<float*>(pairs));
          }
          transpose<float>(square);
          bf16* at = to + n / P * P * K + n % P * 2 + k * P;
          for (int64_t i = 0; i < kLane; i++) store(reinterpret_cast<float*>(at + i * 2 * P), square[i]);
        }
    });
  }

  static void pack(bf16* to, const void* w, int64_t type, int64_t K, int64_t N) {
    with_type(type, [&](auto* typed) {
      auto from = static_cast<decltype(typed)>(const_cast<void*>(w));
      bf16 even[kLane], odd[kLane];
      int64_t P = panel(N);
      for (int64_t k = 0; k < K; k += 2)
        for (int64_t n = 0; n < N; n += kLane) {
          convert(even, from + k * N + n, kLane);
          convert(odd, from + (k + 1) * N + n, kLane);
          store(reinterpret_cast<float*>(to + n / P * P * K + n % P * 2 + k * P), interleaved(even, odd));
        }
    });
  }

  static void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldc, bool add, const bf16* a, const bf16* b, float* c) {
    if constexpr (emulated) {
      for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) {
          float sum = add ? c[m * ldc + n] : 0;
          for (int64_t k = 0; k < K; k++) sum += scalar(a[m * lda + k]) * scalar(b[k / 2 * 2 * N + n * 2 + k % 2]);
          c[m * ldc + n] = sum;
        }
    } else {
      at::native::cpublas::brgemm(M, N, K, lda, N, ldc, add, reinterpret_cast<const c10::BFloat16*>(a),
                                  reinterpret_cast<const c10::BFloat16*>(b), c, true);
    }
  }

  static void multiply(int64_t M, int64_t N, int64_t K, const bf16* a, int64_t lda, const bf16* b, float* c, int64_t ldc, bool add) {
    int64_t P = panel(N);
    for (int64_t n = 0; n < N; n += P) brgemm(up_to(M, kRows), P, K, lda, ldc, add, a, b + n * K, c + n);
  }

  static bf16* right(bf16* b, int64_t r, int64_t c, int64_t, int64_t ld) { return b + r * ld + c; }
  static const bf16* finish_right(const bf16* b, bf16* scratch, int64_t rows, int64_t ld, int64_t N) {
    int64_t P = panel(N), K = up_to(rows, kRows);
    for (int64_t k = 0; k < K; k += 2)
      for (int64_t n = 0; n < N; n += kLane)
        store(reinterpret_cast<float*>(scratch + n / P * P * K + n % P * 2 + k * P),
              interleaved(b + k * ld + n, b + (k + 1) * ld + n));
    return scratch;
  }

  static void outer(int64_t M, int64_t N, int64_t rows, const bf16* a, int64_t lda, const bf16* b, float* c, bool add, bf16* turned) {
    int64_t K = up_to(rows, kRows), P = panel(N);
    Vector<float> square[kLane];
    for (int64_t k = 0; k < K; k += 2 * kLane)
      for (int64_t m = 0; m < M; m += kLane) {
        for (int64_t i = 0; i < kLane; i++) square[i] = interleaved(a + (k + 2 * i) * lda + m, a + (k + 2 * i + 1) * lda + m);
        transpose<float>(square);
        for (int64_t i = 0; i < kLane; i++) store(reinterpret_cast<float*>(turned + (m + i) * K + k), square[i]);
      }
    for (int64_t n = 0; n < N; n += P) brgemm(M, P, K, K, N, add, turned, b + n * K, c + n);
  }
};

}  // namespace mue
