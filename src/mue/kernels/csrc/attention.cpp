// Softmax attention between norm and sum, with QK-norm, causal with RoPE or over all tokens, forward and backward, in float (products: see sublayer.h).
//
// Logits exist for kQueries queries of one head at a time, and only for keys that those may see. Kept for the backward: q, k
// and v before their norms, attention's result and the logarithm of each softmax's sum; the rest is cheaper to compute again.
#include "sublayer.h"

namespace mue {
namespace {

using V = RowVector;
constexpr int64_t L = kRowLanes, kQueries = 32;

// The lanes before `count`, elsewhere `other`.
inline V first_lanes(V value, int64_t count, float other) {
  if (count >= L) return value;
  VectorOf<float>::integer lane;
  for (int i = 0; i < L; i++) lane[i] = i;
  return lane < int32_t(count) ? value : V{} + other;
}

// The first n of a row's logits -> exponentials, zeros from there to `end`. Returns their sum and the largest logit.
inline std::pair<float, float> exponentials(float* row, int64_t n, int64_t end) {
  V top = V{} - INFINITY, sum{};
  for (int64_t c = 0; c < n; c += L) {
    V value = first_lanes(load(row + c), n - c, -INFINITY);
    top = value > top ? value : top;
  }
  float largest = folded(top, [](V a, V b) { return a > b ? a : b; });
  for (int64_t c = 0; c < end; c += L) {
    V value = c < n ? first_lanes(exp(load(row + c) - largest), n - c, 0) : V{};
    store(row + c, value);
    sum += value;
  }
  return {total(sum), largest};
}

// Logits -> probabilities in `row`, their gradients -> those of the logits in `drow`; zeros from n to `end`.
inline void softmax_backward(float* row, float* drow, float log_sum, int64_t n, int64_t end) {
  V along{};
  for (int64_t c = 0; c < end; c += L) {
    V value = c < n ? first_lanes(exp(load(row + c) - log_sum), n - c, 0) : V{};
    store(row + c, value);
    along += value * load(drow + c);
  }
  float mean = total(along);
  for (int64_t c = 0; c < end; c += L) store(drow + c, load(row + c) * (load(drow + c) - mean));
}

// One thread's work; a piece is a sequence.
template <class P> struct Heads {
  P products;
  const Attention& call;
  const int64_t T = call.length, D = call.width, E = call.head_dim, H = call.heads, K = call.kv_heads, group = H / K;
  const int64_t row = (H + 2 * K) * E;  // of q, k and v side by side
  const int64_t ldp = up_to(T, kPanel) + L;  // of logits; not a power of two
  const int64_t wide[3] = {H * E, K * E, K * E}, begin[3] = {0, H * E, (H + K) * E};
  const float* const weight[3] = {call.q, call.k, call.v};

  float *packed[3], *packed_o;                                 // weights
  float *normed, *branch, *dy, *dqkv, *right, *inverse;        // of a sequence
  float *query, *key, *value, *dkey, *dvalue;                  // of a head (T, E), ...
  float *key_columns, *value_columns, *key_rows, *value_rows;  // ... packed
  float *p, *dp, *block, *dblock, *scaled_gain, *dscaled_gain;
  float *sum_gain, *sum_qkv[3], *sum_q_gain, *sum_k_gain, *sum_o;

  explicit Heads(const Attention& call) : call(call) {}

  // What of the call is one variant's.
  static Attention variant(const Attention& call, int64_t v) {
    Attention own = call;
    int64_t D = call.width, E = call.head_dim, all = call.heads * E, each = call.kv_heads * E, tokens = call.batch * call.length;
    advance(own.gain, v * D), advance(own.q, v * all * D), advance(own.k, v * each * D), advance(own.v, v * each * D);
    advance(own.q_gain, v * E), advance(own.k_gain, v * E), advance(own.o, v * D * all);
    for (auto rows : {&own.x, &own.dout}) advance(*rows, v * tokens * D);
    for (auto rows : {&own.out, &own.dx, &own.branch}) advance(*rows, v * tokens * D);
    advance(own.modulation, v * call.batch * 3 * D), advance(own.dmodulation, v * call.batch * 3 * D);
    advance(own.qkv, v * tokens * (all + 2 * each)), advance(own.y, v * tokens * all), advance(own.log_sum, v * tokens * call.heads);
    return own;
  }

  int64_t pieces() const { return call.batch; }

  int64_t lay_out(char* base) {
    Memory memory{base};
    int64_t padded = up_to(D, kPanel), heads = up_to(H * E, kPanel), head = up_to(E, kPanel);
    for (int i = 0; i < 3; i++) memory.take(packed[i], padded * up_to(wide[i], kPanel));
    memory.take(packed_o, padded * heads);
    for (auto buffer : {&normed, &branch}) memory.take(*buffer, T * D);
    memory.take(dy, T * H * E), memory.take(dqkv, T * row), memory.take(right, T * std::max(padded, heads)), memory.take(inverse, T);
    for (auto buffer : {&query, &key, &value, &dkey, &dvalue}) memory.take(*buffer, T * E);
    for (auto buffer : {&key_columns, &value_columns}) memory.take(*buffer, E * up_to(T, kPanel));
    for (auto buffer : {&key_rows, &value_rows}) memory.take(*buffer, T * head);
    for (auto buffer : {&p, &dp}) memory.take(*buffer, kQueries * ldp);
    for (auto buffer : {&block, &dblock}) memory.take(*buffer, kQueries * head);
    for (auto buffer : {&scaled_gain, &dscaled_gain}) memory.take(*buffer, E);
    products.lay_out(memory, std::max((T + 1) * (std::max(D, H * E) + 2 * kPanel), kQueries * (T + 2 * kPanel)));
    return memory.at - base;
  }

  // Where the weights' gradients are summed, one after the other; how many they are.
  int64_t sums(float* base) {
    float* at = base;
    auto take = [&](float*& place, int64_t count) { place = at, at += count; };
    take(sum_gain, D);
    for (int i = 0; i < 3; i++) take(sum_qkv[i], wide[i] * D);
    take(sum_q_gain, E), take(sum_k_gain, E), take(sum_o, D * H * E);
    return at - base;
  }

  void round(float* values, int64_t count) const {
    if (call.products == kRounded) round_to_half(values, count);
  }

  void norm(int64_t b) {
    norm_rows(call, b * T, T, inverse, normed);
    round(normed, T * D);
  }

  const float* turn(int64_t t) const { return call.turn ? call.turn + t * E : nullptr; }
  // How many tokens t attends to.
  int64_t seen(int64_t t) const { return call.turn ? t + 1 : T; }

  // A head's part of rows, normed and turned.
  void turn_head(float* to, const float* from, const float* gain) {
    for (int64_t t = 0; t < T; t++) norm_row(from + t * row, gain, turn(t), E, call.eps, to + t * E);
  }

  void keys_and_values(const float* qkv, int64_t kv) {
    turn_head(key, qkv + begin[1] + kv * E, call.k_gain);
    for (int64_t t = 0; t < T; t++) convert(value + t * E, qkv + begin[2] + kv * E + t * row, E);
    P::pack_transposed(key_columns, key, E, T);
  }

  // f(first, rows, keys) for blocks of queries; keys: how many they see, and after them zeros fill a panel.
  template <class F> void blocks(F&& f) {
    for (int64_t t = 0; t < T; t += kQueries) {
      int64_t rows = T - t < kQueries ? T - t : kQueries;
      f(t, rows, up_to(seen(t + rows - 1), kPanel));
    }
  }

  void prepare_forward() {
    add_scaled(scaled_gain, nullptr, call.scale, call.q_gain, E);
    for (int i = 0; i < 3; i++) {
      P::pack_transposed(packed[i], weight[i], D, wide[i]);
      round(packed[i], D * up_to(wide[i], kPanel));
    }
    P::pack_transposed(packed_o, call.o, H * E, D);
    round(packed_o, H * E * up_to(D, kPanel));
  }

  void forward(int64_t b) {
    float *qkv = call.qkv + b * T * row, *y = call.y + b * T * H * E;
    norm(b);
    for (int i = 0; i < 3; i++) products.rows(T, wide[i], D, normed, D, packed[i], D, qkv + begin[i], row, false);
    round(qkv, T * row);
    for (int64_t kv = 0; kv < K; kv++) {
      keys_and_values(qkv, kv);
      P::pack(value_rows, value, T, E);
      for (int64_t h = kv * group; h < (kv + 1) * group; h++) attend(qkv, y + h * E, h, call.log_sum + (b * H + h) * T);
    }
    round(y, T * H * E);
    products.rows(T, D, H * E, y, H * E, packed_o, H * E, branch, D, false);
    round(branch, T * D);
    add_branch(call, b * T, T, branch);
  }

  void attend(const float* qkv, float* y, int64_t h, float* log_sum) {
    turn_head(query, qkv + h * E, scaled_gain);
    blocks([&](int64_t first, int64_t rows, int64_t keys) {
      float share[kQueries];
      products.rows(rows, keys, E, query + first * E, E, key_columns, E, p, ldp, false);
      for (int64_t r = 0; r < rows; r++) {
        auto [sum, largest] = exponentials(p + r * ldp, seen(first + r), keys);
        log_sum[first + r] = largest + std::log(sum);
        share[r] = 1 / sum;
      }
      products.rows(rows, E, seen(first + rows - 1), p, ldp, value_rows, T, block, E, false);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < E; c += L) {
          int64_t n = lanes_left(E, c);
          store_some<float>(y + (first + r) * H * E + c, load_some<float>(block + r * E + c, n) * share[r], n);
        }
    });
  }

  void prepare_backward() {
    add_scaled(scaled_gain, nullptr, call.scale, call.q_gain, E);
    for (int i = 0; i < 3; i++) {
      P::pack(packed[i], weight[i], wide[i], D);
      round(packed[i], wide[i] * up_to(D, kPanel));
    }
    P::pack(packed_o, call.o, D, H * E);
    round(packed_o, D * up_to(H * E, kPanel));
  }

  void backward(int64_t b) {
    const float* qkv = call.qkv + b * T * row;
    add_branch_backward(call, b * T, T, branch);
    round(branch, T * D);
    P::pack(right, call.y + b * T * H * E, T, H * E);
    products.outer(D, H * E, T, branch, D, right, T, sum_o, H * E, true);
    products.rows(T, H * E, D, branch, D, packed_o, D, dy, H * E, false);
    round(dy, T * H * E);
    std::fill_n(dscaled_gain, E, 0.0f);
    for (int64_t kv = 0; kv < K; kv++) head_backward(b, qkv, kv);
    add_scaled(sum_q_gain, sum_q_gain, call.scale, dscaled_gain, E);
    round(dqkv, T * row);
    norm(b);
    P::pack(right, normed, T, D);
    for (int i = 0; i < 3; i++) {
      products.outer(wide[i], D, T, dqkv + begin[i], row, right, T, sum_qkv[i], D, true);
      products.rows(T, D, wide[i], dqkv + begin[i], row, packed[i], wide[i], branch, D, i > 0);
    }
    norm_rows_backward(call, b * T, T, inverse, branch, sum_gain);
  }

  void head_backward(int64_t b, const float* qkv, int64_t kv) {
    keys_and_values(qkv, kv);
    P::pack(key_rows, key, T, E);
    P::pack_transposed(value_columns, value, E, T);
    std::fill_n(dkey, T * E, 0.0f), std::fill_n(dvalue, T * E, 0.0f);
    for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
      turn_head(query, qkv + h * E, scaled_gain);
      const float* log_sum = call.log_sum + (b * H + h) * T;
      blocks([&](int64_t first, int64_t rows, int64_t keys) {
        const float *q = query + first * E, *dy_rows = dy + first * H * E + h * E;
        int64_t visible = seen(first + rows - 1);
        products.rows(rows, keys, E, q, E, key_columns, E, p, ldp, false);
        products.rows(rows, keys, E, dy_rows, H * E, value_columns, E, dp, ldp, false);
        for (int64_t r = 0; r < rows; r++) softmax_backward(p + r * ldp, dp + r * ldp, log_sum[first + r], seen(first + r), keys);
        for (int64_t r = 0; r < rows; r++) convert(dblock + r * E, dy_rows + r * H * E, E);
        P::pack(block, dblock, rows, E);
        products.outer(visible, E, rows, p, ldp, block, rows, dvalue, E, true);
        P::pack(block, q, rows, E);
        products.outer(visible, E, rows, dp, ldp, block, rows, dkey, E, true);
        products.rows(rows, E, visible, dp, ldp, key_rows, T, dblock, E, false);
        for (int64_t r = 0; r < rows; r++) unturn(qkv, h * E, first + r, scaled_gain, dblock + r * E, dscaled_gain);
      });
    }
    for (int64_t t = 0; t < T; t++) {
      unturn(qkv, begin[1] + kv * E, t, call.k_gain, dkey + t * E, sum_k_gain);
      convert(dqkv + t * row + begin[2] + kv * E, dvalue + t * E, E);
    }
  }

  // The gradient of what lies at `column` of token t's row, of which `gradient` is that after norm and turn.
  void unturn(const float* qkv, int64_t column, int64_t t, const float* gain, const float* gradient, float* dgain) {
    const float* from = qkv + t * row + column;
    norm_row_backward(from, gain, turn(t), E, inverse_rms(from, E, call.eps), gradient, dqkv + t * row + column, dgain);
  }
};

}  // namespace
}  // namespace mue

extern "C" {

int32_t mue_attention_forward(const Attention* call) { return mue::with_products(*call, [&](auto of) { return mue::run_forward<mue::Heads<decltype(of)>>(*call); }); }
int32_t mue_attention_backward(const Attention* call) { return mue::with_products(*call, [&](auto of) { return mue::run_backward<mue::Heads<decltype(of)>>(*call); }); }

}  // extern "C"
