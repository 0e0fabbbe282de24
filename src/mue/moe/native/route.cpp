// The best experts of every token, and the statistics of a routing.
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace mue {
namespace {

// Floats in the order of integers, as in mue.moe.router.select_top.
inline int32_t key(float value) {
  int32_t bits;
  value += 0.0f;
  std::memcpy(&bits, &value, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Indices (plus `offset`) of the `count` largest of keys[0, size), falling; of equals the first comes first.
void best_of_few(const int32_t* keys, int64_t size, int64_t count, int64_t offset, int64_t* best) {
  using Index = VectorOf<float>::integer;
  constexpr int64_t L = kLanes<float>;
  int64_t by_rank[64];
  for (int64_t c = 0; c < size; c += L) {  // whose rank is how many come before it: no branches to mispredict
    Index mine, place, rank{};
    for (int64_t i = 0; i < L; i++) mine[i] = c + i < size ? keys[c + i] : 0, place[i] = int32_t(c + i);
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

}  // namespace
}  // namespace mue

extern "C" {

int32_t mue_select(const Selection* call) {
  int64_t size = call->experts / call->groups, count = call->active / call->groups;
  bool ran = mue::parallel(call->threads, [&](int64_t thread) {
    std::vector<int32_t> keys(size);
    for (int64_t t = call->tokens * thread / call->threads; t < call->tokens * (thread + 1) / call->threads; t++)
      for (int64_t g = 0; g < call->groups; g++) {
        for (int64_t i = 0; i < size; i++) keys[i] = mue::key(call->score[t * call->experts + g * size + i]);
        int64_t* best = call->best + t * call->active + g * count;
        (size <= 64 ? mue::best_of_few : mue::best_of_many)(keys.data(), size, count, g * size, best);
      }
  });
  return ran ? kFine : kNoParallel;
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
