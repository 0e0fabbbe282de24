// RMSNorm of one row, with or without RoPE after it.
#pragma once
#include "vector.h"

namespace mue {

using RowVector = Vector<float>;
constexpr int kRowLanes = kLanes<float>;

template <class F> inline RowVector permuted(RowVector value, F&& from) {
  VectorOf<float>::integer index;
  for (int i = 0; i < kRowLanes; i++) index[i] = from(i);
  return __builtin_shuffle(value, index);
}

// Folds all lanes into one by `f`.
template <class F> inline float folded(RowVector value, F&& f) {
#pragma GCC unroll 4
  for (int step = kRowLanes / 2; step; step /= 2) value = f(value, permuted(value, [step](int i) { return i ^ step; }));
  return value[0];
}
inline float total(RowVector value) {
  return folded(value, [](RowVector a, RowVector b) { return a + b; });
}

// Neighbouring pairs (a, b) -> (a cos - b sin, a sin + b cos), or by the opposite angle.
inline RowVector turned(RowVector value, RowVector turn, bool back) {
  RowVector cosine = permuted(turn, [](int i) { return i & ~1; }), sine = permuted(turn, [](int i) { return i | 1; }), sign;
  for (int i = 0; i < kRowLanes; i++) sign[i] = (i & 1) != back ? 1.0f : -1.0f;
  return value * cosine + permuted(value, [](int i) { return i ^ 1; }) * sine * sign;
}

inline int64_t lanes_left(int64_t width, int64_t c) { return width - c < kRowLanes ? width - c : kRowLanes; }

template <class X> inline float inverse_rms(const X* x, int64_t width, double eps) {
  RowVector squares{};
  for (int64_t c = 0; c < width; c += kRowLanes) {
    RowVector value = load_some<float>(x + c, lanes_left(width, c));
    squares += value * value;
  }
  return 1.0f / std::sqrt(total(squares) / float(width) + float(eps));
}

// to = turned(x / rms(x) * gain); returns 1 / rms(x). No turn: null.
template <class X> inline float norm_row(const X* x, const float* gain, const float* turn, int64_t width, double eps, float* to) {
  float inverse = inverse_rms(x, width, eps);
  for (int64_t c = 0; c < width; c += kRowLanes) {
    int64_t n = lanes_left(width, c);
    RowVector value = load_some<float>(x + c, n) * inverse * load_some<float>(gain + c, n);
    if (turn) value = turned(value, load_some<float>(turn + c, n), false);
    store_some<float>(to + c, value, n);
  }
  return inverse;
}

// The gradients of norm_row: adds to dgain; writes dx unless null.
template <class X>
inline void norm_row_backward(const X* x, const float* gain, const float* turn, int64_t width, float inverse, const float* dy,
                              X* dx, float* dgain) {
  auto straight = [&](int64_t c, int64_t n) {  // dy before the turn
    RowVector value = load_some<float>(dy + c, n);
    return turn ? turned(value, load_some<float>(turn + c, n), true) : value;
  };
  RowVector along{};
  for (int64_t c = 0; c < width; c += kRowLanes) {
    int64_t n = lanes_left(width, c);
    RowVector product = straight(c, n) * load_some<float>(x + c, n);
    along += product * load_some<float>(gain + c, n);
    store_some<float>(dgain + c, load_some<float>(dgain + c, n) + product * inverse, n);
  }
  if (!dx) return;
  float share = total(along) * inverse * inverse / float(width);
  for (int64_t c = 0; c < width; c += kRowLanes) {
    int64_t n = lanes_left(width, c);
    RowVector value = straight(c, n) * load_some<float>(gain + c, n) - load_some<float>(x + c, n) * share;
    store_some<float>(dx + c, value * inverse, n);
  }
}

}  // namespace mue
