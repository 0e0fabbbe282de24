// RMSNorm, with or without RoPE, in one pass forward and one backward.
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace mue {
namespace {

constexpr int L = kLanes<float>;
using V = Vector<float>;
using Index = VectorOf<float>::integer;

template <class F> inline V permuted(V value, F&& from) {
  Index index;
  for (int i = 0; i < L; i++) index[i] = from(i);
  return __builtin_shuffle(value, index);
}

inline float total(V value) {
#pragma GCC unroll 4
  for (int step = L / 2; step; step /= 2) value += permuted(value, [step](int i) { return i ^ step; });
  return value[0];
}

// Neighbouring pairs (a, b) -> (a cos - b sin, a sin + b cos), or by the opposite angle.
inline V turned(V value, V turn, bool back) {
  V cosine = permuted(turn, [](int i) { return i & ~1; }), sine = permuted(turn, [](int i) { return i | 1; }), sign;
  for (int i = 0; i < L; i++) sign[i] = (i & 1) != back ? 1.0f : -1.0f;
  return value * cosine + permuted(value, [](int i) { return i ^ 1; }) * sine * sign;
}

inline int64_t left(const Norm& call, int64_t c) { return call.width - c < L ? call.width - c : L; }

// The turn of one row after the other, without a division for each.
struct Turns {
  const Norm& call;
  int64_t head, token;
  Turns(const Norm& call, int64_t row) : call(call), head(row % call.heads), token(row / call.heads % call.period) {}
  const float* next() {
    const float* turn = call.turn ? call.turn + token * call.width : nullptr;
    if (++head == call.heads) head = 0, token = token + 1 == call.period ? 0 : token + 1;
    return turn;
  }
};

template <class X> void forward(const Norm& call, const X* x, int64_t first, int64_t last) {
  int64_t D = call.width;
  Turns turns(call, first);
  for (int64_t r = first; r < last; r++) {
    const X* from = x + r * D;
    const float* turn = turns.next();
    V squares{};
    for (int64_t c = 0; c < D; c += L) {
      V value = load_some<float>(from + c, left(call, c));
      squares += value * value;
    }
    float inverse = 1.0f / std::sqrt(total(squares) / float(D) + float(call.eps));
    call.inverse[r] = inverse;
    for (int64_t c = 0; c < D; c += L) {
      int64_t n = left(call, c);
      V value = load_some<float>(from + c, n) * inverse * load_some<float>(call.gain + c, n);
      if (turn) value = turned(value, load_some<float>(turn + c, n), false);
      store_some<float>(call.y + r * D + c, value, n);
    }
  }
}

// dgain: this thread's own sums.
template <class X> void backward(const Norm& call, const X* x, X* dx, float* dgain, int64_t first, int64_t last) {
  int64_t D = call.width;
  Turns turns(call, first);
  for (int64_t r = first; r < last; r++) {
    const float* turn = turns.next();
    float inverse = call.inverse[r];
    auto straight = [&](int64_t c, int64_t n) {  // dy before the turn
      V value = load_some<float>(call.dy + r * D + c, n);
      return turn ? turned(value, load_some<float>(turn + c, n), true) : value;
    };
    V along{};
    for (int64_t c = 0; c < D; c += L) {
      int64_t n = left(call, c);
      V product = straight(c, n) * load_some<float>(x + r * D + c, n);
      along += product * load_some<float>(call.gain + c, n);
      store_some<float>(dgain + c, load_some<float>(dgain + c, n) + product * inverse, n);
    }
    if (!dx) continue;
    float share = total(along) * inverse * inverse / float(D);
    for (int64_t c = 0; c < D; c += L) {
      int64_t n = left(call, c);
      V value = straight(c, n) * load_some<float>(call.gain + c, n) - load_some<float>(x + r * D + c, n) * share;
      store_some<float>(dx + r * D + c, value * inverse, n);
    }
  }
}

// f(i, first, last): each thread's share of `count`.
template <class F> int32_t shares(int64_t threads, int64_t count, F&& f) {
  bool ran = parallel(threads, [&](int64_t i) { f(i, count * i / threads, count * (i + 1) / threads); });
  return ran ? kFine : kNoParallel;
}

template <class X> int32_t backward(const Norm& call) {
  int64_t apart = call.width + 64;  // threads that write to one cache line wait for each other
  std::vector<float> sums(call.threads * apart);
  int32_t status = shares(call.threads, call.rows, [&](int64_t i, int64_t first, int64_t last) {
    backward(call, static_cast<const X*>(call.x), static_cast<X*>(call.dx), sums.data() + i * apart, first, last);
  });
  for (int64_t c = 0; c < call.width; c++) {
    call.dgain[c] = 0;
    for (int64_t i = 0; i < call.threads; i++) call.dgain[c] += sums[i * apart + c];
  }
  return status;
}

}  // namespace
}  // namespace mue

extern "C" {

int32_t mue_norm_forward(const Norm* call) {
  using namespace mue;
  return shares(call->threads, call->rows, [&](int64_t, int64_t first, int64_t last) {
    if (call->x_type == kBFloat16) forward(*call, static_cast<const bf16*>(call->x), first, last);
    else forward(*call, static_cast<const float*>(call->x), first, last);
  });
}

int32_t mue_norm_backward(const Norm* call) {
  return call->x_type == kBFloat16 ? mue::backward<mue::bf16>(*call) : mue::backward<float>(*call);
}

}  // extern "C"
