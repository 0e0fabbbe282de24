// RMSNorm, with or without RoPE, in one pass forward and one backward.
#include "norm.h"

#include <vector>

#include "parallel.h"

namespace mue {
namespace {

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
  Turns turns(call, first);
  for (int64_t r = first, D = call.width; r < last; r++)
    call.inverse[r] = norm_row(x + r * D, call.gain, turns.next(), D, call.eps, call.y + r * D);
}

// dgain: this thread's own sums.
template <class X> void backward(const Norm& call, const X* x, X* dx, float* dgain, int64_t first, int64_t last) {
  Turns turns(call, first);
  for (int64_t r = first, D = call.width; r < last; r++)
    norm_row_backward(x + r * D, call.gain, turns.next(), D, call.inverse[r], call.dy + r * D, dx ? dx + r * D : nullptr, dgain);
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
