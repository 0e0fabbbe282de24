// A dense feed-forward network between norm and sum, gated or not, forward and backward, in float (products: see sublayer.h).
//
// Kept for the backward: gate x and up x.
#include "activation.h"
#include "sublayer.h"

namespace mue {
namespace {

// One thread's work, in pieces of `span` tokens, each computed in parts of at most `size`, which is at most kRows and chosen so that all
// threads get as many. A piece is one part, but of modulated sequences: it is whole ones then, as many as a part holds or one, so that
// no other thread touches their sums.
template <class P> struct Rows {
  P products;
  const FeedForward& call;
  const int64_t D = call.width, H = call.inner, ldh = H + kRowLanes;  // rows apart by a power of two share cache lines
  const bool gated = call.gate != nullptr;
  static constexpr int64_t kRows = 96;
  const int64_t share = (call.rows + call.threads - 1) / call.threads, parts = (share + kRows - 1) / kRows;
  const int64_t size = up_to((share + parts - 1) / parts, 8);
  const int64_t span = call.modulation ? call.length * std::max<int64_t>(1, size / call.length) : size;

  float *packed_gate, *packed_up, *packed_down, *normed, *branch, *hidden, *dgate, *dup, *right, *inverse;
  float *sum_gain, *sum_gate, *sum_up, *sum_down;

  explicit Rows(const FeedForward& call) : call(call) {}

  // What of the call is one variant's.
  static FeedForward variant(const FeedForward& call, int64_t v) {
    FeedForward own = call;
    int64_t D = call.width, H = call.inner;
    advance(own.gain, v * D);
    for (auto matrix : {&own.gate, &own.up, &own.down}) advance(*matrix, v * H * D);
    for (auto rows : {&own.x, &own.dout}) advance(*rows, v * call.rows * D);
    for (auto rows : {&own.out, &own.dx, &own.branch}) advance(*rows, v * call.rows * D);
    advance(own.modulation, v * call.rows / call.length * 3 * D), advance(own.dmodulation, v * call.rows / call.length * 3 * D);
    for (auto rows : {&own.gate_rows, &own.up_rows}) advance(*rows, v * call.rows * H);
    return own;
  }

  int64_t pieces() const { return (call.rows + span - 1) / span; }

  // f(first, rows) for the parts of a piece.
  template <class F> void parts_of(int64_t piece, F&& f) {
    for (int64_t first = piece * span, end = std::min(first + span, call.rows); first < end; first += size)
      f(first, std::min(size, end - first));
  }

  int64_t lay_out(char* base) {
    Memory memory{base};
    int64_t padded = up_to(D, kPanel), inner = up_to(H, kPanel);
    for (auto buffer : {&packed_gate, &packed_up, &packed_down}) memory.take(*buffer, buffer == &packed_gate && !gated ? 0 : padded * inner);
    for (auto buffer : {&normed, &branch}) memory.take(*buffer, kRows * D);
    for (auto buffer : {&hidden, &dgate, &dup}) memory.take(*buffer, kRows * ldh);
    memory.take(right, kRows * std::max(padded, inner)), memory.take(inverse, kRows);
    products.lay_out(memory, (kRows + 1) * (std::max(D, H) + 2 * kPanel));
    return memory.at - base;
  }

  // Where the weights' gradients are summed, one after the other; how many they are.
  int64_t sums(float* base) {
    sum_gain = base, sum_gate = sum_gain + D, sum_up = sum_gate + (gated ? H * D : 0), sum_down = sum_up + H * D;
    return sum_down + D * H - base;
  }

  void round(float* values, int64_t count) const {
    if (call.products == kRounded) round_to_half(values, count);
  }

  void norm(int64_t first, int64_t rows) {
    norm_rows(call, first, rows, inverse, normed);
    round(normed, rows * D);
  }

  void prepare_forward() {
    for (auto [to, from] : {std::pair(packed_gate, call.gate), {packed_up, call.up}}) {
      if (!from) continue;
      P::pack_transposed(to, from, D, H);
      round(to, D * up_to(H, kPanel));
    }
    P::pack_transposed(packed_down, call.down, H, D);
    round(packed_down, H * up_to(D, kPanel));
  }

  void forward(int64_t piece) {
    parts_of(piece, [&](int64_t first, int64_t rows) { forward(first, rows); });
  }

  void forward(int64_t first, int64_t rows) {
    float *gate = gated ? call.gate_rows + first * H : nullptr, *up = call.up_rows + first * H;
    norm(first, rows);
    if (gated) products.rows(rows, H, D, normed, D, packed_gate, D, gate, H, false), round(gate, rows * H);
    products.rows(rows, H, D, normed, D, packed_up, D, up, H, false), round(up, rows * H);
    for (int64_t r = 0; r < rows; r++)
      vectors(H, [&](int64_t h, int64_t n) {
        RowVector u = load_some<float>(up + r * H + h, n);
        store_some<float>(hidden + r * ldh + h, gated ? activated<float>(load_some<float>(gate + r * H + h, n), u) : activated<float>(u), n);
      });
    round(hidden, rows * ldh);
    products.rows(rows, D, H, hidden, ldh, packed_down, H, branch, D, false);
    round(branch, rows * D);
    add_branch(call, first, rows, branch);
  }

  void prepare_backward() {
    for (auto [to, from] : {std::pair(packed_gate, call.gate), {packed_up, call.up}}) {
      if (!from) continue;
      P::pack(to, from, H, D);
      round(to, H * up_to(D, kPanel));
    }
    P::pack(packed_down, call.down, D, H);
    round(packed_down, D * up_to(H, kPanel));
  }

  void backward(int64_t piece) {
    parts_of(piece, [&](int64_t first, int64_t rows) { backward(first, rows); });
  }

  void backward(int64_t first, int64_t rows) {
    add_branch_backward(call, first, rows, branch);
    round(branch, rows * D);
    products.rows(rows, H, D, branch, D, packed_down, D, hidden, ldh, false);
    round(hidden, rows * ldh);
    activation_backward(first, rows);
    products.outer(D, H, rows, branch, D, right, rows, sum_down, H, true);
    norm(first, rows);
    P::pack(right, normed, rows, D);
    if (gated) {
      products.outer(H, D, rows, dgate, ldh, right, rows, sum_gate, D, true);
      products.rows(rows, D, H, dgate, ldh, packed_gate, H, branch, D, false);
    }
    products.outer(H, D, rows, dup, ldh, right, rows, sum_up, D, true);
    products.rows(rows, D, H, dup, ldh, packed_up, H, branch, D, gated);
    norm_rows_backward(call, first, rows, inverse, branch, sum_gain);
  }

  // The gradient of the activation lies in `hidden`. Leaves the activation itself in `right`.
  void activation_backward(int64_t first, int64_t rows) {
    const float *gate = gated ? call.gate_rows + first * H : nullptr, *up = call.up_rows + first * H;
    for (int64_t r = 0; r < rows; r++)
      vectors(H, [&](int64_t h, int64_t n) {
        RowVector u = load_some<float>(up + r * H + h, n), dhidden = load_some<float>(hidden + r * ldh + h, n);
        Slopes<float> at = gated ? slopes<float>(load_some<float>(gate + r * H + h, n), u) : slopes<float>(u);
        if (gated) store_some<float>(dgate + r * ldh + h, dhidden * at.by_gate, n);
        store_some<float>(dup + r * ldh + h, dhidden * at.by_up, n);
        store(P::place(right, hidden, ldh, r, h, rows), at.value);
      });
    P::finish(right, hidden, ldh, rows, H);
    if (gated) round(dgate, rows * ldh);
    round(dup, rows * ldh), round(right, rows * up_to(H, kPanel));
  }
};

}  // namespace
}  // namespace mue

extern "C" {

int32_t mue_feed_forward_forward(const FeedForward* call) { return mue::with_products(*call, [&](auto of) { return mue::run_forward<mue::Rows<decltype(of)>>(*call); }); }
int32_t mue_feed_forward_backward(const FeedForward* call) { return mue::with_products(*call, [&](auto of) { return mue::run_backward<mue::Rows<decltype(of)>>(*call); }); }

}  // extern "C"
