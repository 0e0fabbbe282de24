// The best experts of every token, their weights, and the statistics of a routing.
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace mue {
namespace {

// Floats in the order of integers, as in mue.moe.routers.ops.select_top.
inline int32_t key(float value) {
  int32_t bits;
  value += 0.0f;
  std::memcpy(&bits, &value, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Indices (plus `offset`) of the `count` largest of keys[0, size), falling; of equals the first comes first. (`keys` ends with a
// vector that may be read.)
void best_of_few(const int32_t* keys, int64_t size, int64_t count, int64_t offset, int64_t* best) {
  using Index = VectorOf<float>::integer;
  constexpr int64_t L = kLanes<float>;
  int64_t by_rank[64];
  for (int64_t c = 0; c < size; c += L) {  // whose rank is how many come before it: no branches to mispredict
    Index mine = *reinterpret_cast<const Index*>(keys + c), place, rank{};
    for (int64_t i = 0; i < L; i++) place[i] = int32_t(c + i);
    for (int64_t j = 0; j < size; j++) rank -= (keys[j] > mine) | ((keys[j] == mine) & (int32_t(j) < place));
    for (int64_t i = 0; i < L && c + i < size; i++) by_rank[rank[i]] = c + i + offset;
  }
  std::memcpy(best, by_rank, count * sizeof(int64_t));
}

void best_of_many(const int32_t* keys, int64_t size, int64_t count, int64_t offset, int64_t* best) {
  int64_t have = 0;
  auto kept = [&](int64_t place) { return keys[best[place] - offset]; };
  for (int64_t i = 0; i < size; i++) {
    if (have == count && keys[i] <= kept(count - 1)) continue;
    int64_t place = have < count ? have++ : count - 1;
    for (; place > 0 && keys[i] > kept(place - 1); place--) best[place] = best[place - 1];
    best[place] = i + offset;
  }
}

// f(t) for every token.
template <class F> int32_t each_token(int64_t tokens, int64_t threads, F&& f) {
  bool ran = parallel(threads, [&](int64_t thread) {
    for (int64_t t = tokens * thread / threads; t < tokens * (thread + 1) / threads; t++) f(t);
  });
  return ran ? kFine : kNoParallel;
}

}  // namespace
}  // namespace mue

extern "C" {

int32_t mue_select(const Selection* call) {
  using namespace mue;
  int64_t size = call->experts / call->groups, count = call->active / call->groups;
  return each_token(call->tokens, call->threads, [&](int64_t t) {
    thread_local std::vector<int32_t> keys;
    keys.resize(size + kLanes<float>);
    for (int64_t g = 0; g < call->groups; g++) {
      for (int64_t i = 0; i < size; i++) keys[i] = key(call->score[t * call->experts + g * size + i]);
      int64_t* best = call->best + t * call->active + g * count;
      (size <= 64 ? best_of_few : best_of_many)(keys.data(), size, count, g * size, best);
    }
  });
}

int32_t mue_gates_forward(const Gates* call) {
  return mue::each_token(call->tokens, call->threads, [&](int64_t t) {
    const int64_t K = call->active, *expert = call->expert_TK + t * K;
    float *weight = call->weight_TK + t * K, largest = -INFINITY, sum = 0;
    for (int64_t k = 0; k < K; k++) {
      float logit = call->logit_TN[t * call->experts + expert[k]];
      weight[k] = call->sigmoid ? (logit < 0 ? logit : 0) - std::log1p(std::exp(-std::fabs(logit))) : logit;
      largest = weight[k] > largest ? weight[k] : largest;
    }
    for (int64_t k = 0; k < K; k++) sum += weight[k] = std::exp(weight[k] - largest);
    for (int64_t k = 0; k < K; k++) weight[k] *= float(call->scale) / sum;
  });
}

int32_t mue_gates_backward(const Gates* call) {
  return mue::each_token(call->tokens, call->threads, [&](int64_t t) {
    const int64_t K = call->active, *expert = call->expert_TK + t * K;
    const float *weight = call->weight_TK + t * K, *dweight = call->dweight_TK + t * K, *logit = call->logit_TN + t * call->experts;
    float *dlogit = call->dlogit_TN + t * call->experts, mean = 0;
    std::memset(dlogit, 0, call->experts * sizeof(float));
    for (int64_t k = 0; k < K; k++) mean += weight[k] * dweight[k];
    mean /= float(call->scale);
    for (int64_t k = 0; k < K; k++) {
      float slope = call->sigmoid ? 1 / (1 + std::exp(logit[expert[k]])) : 1;
      dlogit[expert[k]] = weight[k] * (dweight[k] - mean) * slope;
    }
  });
}

void mue_routing_stats(const RoutingStats* call) {
  int64_t N = call->experts, pairs = 0, routed = 0, least = INT64_MAX, most = 0;
  double total = 0, spread = 0;
  std::vector<int64_t> load(N + 1);
  for (int64_t t = 0; t < call->tokens; t++) {
    float sum = 0, square = 0;
    for (int64_t p = t * call->slots; p < (t + 1) * call->slots; p++) {
      load[call->expert_P[p]]++;
      sum += call->weight_P[p], square += call->weight_P[p] * call->weight_P[p];
    }
    total += sum;
    if (sum != 0) routed++, spread += square / (sum * sum);
  }
  for (int64_t e = 0; e < N; e++) {
    call->load_N[e] = load[e], pairs += load[e];
    least = load[e] < least ? load[e] : least, most = load[e] > most ? load[e] : most;
  }
  double each = pairs ? pairs : 1, tokens = routed ? routed : 1;
  call->found[0] = float(least / each), call->found[1] = float(most / each);
  call->found[2] = float(total / (call->tokens ? call->tokens : 1)), call->found[3] = float(pairs / tokens * (spread / tokens));
}

}  // extern "C"
