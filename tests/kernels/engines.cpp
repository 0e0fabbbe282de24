// Experts by every engine of bf16 against those in double: a program of its own, for other processors and for sanitizers.
//
// Prints each engine's errors (of y and the gradients), and those of sublayers in bf16 against float; ends with 1 where one is off.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "api.h"

extern "C" {
int32_t mue_forward(const Call*);
int32_t mue_backward(const Call*);
int32_t mue_attention_forward(const Attention*);
int32_t mue_attention_backward(const Attention*);
int32_t mue_feed_forward_forward(const FeedForward*);
int32_t mue_feed_forward_backward(const FeedForward*);
bool mue_has_dot();
int64_t mue_matrix_unit();
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t, void (*f)(int64_t, int64_t, void*), void* data) {  // torch's, without torch
  for (int64_t i = begin; i < end; i++) f(i, i + 1, data);
  return 0;
}
}

using Numbers = std::vector<float>;

struct Shape { int64_t tokens, experts, active, width, inner; };

template <class T> struct Results { std::vector<T> y, dx, dgate, dup, ddown, dweight; };

// T: of what goes in and comes out of the matrices. Rows are in double, or in bf16 (whose results are read as such).
template <class T> Results<T> run(const Shape& s, int64_t engine, int64_t row_type, const Numbers& x, const Numbers& dy, const std::vector<Numbers>& w, const Numbers& weight, const std::vector<int64_t>& expert) {
  int64_t pairs = s.tokens * s.active, matrix = s.experts * s.inner * s.width;
  auto as = [](const Numbers& from) { return std::vector<T>(from.begin(), from.end()); };
  std::vector<T> x_(as(x)), gate(as(w[0])), up(as(w[1])), down(as(w[2])), dx(x.size()), dgate(matrix), dup(matrix), ddown(matrix);
  std::vector<double> dy64(dy.begin(), dy.end()), y64(dy.size()), weight64(weight.begin(), weight.end()), dweight(pairs), kept[2];
  std::vector<uint16_t> dy16(dy.size()), y16(dy.size());
  for (size_t i = 0; i < dy.size(); i++) { uint32_t bits; __builtin_memcpy(&bits, &dy[i], 4); dy16[i] = bits >> 16; }
  for (auto& k : kept) k.resize(pairs * s.inner);
  std::vector<int64_t> token(pairs);
  for (int64_t p = 0; p < pairs; p++) token[p] = p / s.active;
  bool wide = row_type == kDouble;
  Call call{};
  call.tokens = s.tokens, call.width = s.width, call.pairs = pairs, call.slots = s.active, call.row_type = row_type, call.threads = 3;
  call.x_type = call.matrix_type = sizeof(T) == 8 ? kDouble : kFloat, call.weight_type = kDouble, call.engine = engine;
  call.token_P = token.data(), call.expert_P = expert.data(), call.weight_P = weight64.data(), call.x_TD = x_.data();
  call.y_TD = wide ? static_cast<void*>(y64.data()) : y16.data(), call.dy_TD = wide ? static_cast<void*>(dy64.data()) : dy16.data();
  call.routed = {s.experts, s.inner, gate.data(), up.data(), down.data(), kept[0].data(), kept[1].data(), nullptr, nullptr, nullptr};
  if (mue_forward(&call)) std::exit(2);
  call.dx_TD = dx.data(), call.dweight_P = dweight.data();
  call.routed.dgate = dgate.data(), call.routed.dup = dup.data(), call.routed.ddown = ddown.data();
  if (mue_backward(&call)) std::exit(2);
  std::vector<T> y(y64.begin(), y64.end());
  if (!wide)
    for (size_t i = 0; i < y.size(); i++) { uint32_t bits = uint32_t(y16[i]) << 16; float value; __builtin_memcpy(&value, &bits, 4); y[i] = value; }
  return {y, dx, dgate, dup, ddown, std::vector<T>(dweight.begin(), dweight.end())};
}

template <class T> double off(const std::vector<float>& found, const std::vector<T>& exact) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < exact.size(); i++) difference += std::pow(found[i] - exact[i], 2), size += exact[i] * exact[i];
  return std::sqrt(difference / size);
}

struct Sublayer { Numbers out, dx, gradients; };

Sublayer attention(int64_t B, int64_t T, int64_t D, int64_t H, int64_t E, int64_t products, const Numbers& x, const Numbers& w) {
  Sublayer found{Numbers(x.size()), Numbers(x.size()), Numbers(2 * D + 2 * E + 4 * D * H * E)};
  Numbers gain(D, 1), head_gain(E, 1), turn(T * E), kept(B * T * 4 * H * E), log_sum(B * H * T);
  for (int64_t i = 0; i < T * E; i += 2) turn[i] = std::cos(i), turn[i + 1] = std::sin(i);
  const float *q = w.data(), *k = q + D * H * E, *v = k + D * H * E, *o = v + D * H * E;
  Attention call{1, B, T, D, H, H, E, products, 2, 0.3, 0.7, 1e-3, gain.data(), q, k, v, head_gain.data(), head_gain.data(), o, turn.data(), x.data(),
                 found.out.data(), kept.data(), kept.data() + B * T * 3 * H * E, log_sum.data(), x.data(), found.dx.data(), found.gradients.data()};
  if (mue_attention_forward(&call) || mue_attention_backward(&call)) std::exit(2);
  return found;
}

Sublayer feed_forward(int64_t M, int64_t D, int64_t H, int64_t products, const Numbers& x, const Numbers& w) {
  Sublayer found{Numbers(x.size()), Numbers(x.size()), Numbers(D + 3 * D * H)};
  Numbers gain(D, 1), kept(2 * M * H);
  FeedForward call{1, M, D, H, products, 2, 0.7, 1e-3, gain.data(), w.data(), w.data() + D * H, w.data() + 2 * D * H, x.data(),
                   found.out.data(), kept.data(), kept.data() + M * H, x.data(), found.dx.data(), found.gradients.data()};
  if (mue_feed_forward_forward(&call) || mue_feed_forward_backward(&call)) std::exit(2);
  return found;
}

int main() {
  std::mt19937 generator(0);
  std::normal_distribution<float> normal;
  auto draw = [&](int64_t count, float scale) {  // numbers that bf16 has, so that errors are the engines' own
    Numbers numbers(count);
    for (float& value : numbers) {
      uint32_t bits;
      value = normal(generator) * scale, __builtin_memcpy(&bits, &value, 4), bits &= 0xffff0000u, __builtin_memcpy(&value, &bits, 4);
    }
    return numbers;
  };
  bool wrong = false;
  for (Shape s : {Shape{70, 6, 2, 64, 96}, {9, 40, 3, 32, 64}, {300, 2, 1, 128, 64}, {1, 1, 1, 32, 32}, {257, 5, 2, 96, 160}}) {
    int64_t matrix = s.experts * s.inner * s.width;
    Numbers x = draw(s.tokens * s.width, 1), dy = draw(s.tokens * s.width, 1), weight = draw(s.tokens * s.active, 1);
    std::vector<Numbers> w = {draw(matrix, 1 / std::sqrt(s.width)), draw(matrix, 1 / std::sqrt(s.width)), draw(matrix, 1 / std::sqrt(s.inner))};
    std::vector<int64_t> expert(s.tokens * s.active);
    for (size_t p = 0; p < expert.size(); p++) expert[p] = (p / s.active * 7 + p % s.active) % s.experts;
    auto exact = run<double>(s, kPlain, kDouble, x, dy, w, weight, expert);
    std::vector<std::pair<const char*, int64_t>> engines = {{"plain", kPlain}};
    if (mue_has_dot()) engines.push_back({"dot products", kDot});
    if (mue_matrix_unit() == 2) engines.push_back({"matrix unit", kTiles});
#if defined(__AVX512F__)
    engines.push_back({"tile model", kTileModel});
#endif
    for (auto [name, engine] : engines) {
      auto found = run<float>(s, engine, kBFloat16, x, dy, w, weight, expert);
      double errors[] = {off(found.y, exact.y), off(found.dx, exact.dx), off(found.dgate, exact.dgate), off(found.dup, exact.dup), off(found.ddown, exact.ddown), off(found.dweight, exact.dweight)};
      std::printf("%s d%ld h%ld:", name, long(s.width), long(s.inner));
      for (double error : errors) std::printf(" %.1e", error), wrong |= !(error < 0.01);
      std::printf("\n");
    }
  }
  auto compare = [&](long width, const char* name, const Sublayer& found, const Sublayer& exact) {
    double errors[] = {off(found.out, exact.out), off(found.dx, exact.dx), off(found.gradients, exact.gradients)};
    for (double error : errors) wrong |= !(error < 0.02);
    std::printf("sublayers d%ld %s %.1e %.1e %.1e\n", width, name, errors[0], errors[1], errors[2]);
  };
  struct Size { int64_t T, D, H, E; };
  for (auto [T, D, H, E] : mue_has_dot() ? std::vector<Size>{{16, 32, 2, 16}, {37, 44, 1, 10}, {70, 24, 3, 6}} : std::vector<Size>{}) {
    Numbers x = draw(3 * T * D, 1), w = draw(4 * D * H * E, 1 / std::sqrt(D));
    compare(D, "attention", attention(3, T, D, H, E, kHalves, x, w), attention(3, T, D, H, E, kFloats, x, w));
    Numbers more = draw(3 * D * 5 * E, 1 / std::sqrt(D));
    compare(D, "feed-forward", feed_forward(3 * T, D, 5 * E, kHalves, x, more), feed_forward(3 * T, D, 5 * E, kFloats, x, more));
  }
  return wrong;
}
