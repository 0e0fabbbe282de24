// The C interface between Python (ctypes, __init__.py mirrors these structs) and the kernel.
//
// Letters: T tokens, P pairs, N experts, D width, H inner width, M rows in expert order.
#pragma once
#include <cstdint>

enum Type : int64_t { kFloat, kDouble, kBFloat16 };

// How products are computed: in float (or double); in bf16 by instructions for pairs of terms, or by the matrix unit.
// kTileModel is kTiles with the unit played by plain C++: it tests the code where there is no such unit.
enum Engine : int64_t { kPlain, kDot, kTiles, kTileModel };

enum Status : int32_t { kFine, kNegativeExpert, kExpertTooLarge, kTokenOutside, kNotTokenMajor, kNoMemory, kNoParallel };

// Feed-forward networks of one shape: the routed experts, or the shared ones as a single network that every token passes.
struct Ffn {
  int64_t count, inner;                  // N (0: none), H
  const void *gate, *up, *down;          // (N, H, D), (N, H, D), (N, D, H); no gate: gelu(up x)
  void *gate_MH, *up_MH;                 // forward: written unless null; backward: read
  void *dgate, *dup, *ddown;             // backward: written unless null
};

struct Call {
  int64_t tokens, width, pairs, slots;   // slots: see mue.moe.Routing
  int64_t row_type;                      // of y, dy and what is saved; float rows are computed in float, double in double
  int64_t x_type, matrix_type, weight_type, engine, threads;
  const int64_t *token_P, *expert_P;     // an expert equal to routed.count is padding
  const void *weight_P, *x_TD, *dy_TD;
  void *y_TD, *dx_TD, *dweight_P;        // backward: dx and dweight are written unless null
  Ffn routed, shared;
};

// How a sublayer's products are computed: in float; in float and rounded to bf16, what they take and what they give; or in bf16 (half.h).
enum Products : int64_t { kFloats, kRounded, kHalves };

// RMSNorm of rows, and where there is a turn RoPE after it, in float: row r belongs to token (r / heads) % period.
struct Norm {
  int64_t rows, width, heads, period, x_type, threads;
  double eps;
  const float *gain, *turn;  // turn (period, width / 2, 2): cos and sin for neighbouring pairs; null: none
  const void* x;
  float *y, *inverse;        // forward writes both; backward reads the inverse of each row's rms
  const float* dy;
  void* dx;                  // of x_type
  float* dgain;
};

// x + residual o(attention(norm x)): softmax attention with RMSNorm before it, and RMSNorm of every head's q and k; with a turn RoPE
// after that and each token attends to the past, without one to all of its sequence. In float. Of several variants, every array but
// `turn` is one's after the other's.
//
// A modulation (B, 3, D) has a shift, a scale and a gate for each sequence (adaLN, 2212.09748): norm x becomes norm x (1 + scale) +
// shift, and what is added is multiplied by the gate; null: 0, 0 and 1. For the backward the branch before its gate is kept.
struct Attention {
  int64_t variants, batch, length, width, heads, kv_heads, head_dim, products, threads;  // B, T, D, H, K, E
  double scale, residual, eps;                                             // scale: of the logits
  const float *gain, *q, *k, *v, *q_gain, *k_gain, *o;                     // (D), (HE, D), (KE, D), (KE, D), (E), (E), (D, HE)
  const float *turn, *modulation, *x;       // (T, E / 2, 2) as in Norm; see above; (B, T, D)
  float *out, *qkv, *y, *log_sum, *branch;  // (B, T, D); (B, T, (H + 2 K) E), (B, T, HE), (B, H, T), (B, T, D): read by backward
  const float* dout;
  float *dx, *dmodulation, *gradients;      // gradients: of gain to o, one after the other
};

// x + residual down(silu(gate n) * up n), n = norm x; no gate: gelu(up n). Variants and modulations, of `length` rows each, as above.
struct FeedForward {
  int64_t variants, rows, length, width, inner, products, threads;  // M, T, D, H
  double residual, eps;
  const float *gain, *gate, *up, *down;       // (D), (H, D), (H, D), (D, H)
  const float *modulation, *x;                // (M / T, 3, D); (M, D)
  float *out, *gate_rows, *up_rows, *branch;  // (M, D); (M, H), (M, H), (M, D): read by backward
  const float* dout;
  float *dx, *dmodulation, *gradients;        // gradients: of gain to down, one after the other
};

// The `active` largest of each row of score (T, N), active / groups within each group of neighbours, falling; best (T, active).
struct Selection {
  int64_t tokens, experts, active, groups, threads;
  const float* score;
  int64_t* best;
};

// weight (T, active) = scale * softmax over a token's experts of their logits, or of the logarithms of their sigmoids.
struct Gates {
  int64_t tokens, experts, active, sigmoid, threads;
  double scale;
  const float* logit_TN;
  const int64_t* expert_TK;
  float* weight_TK;  // forward writes, backward reads
  const float* dweight_TK;
  float* dlogit_TN;
};

// See mue.moe.routing.routing_stats; `slots` pairs of each token, one token after the other, experts in [0, N].
struct RoutingStats {
  int64_t tokens, experts, slots;
  const int64_t* expert_P;
  const float* weight_P;
  int64_t* load_N;
  float* found;  // load_min, load_max, gate_sum, variance_factor
};
