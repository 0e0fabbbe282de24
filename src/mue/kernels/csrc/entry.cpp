// Entry points: sorts the pairs by expert, shares the rows out evenly, runs the threads, combines.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "parallel.h"
#include "plan.h"

namespace mue {
namespace {

struct Free { void operator()(void* memory) const { std::free(memory); } };
using Memory = std::unique_ptr<void, Free>;

// Asks for huge pages for memory that is about to be written for the first time: a fault for every 4 KiB costs a tenth
// of a large backward.
void expect(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = 1 << 21;
  uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + kHuge - 1) / kHuge * kHuge;
  uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHuge * kHuge;
  if (memory && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

Memory allocate(int64_t bytes) {
  Memory memory(std::aligned_alloc(64, (bytes + 127) / 64 * 64));
  expect(memory.get(), bytes);
  return memory;
}

// A plan and the memory it points to.
struct Sorted {
  std::vector<int32_t> pair_M, token_M, bag, bag_begin_T;
  std::vector<double> weight_M;
  std::vector<int64_t> rows_N, part_begin;
  std::vector<Unit> units;
  std::vector<Part> parts;
  bool failed = false;
  Plan plan{};

  // Counting sorts: pairs by expert (rows of one expert stay in token order), rows by token.
  Status sort(const Call& call) {
    int64_t N = call.routed.count, T = call.tokens, P = call.pairs;
    std::vector<int32_t> row_N(N + 2), row_P(P);
    bag_begin_T.assign(T + 1, 0);
    for (int64_t p = 0; p < P; p++) {
      int64_t expert = call.expert_P[p], token = call.token_P[p];
      if (expert < 0) return kNegativeExpert;
      if (expert > N) return kExpertTooLarge;
      if (token < 0 || token >= T) return kTokenOutside;
      if (call.slots && token != p / call.slots) return kNotTokenMajor;
      row_N[expert + 1]++;
      if (expert < N) bag_begin_T[token + 1]++;
    }
    rows_N.assign(row_N.begin() + 1, row_N.begin() + 1 + N);
    for (int64_t e = 0; e < N; e++) row_N[e + 1] += row_N[e];
    int64_t routed = row_N[N];
    bool shared = call.shared.count > 0;
    for (int64_t t = 0; t < T; t++) bag_begin_T[t + 1] += bag_begin_T[t] + shared;
    pair_M.resize(routed), token_M.resize(routed), weight_M.resize(routed), bag.resize(bag_begin_T[T]);
    std::vector<int32_t> next_T(bag_begin_T.begin(), bag_begin_T.end() - 1);
    for (int64_t p = 0; p < P; p++) {
      int64_t expert = call.expert_P[p], token = call.token_P[p];
      if (expert == N) continue;
      int32_t row = row_N[expert]++;
      pair_M[row] = int32_t(p), token_M[row] = int32_t(token), bag[next_T[token]++] = row;
      weight_M[row] = call.weight_type == kDouble ? static_cast<const double*>(call.weight_P)[p]
                                                  : static_cast<const float*>(call.weight_P)[p];
    }
    if (shared)
      for (int64_t t = 0; t < T; t++) bag[next_T[t]] = int32_t(routed + t);
    for (int64_t e = 0, row = 0; e < N; row += rows_N[e++])
      if (rows_N[e]) units.push_back({&call.routed, e, row, row + rows_N[e], true});
    if (shared && T) units.push_back({&call.shared, 0, 0, T, false});
    plan.routed_rows = routed;
    return kFine;
  }

  // Equal work for every thread. A unit that lies across a border is divided; its matrices are then packed twice.
  void share_out(const Call& call) {
    constexpr int64_t kPacking = 12, kStep = 12;  // packing costs about as much as this many rows; borders are at tiles
    int64_t total = 0, done = 0, unit = 0, first = 0;
    for (const Unit& u : units) total += (u.last - u.first + kPacking) * u.ffn->inner;
    part_begin.assign(1, 0);
    for (int64_t thread = 1; thread <= call.threads; thread++) {
      int64_t target = total * thread / call.threads;
      for (; unit < int64_t(units.size()) && done < target; first = 0) {
        const Unit& u = units[unit];
        int64_t begin = u.first + first, rows = u.last - begin, cost = u.ffn->inner;
        int64_t fit = thread == call.threads ? rows : (target - done) / cost / kStep * kStep;
        if (fit < rows && fit < kStep) break;
        if (fit > rows) fit = rows;
        parts.push_back({unit, begin, begin + fit, nullptr});
        done += (fit + (first ? 0 : kPacking)) * cost;
        if (fit < rows) { first += fit; break; }
        unit++;
      }
      part_begin.push_back(int64_t(parts.size()));
    }
  }

  bool divided(const Part& part) const {
    const Unit& unit = units[part.unit];
    return part.first > unit.first || part.last < unit.last;
  }

  Status prepare(const Call& call) {
    Status status = sort(call);
    if (status != kFine) return status;
    share_out(call);
    int64_t size = call.row_type == kDouble ? 8 : call.row_type == kFloat ? 4 : 2;
    plan.row_MD = scratch(kRows, (plan.routed_rows + (call.shared.count ? call.tokens : 0)) * call.width * size);
    if (!plan.row_MD) return kNoMemory;
    plan.units = units.data(), plan.parts = parts.data(), plan.part_begin = part_begin.data();
    plan.pair_M = pair_M.data(), plan.token_M = token_M.data(), plan.weight_M = weight_M.data();
    plan.bag = bag.data(), plan.bag_begin_T = bag_begin_T.data(), plan.failed = &failed;
    return kFine;
  }

  Status combine(const Call& call, int64_t type, void* out_TD) {
    int64_t chunks = call.threads;
    bool ran = parallel(chunks, [&](int64_t i) {
      mue::combine(call, plan, type, out_TD, call.tokens * i / chunks, call.tokens * (i + 1) / chunks);
    });
    return ran ? kFine : kNoParallel;
  }

  Status give_partials(const Call& call) {
    int64_t bytes = 0, value = call.row_type == kDouble ? 8 : 4;
    auto size = [&](const Part& part) { return 3 * units[part.unit].ffn->inner * call.width * value; };
    for (const Part& part : parts) bytes += divided(part) ? size(part) : 0;
    if (bytes == 0) return kFine;
    char* at = static_cast<char*>(scratch(kPartials, bytes));
    if (!at) return kNoMemory;
    for (Part& part : parts)
      if (divided(part)) part.partial = at, at += size(part);
    return kFine;
  }

  // The weight gradients of divided units, and zeros for the experts without rows.
  Status finish_gradients(const Call& call) {
    struct Job { std::vector<const Part*> parts; int64_t matrix, expert; const Ffn* ffn; };
    std::vector<Job> jobs;
    for (int64_t i = 0; i < 3; i++) {
      for (const Part& part : parts) {
        if (!part.partial) continue;
        const Unit& unit = units[part.unit];
        if (part.first == unit.first) jobs.push_back({{}, i, unit.expert, unit.ffn});
        jobs.back().parts.push_back(&part);
      }
      for (int64_t e = 0; e < call.routed.count; e++)
        if (rows_N[e] == 0) jobs.push_back({{}, i, e, &call.routed});
      if (call.shared.count && call.tokens == 0) jobs.push_back({{}, i, 0, &call.shared});
    }
    int64_t bytes = call.matrix_type == kDouble ? 8 : call.matrix_type == kFloat ? 4 : 2;
    bool ran = parallel(int64_t(jobs.size()), [&](int64_t j) {
      const Job& job = jobs[j];
      void* gradient = job.matrix == 0 ? job.ffn->dgate : job.matrix == 1 ? job.ffn->dup : job.ffn->ddown;
      int64_t size = job.ffn->inner * call.width;
      if (gradient == nullptr) return;
      if (job.parts.empty()) std::memset(static_cast<char*>(gradient) + job.expert * size * bytes, 0, size * bytes);
      else mue::reduce(call, job.parts.data(), int64_t(job.parts.size()), job.matrix * size, size, gradient, job.expert * size);
    });
    return ran ? kFine : kNoParallel;
  }
};

constexpr int64_t kKept = 1 << 26;  // more than this is not kept for a smaller call

struct Scratch {
  Memory memory;
  int64_t bytes = 0;
};

}  // namespace

void* scratch(Purpose purpose, int64_t bytes) {
  thread_local Scratch all[kPurposes];
  Scratch& mine = all[purpose];
  if (!mine.memory || mine.bytes < bytes || mine.bytes > kKept) {
    mine.memory.reset();
    mine.memory = allocate(bytes);
    mine.bytes = mine.memory ? bytes : 0;
  }
  return mine.memory.get();
}

}  // namespace mue

extern "C" {

int64_t mue_call_bytes() { return sizeof(Call); }

int32_t mue_forward(const Call* call) {
  using namespace mue;
  Sorted sorted;
  Status status = sorted.prepare(*call);
  if (status != kFine) return status;
  int64_t size = call->row_type == kDouble ? 8 : call->row_type == kFloat ? 4 : 2;
  for (void* kept : {call->routed.gate_MH, call->routed.up_MH}) expect(kept, call->pairs * call->routed.inner * size);
  if (!parallel(call->threads, [&](int64_t thread) { mue::forward(*call, sorted.plan, thread); })) return kNoParallel;
  return sorted.failed ? kNoMemory : sorted.combine(*call, call->row_type, call->y_TD);
}

int32_t mue_backward(const Call* call) {
  using namespace mue;
  Sorted sorted;
  Status status = sorted.prepare(*call);
  if (status == kFine) status = sorted.give_partials(*call);
  if (status != kFine) return status;
  int64_t size = call->matrix_type == kDouble ? 8 : call->matrix_type == kFloat ? 4 : 2;
  for (void* gradient : {call->routed.dgate, call->routed.dup, call->routed.ddown})
    expect(gradient, call->routed.count * call->routed.inner * call->width * size);
  if (!parallel(call->threads, [&](int64_t thread) { mue::backward(*call, sorted.plan, thread); })) return kNoParallel;
  if (sorted.failed) return kNoMemory;
  status = sorted.finish_gradients(*call);
  return status != kFine || !call->dx_TD ? status : sorted.combine(*call, call->x_type, call->dx_TD);
}

}  // extern "C"
