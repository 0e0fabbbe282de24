// What all threads of one call share: rows in expert order, and who does which of them.
#pragma once
#include "api.h"

namespace mue {

// The rows of one expert (or all tokens, for the shared network).
struct Unit {
  const Ffn* ffn;
  int64_t expert, first, last;  // rows in the order of its ffn's saved buffers
  bool routed;
};

// Some rows of a unit, done by one thread. Where a unit is divided, each part sums its weight gradients in a buffer of its own.
struct Part {
  int64_t unit, first, last;
  void* partial;
};

struct Plan {
  const Unit* units;
  const Part* parts;          // by thread
  const int64_t* part_begin;  // thread s does parts [part_begin[s], part_begin[s + 1])
  const int32_t *pair_M, *token_M;
  const double* weight_M;
  const int32_t *bag, *bag_begin_T;  // the rows of token t are bag[bag_begin_T[t]] to bag[bag_begin_T[t + 1]]
  int64_t routed_rows;
  bool* failed;  // set by a thread that got no memory
  void* row_MD;  // an output (or input gradient) for each routed row, then for each token of the shared network
};

// kernel.cpp: one thread's parts, ...
void forward(const Call&, const Plan&, int64_t thread);
void backward(const Call&, const Plan&, int64_t thread);
// ... out[t] = the sum of token t's rows, for tokens first to last, ...
void combine(const Call&, const Plan&, int64_t type, void* out_TD, int64_t first, int64_t last);
// ... and gradient[at ...] = the sum over a divided unit's parts of partial[offset ...], `elements` values.
void reduce(const Call&, const Part* const* parts, int64_t count, int64_t offset, int64_t elements, void* gradient, int64_t at);

// Memory that a thread keeps between calls (fresh pages cost more than the work at small sizes); null where there is none.
enum Purpose { kBlocks, kRows, kPartials, kSublayer, kPurposes };
void* scratch(Purpose purpose, int64_t bytes);

}  // namespace mue
