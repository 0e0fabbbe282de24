// What lies between the products of a feed-forward network: silu(gate) * up, or gelu(up).
#pragma once
#include "vector.h"

namespace mue {

// The sigmoid to four digits, for results that are rounded to three (bf16): a shorter series, and no division where there is a
// reciprocal.
inline Vector<float> rough_sigmoid(Vector<float> x) {
  using V = Vector<float>;
  const float magic = 12582912.0f;  // see exp
  V power = x * -1.44269504f;
  power = power < -126.0f ? V{} - 126.0f : power;
  power = power > 126.0f ? V{} + 126.0f : power;
  V shifted = power + magic, r = power - (shifted - magic);
  V p = (((0.0096181f * r + 0.0555041f) * r + 0.2402265f) * r + 0.6931472f) * r + 1.0f;  // the series of 2^r
  auto exponent = (reinterpret_cast<VectorOf<float>::integer&>(shifted) << 23) + 0x3f800000;
  V below = 1.0f + p * reinterpret_cast<V&>(exponent);
#if defined(__AVX512F__)
  V open;
  asm("vrcp14ps %1, %0" : "=v"(open) : "v"(below));
  return open;
#else
  return 1.0f / below;
#endif
}
template <bool rough, class T> inline Vector<T> sigmoid_of(Vector<T> x) {
  if constexpr (rough) return rough_sigmoid(x);
  else return sigmoid(x);
}

template <class T, bool rough = false> inline Vector<T> activated(Vector<T> gate, Vector<T> up) { return gate * sigmoid_of<rough, T>(gate) * up; }
template <class T> inline Vector<T> activated(Vector<T> up) { return up * normal(up).cdf; }

// Its value and its derivatives.
template <class T> struct Slopes { Vector<T> value, by_gate, by_up; };
template <class T, bool rough = false> inline Slopes<T> slopes(Vector<T> gate, Vector<T> up) {
  Vector<T> open = sigmoid_of<rough, T>(gate), silu = gate * open;
  return {silu * up, up * (open + silu * (T(1) - open)), silu};
}
template <class T> inline Slopes<T> slopes(Vector<T> up) {
  auto [cdf, density] = normal(up);
  return {up * cdf, Vector<T>{}, cdf + up * density};
}

}  // namespace mue
