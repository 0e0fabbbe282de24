// What lies between the products of a feed-forward network: silu(gate) * up, or gelu(up).
#pragma once
#include "vector.h"

namespace mue {

template <class T> inline Vector<T> activated(Vector<T> gate, Vector<T> up) { return gate * sigmoid(gate) * up; }
template <class T> inline Vector<T> activated(Vector<T> up) { return up * normal(up).cdf; }

// Its value and its derivatives.
template <class T> struct Slopes { Vector<T> value, by_gate, by_up; };
template <class T> inline Slopes<T> slopes(Vector<T> gate, Vector<T> up) {
  Vector<T> open = sigmoid(gate), silu = gate * open;
  return {silu * up, up * (open + silu * (T(1) - open)), silu};
}
template <class T> inline Slopes<T> slopes(Vector<T> up) {
  auto [cdf, density] = normal(up);
  return {up * cdf, Vector<T>{}, cdf + up * density};
}

}  // namespace mue
