// What the sublayers of a transformer block, x + c f(norm x), have in common: a thread takes one piece of the tokens after the
// other from the norm to the sum, so that what lies between stays in its cache, and sums the weights' gradients for itself.
#pragma once
#include <algorithm>

#include "engine.h"
#include "norm.h"
#include "parallel.h"
#include "plan.h"

namespace mue {

// Deals out a thread's memory; with base null it only counts.
struct Memory {
  char* at;
  void take(float*& buffer, int64_t count) {
    buffer = reinterpret_cast<float*>(at);
    at += up_to(count * 4, 64) + 64;
  }
};

using Engine = Plain<float>;
constexpr int64_t kPanel = Engine::kPanel;

// C[M, N] (+)= A B as in product.h; B's panels have `depth` rows, of which the first K take part. (Tiles of 8 rows divide the
// usual lengths; the experts' tiles of 12 do not.)
template <bool unit_column, class T>
void multiply(int64_t M, int64_t N, int64_t K, const T* a, int64_t stride, const T* b, int64_t depth, float* c, int64_t ldc, bool add) {
  constexpr int kTile = kVectorBytes == 64 ? 8 : 4;
  for (int64_t n = 0; n < N; n += kPanel)
    tiles<T, kTile, unit_column>(0, M, K, a, stride, b + n * depth, c + n, ldc, N - n < kPanel ? N - n : kPanel, add);
}

// A sublayer's products of rows in float: A B (`rows`) and A^T B (`outer`), and how it packs B, or B = w^T.
struct Floats {
  void lay_out(Memory&, int64_t) {}
  static void pack(float* to, const float* from, int64_t K, int64_t N) { Engine::pack(to, from, kFloat, K, N); }
  static void pack_transposed(float* to, const float* from, int64_t K, int64_t N) { Engine::pack_transposed(to, from, kFloat, K, N); }
  // Where a vector of B is written that is made row by row, (r, c) of `depth` rows; and B packed where that was in `rows`.
  static float* place(float* to, float*, int64_t, int64_t r, int64_t c, int64_t depth) { return Engine::right(to, r, c, depth, 0); }
  static void finish(float*, const float*, int64_t, int64_t, int64_t) {}
  void rows(int64_t M, int64_t N, int64_t K, const float* a, int64_t lda, const float* b, int64_t depth, float* c, int64_t ldc, bool add) {
    multiply<true>(M, N, K, a, lda, b, depth, c, ldc, add);
  }
  void outer(int64_t M, int64_t N, int64_t K, const float* a, int64_t lda, const float* b, int64_t depth, float* c, int64_t ldc, bool add) {
    multiply<false>(M, N, K, a, lda, b, depth, c, ldc, add);
  }
};

#if defined(MUE_DOT)

// The same with operands rounded to bf16 on their way into the product, by its instructions (half.h). Sums are floats.
struct Halves {
  float* left;  // A in pairs
  static constexpr int64_t L = kLanes<float>;

  // largest: elements of A, rows of it padded to pairs and to a cache line more.
  void lay_out(Memory& memory, int64_t largest) { memory.take(left, largest); }

  // The first `count` values; zeros after them.
  static Vector<float> some(const float* from, int64_t count) { return load_some<float>(from, count < L ? count : L); }
  // Rows k and k + 1 of (K, N) from column n on, in pairs.
  static Vector<float> two(const float* from, int64_t apart, int64_t k, int64_t K, int64_t n, int64_t N) {
    return Rounding::across(some(from + k * apart + n, N - n), k + 1 < K ? some(from + (k + 1) * apart + n, N - n) : Vector<float>{});
  }

  static void pack(float* to, const float* from, int64_t K, int64_t N) { finish(to, from, N, K, N); }
  static float* place(float*, float* rows, int64_t apart, int64_t r, int64_t c, int64_t) { return rows + r * apart + c; }
  static void finish(float* to, const float* from, int64_t apart, int64_t K, int64_t N) {
    int64_t depth = (K + 1) / 2;
    for (int64_t k = 0; k < K; k += 2)
      for (int64_t n = 0; n < N; n += L)
        store(to + n / kPanel * kPanel * depth + k / 2 * kPanel + n % kPanel, two(from, apart, k, K, n, N));
  }

  static void pack_transposed(float* to, const float* from, int64_t K, int64_t N) {
    int64_t depth = (K + 1) / 2;
    Vector<float> square[L];
    for (int64_t n = 0; n < up_to(N, kPanel); n += L)
      for (int64_t k = 0; k < depth; k += L) {
        for (int64_t i = 0; i < L; i++) square[i] = n + i < N ? pairs(from + (n + i) * K + 2 * k, K - 2 * k) : Vector<float>{};
        transpose<float>(square);
        float* at = to + n / kPanel * kPanel * depth + k * kPanel + n % kPanel;
        for (int64_t i = 0; i < L && i < depth - k; i++) mue::store(at + i * kPanel, square[i]);
      }
  }

  // Neighbours of a row, in pairs: 2 L of them, or what is left of it.
  static Vector<float> pairs(const float* from, int64_t left) {
    return Rounding::along(some(from, left), left > L ? some(from + L, left - L) : Vector<float>{});
  }

  void rows(int64_t M, int64_t N, int64_t K, const float* a, int64_t lda, const float* b, int64_t depth, float* c, int64_t ldc, bool add) {
    int64_t apart = up_to((K + 1) / 2, L) + L;
    for (int64_t m = 0; m < M; m++)
      for (int64_t k = 0; k < K; k += 2 * L) mue::store(left + m * apart + k / 2, pairs(a + m * lda + k, K - k));
    products<true>(M, N, K, apart, b, depth, c, ldc, add);
  }

  void outer(int64_t M, int64_t N, int64_t K, const float* a, int64_t lda, const float* b, int64_t depth, float* c, int64_t ldc, bool add) {
    int64_t apart = up_to(M, L) + L;
    for (int64_t k = 0; k < K; k += 2)
      for (int64_t m = 0; m < M; m += L) mue::store(left + k / 2 * apart + m, two(a, lda, k, K, m, M));
    products<false>(M, N, K, apart, b, depth, c, ldc, add);
  }

  template <bool unit_column>
  void products(int64_t M, int64_t N, int64_t K, int64_t apart, const float* b, int64_t depth, float* c, int64_t ldc, bool add) {
    auto pairs = [](const float* from) { return reinterpret_cast<const Pair*>(from); };
    multiply<unit_column>(M, N, (K + 1) / 2, pairs(left), apart, pairs(b), (depth + 1) / 2, c, ldc, add);
  }
};

#endif

// f(c, n) for the vectors of `count` values.
template <class F> inline void vectors(int64_t count, F&& f) {
  for (int64_t c = 0; c < count; c += kRowLanes) f(c, lanes_left(count, c));
}

// to = x + factor y; x null: to = factor y.
inline void add_scaled(float* to, const float* x, float factor, const float* y, int64_t count) {
  vectors(count, [&](int64_t c, int64_t n) {
    RowVector value = factor * load_some<float>(y + c, n);
    store_some<float>(to + c, x ? value + load_some<float>(x + c, n) : value, n);
  });
}

// Shift, scale and gate of a row's sequence, or their gradients.
template <class T> struct Modulation {
  T *shift, *scale, *gate;
  template <class Call> Modulation(const Call& call, T* all, int64_t row)
      : shift(all + row / call.length * 3 * call.width), scale(shift + call.width), gate(scale + call.width) {}
};

// Rows of the call from `first` on -> normed, and modulated where the call says so.
template <class Call> void norm_rows(const Call& call, int64_t first, int64_t rows, float* inverse, float* normed) {
  for (int64_t r = 0, D = call.width; r < rows; r++) {
    float* n = normed + r * D;
    inverse[r] = norm_row(call.x + (first + r) * D, call.gain, nullptr, D, call.eps, n);
    if (!call.modulation) continue;
    Modulation<const float> by(call, call.modulation, first + r);
    vectors(D, [&](int64_t c, int64_t k) {
      RowVector scaled = load_some<float>(n + c, k) * (1.0f + load_some<float>(by.scale + c, k));
      store_some<float>(n + c, scaled + load_some<float>(by.shift + c, k), k);
    });
  }
}

// The gradient of norm_rows' result, which it changes -> dx, beside that of the sum; adds to those of gain, shift and scale.
template <class Call> void norm_rows_backward(const Call& call, int64_t first, int64_t rows, const float* inverse, float* gradient, float* dgain) {
  int64_t D = call.width;
  float* dx = call.dx + first * D;
  for (int64_t r = 0; r < rows; r++) {
    const float* x = call.x + (first + r) * D;
    float* d = gradient + r * D;
    if (call.modulation) {
      Modulation<const float> by(call, call.modulation, first + r);
      Modulation<float> sum(call, call.dmodulation, first + r);
      vectors(D, [&](int64_t c, int64_t k) {
        RowVector value = load_some<float>(d + c, k), n = load_some<float>(x + c, k) * inverse[r] * load_some<float>(call.gain + c, k);
        store_some<float>(sum.shift + c, load_some<float>(sum.shift + c, k) + value, k);
        store_some<float>(sum.scale + c, load_some<float>(sum.scale + c, k) + value * n, k);
        store_some<float>(d + c, value * (1.0f + load_some<float>(by.scale + c, k)), k);
      });
    }
    norm_row_backward(x, call.gain, nullptr, D, inverse[r], d, dx + r * D, dgain);
  }
  add_scaled(dx, dx, 1, call.dout + first * D, rows * D);
}

// out = x + residual gate branch for rows from `first` on.
template <class Call> void add_branch(const Call& call, int64_t first, int64_t rows, const float* branch) {
  int64_t D = call.width;
  if (!call.modulation) return add_scaled(call.out + first * D, call.x + first * D, call.residual, branch, rows * D);
  std::copy_n(branch, rows * D, call.branch + first * D);
  for (int64_t r = first; r < first + rows; r++) {
    Modulation<const float> by(call, call.modulation, r);
    vectors(D, [&](int64_t c, int64_t k) {
      RowVector gated = float(call.residual) * load_some<float>(by.gate + c, k) * load_some<float>(call.branch + r * D + c, k);
      store_some<float>(call.out + r * D + c, load_some<float>(call.x + r * D + c, k) + gated, k);
    });
  }
}

// gradient = that of the branch for rows from `first` on; adds to that of the gate. A sequence's first row begins the sums of its modulation.
template <class Call> void add_branch_backward(const Call& call, int64_t first, int64_t rows, float* gradient) {
  int64_t D = call.width;
  if (!call.modulation) return add_scaled(gradient, nullptr, call.residual, call.dout + first * D, rows * D);
  for (int64_t r = first; r < first + rows; r++) {
    Modulation<const float> by(call, call.modulation, r);
    Modulation<float> sum(call, call.dmodulation, r);
    if (r % call.length == 0) std::fill_n(sum.shift, 3 * D, 0.0f);
    vectors(D, [&](int64_t c, int64_t k) {
      RowVector value = float(call.residual) * load_some<float>(call.dout + r * D + c, k);
      store_some<float>(gradient + (r - first) * D + c, value * load_some<float>(by.gate + c, k), k);
      store_some<float>(sum.gate + c, load_some<float>(sum.gate + c, k) + value * load_some<float>(call.branch + r * D + c, k), k);
    });
  }
}

// What bf16 would leave of values.
inline void round_to_half(float* values, int64_t count) {
  vectors(count, [&](int64_t c, int64_t n) {
    bf16 half[kRowLanes];
    store(half, load_some<float>(values + c, n));
    store_some<float>(values + c, load(half), n);
  });
}

// One array of a call moved on to a variant's part.
template <class T> inline void advance(T*& array, int64_t count) {
  if (array) array += count;
}

// The call's pieces, all of one variant's before the next one's, in shares for its threads.
struct Shares {
  int64_t pieces, total, threads;  // pieces: of a variant
  template <class Call> Shares(const Call& call, int64_t pieces) : pieces(pieces), total(call.variants * pieces), threads(call.threads) {}
  int64_t begin(int64_t thread) const { return total * thread / threads; }
  // Whether a thread begins with what is left of a variant.
  bool divides(int64_t thread) const { return begin(thread) < begin(thread + 1) && begin(thread) % pieces; }
};

// f(worker, thread, variant, first, last): some pieces of a variant, for every variant that has any in a thread's share.
template <class Worker, class Call, class F> int32_t each(const Call& call, const Shares& shares, F&& f) {
  bool failed = false;
  bool ran = parallel(call.threads, [&](int64_t thread) {
    void* base = scratch(kSublayer, Worker(call).lay_out(nullptr));
    if (!base) { failed = true; return; }
    for (int64_t at = shares.begin(thread), end = shares.begin(thread + 1), next; at < end; at = next) {
      int64_t variant = at / shares.pieces, start = variant * shares.pieces;
      next = std::min(end, start + shares.pieces);
      Call own = Worker::variant(call, variant);
      Worker worker(own);
      worker.lay_out(static_cast<char*>(base));
      f(worker, thread, variant, at - start, next - start);
    }
  });
  return !ran ? kNoParallel : failed ? kNoMemory : kFine;
}

// f(the products that a call asks for).
template <class Call, class F> int32_t with_products(const Call& call, F&& f) {
#if defined(MUE_DOT)
  if (call.products == kHalves) return f(Halves{});
#endif
  (void)call;
  return f(Floats{});
}

template <class Worker, class Call> int32_t run_forward(const Call& call) {
  return each<Worker>(call, Shares(call, Worker(call).pieces()), [](Worker& worker, int64_t, int64_t, int64_t first, int64_t last) {
    worker.prepare_forward();
    for (int64_t i = first; i < last; i++) worker.forward(i);
  });
}

// Who has a variant's first piece sums gradients where they belong, another thread beside it.
template <class Worker, class Call> int32_t run_backward(const Call& call) {
  Shares shares(call, Worker(call).pieces());
  int64_t size = Worker(call).sums(nullptr), others = call.threads - 1;
  float* partial = others ? static_cast<float*>(scratch(kPartials, others * size * 4)) : nullptr;
  if (others && !partial) return kNoMemory;
  int32_t status = each<Worker>(call, shares, [&](Worker& worker, int64_t thread, int64_t variant, int64_t first, int64_t last) {
    float* mine = first ? partial + (thread - 1) * size : call.gradients + variant * size;
    std::fill_n(mine, size, 0.0f);
    worker.sums(mine);
    worker.prepare_backward();
    for (int64_t i = first; i < last; i++) worker.backward(i);
  });
  if (status != kFine) return status;
  bool ran = parallel(call.threads, [&](int64_t i) {
    int64_t first = size * i / call.threads, count = size * (i + 1) / call.threads - first;
    for (int64_t thread = 1; thread < call.threads; thread++) {
      if (!shares.divides(thread)) continue;
      float* sum = call.gradients + shares.begin(thread) / shares.pieces * size + first;
      add_scaled(sum, sum, 1, partial + (thread - 1) * size + first, count);
    }
  });
  return ran ? kFine : kNoParallel;
}

}  // namespace mue
