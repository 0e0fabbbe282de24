// Vectors (the compiler's own, so any machine), bf16, exp, and the normal distribution.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "api.h"

namespace mue {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bf16 { uint16_t bits; };

template <class T> struct VectorOf;
template <> struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef uint16_t half __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  typedef uint32_t wide __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <> struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t integer __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};
template <class T> using Vector = typename VectorOf<T>::type;
template <class T> constexpr int kLanes = kVectorBytes / sizeof(T);

inline Vector<float> load(const float* from) { return *reinterpret_cast<const Vector<float>*>(from); }
inline Vector<double> load(const double* from) { return *reinterpret_cast<const Vector<double>*>(from); }
inline Vector<float> load(const bf16* from) {
  auto half = *reinterpret_cast<const VectorOf<float>::half*>(from);
  auto wide = __builtin_convertvector(half, VectorOf<float>::wide) << 16;
  return reinterpret_cast<Vector<float>&>(wide);
}

inline void store(float* to, Vector<float> value) { *reinterpret_cast<Vector<float>*>(to) = value; }
inline void store(double* to, Vector<double> value) { *reinterpret_cast<Vector<double>*>(to) = value; }
inline void store(bf16* to, Vector<float> value) {  // round to nearest, ties to even; a NaN stays one
  auto bits = reinterpret_cast<VectorOf<float>::wide&>(value);
  auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  auto nan = reinterpret_cast<VectorOf<float>::wide>(value != value);
  rounded = (rounded & ~nan) | (0x7fc0 & nan);
  *reinterpret_cast<VectorOf<float>::half*>(to) = __builtin_convertvector(rounded, VectorOf<float>::half);
}

inline float scalar(float value) { return value; }
inline double scalar(double value) { return value; }
inline float scalar(bf16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline void put(float* to, float value) { *to = value; }
inline void put(float* to, double value) { *to = float(value); }
inline void put(double* to, double value) { *to = value; }
inline void put(bf16* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  to->bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void put(bf16* to, double value) { put(to, float(value)); }

// to[i] = from[i] with a change of type.
template <class To, class From> inline void convert(To* to, const From* from, int64_t count) {
  int64_t i = 0;
  if constexpr (std::is_same_v<To, From>) {
    std::memcpy(to, from, count * sizeof(To));
  } else {
    if constexpr (!std::is_same_v<To, double> && !std::is_same_v<From, double>)
      for (; i + kLanes<float> <= count; i += kLanes<float>) store(to + i, load(from + i));
    for (; i < count; i++) put(to + i, scalar(from[i]));
  }
}

// One vector of it, or what is left of one.
template <class To, class From> inline void convert_vector(To* to, const From* from, int64_t left) {
  constexpr int64_t L = kVectorBytes / (std::is_same_v<To, double> ? 8 : 4);
  if constexpr (std::is_same_v<To, double> == std::is_same_v<From, double>)
    if (left >= L) return store(to, load(from));
  convert(to, from, left < L ? left : L);
}

// The first `count` values of a vector; zeros after them. Users' tensors end where they end.
template <class Out, class T> inline Vector<Out> load_some(const T* from, int64_t count) {
  if (count >= kLanes<Out>) return load(from);
  Vector<Out> value{};
  for (int64_t i = 0; i < count; i++) value[i] = scalar(from[i]);
  return value;
}
template <class Out, class T> inline void store_some(T* to, Vector<Out> value, int64_t count) {
  if (count >= kLanes<Out>) return store(to, value);
  for (int64_t i = 0; i < count; i++) put(to + i, value[i]);
}

// Calls f with a typed null pointer for the type named at run time.
template <class F> inline auto with_type(int64_t type, F&& f) {
  if (type == kDouble) return f(static_cast<double*>(nullptr));
  if (type == kBFloat16) return f(static_cast<bf16*>(nullptr));
  return f(static_cast<float*>(nullptr));
}

// exp to about 1 ulp: 2^n times a polynomial in |r| <= ln2/2 (the coefficients are Cephes'). Saturates, keeps NaN.
inline Vector<float> exp(Vector<float> x) {
  using V = Vector<float>;
  x = x < -87.0f ? V{} - 87.0f : x;
  x = x > 88.0f ? V{} + 88.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  V shifted = x * 1.44269504089f + magic, n = shifted - magic;
  V r = x - n * 0.693359375f + n * 2.12194440e-4f;
  V p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
         1.6666665459e-1f) * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  auto exponent = (reinterpret_cast<VectorOf<float>::integer&>(shifted) << 23) + 0x3f800000;  // magic's own bits shift out
  return p * reinterpret_cast<V&>(exponent);
}
inline Vector<double> exp(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; i++) x[i] = std::exp(x[i]);
  return x;
}

template <class V> inline V sigmoid(V x) { return 1 / (1 + exp(-x)); }

// The normal distribution: its function, float to 1e-7 (Abramowitz and Stegun 7.1.26), and its density.
template <class T> struct Normal { Vector<T> cdf, density; };
inline Normal<float> normal(Vector<float> x) {
  Vector<float> t = 1.0f / (1.0f + 0.23164189f * (x < 0.0f ? -x : x)), bell = exp(-0.5f * x * x);
  Vector<float> tail = ((((0.5307027145f * t - 0.7265760135f) * t + 0.7107068705f) * t - 0.142248368f) * t + 0.127414796f) * t;
  tail *= bell;
  return {x < 0.0f ? tail : 1.0f - tail, 0.3989422804f * bell};
}
inline Normal<double> normal(Vector<double> x) {
  Normal<double> found{{}, 0.398942280401432678 * exp(-0.5 * x * x)};
  for (int i = 0; i < kLanes<double>; i++) found.cdf[i] = 0.5 * std::erfc(-x[i] * 0.70710678118654752);
  return found;
}

}  // namespace mue
