// Forward and backward of gathered feed-forward rows.
#include <initializer_list>

#include "activation.h"
#include "engine.h"
#include "plan.h"

namespace mue {
namespace {

template <class T> inline T smaller(T a, T b) { return a < b ? a : b; }
template <class T> inline T larger(T a, T b) { return a > b ? a : b; }

// One thread's work on the parts it was given. E: the engine. S: the type of rows and of what is saved.
template <class E, class S> struct Worker {
  using Engine = E;
  using Row = S;
  using In = typename E::In;
  using Out = typename E::Out;
  static constexpr int64_t L = kLanes<Out>;
  static constexpr bool kSame = std::is_same_v<S, Out>;  // results can go where they belong as they are

  const Call& call;
  const Plan& plan;
  const int64_t D = call.width, H = larger(call.routed.inner, call.shared.inner);
  // A cache line more than needed: rows a power of two apart would fall on one another in the cache.
  const int64_t ldd = up_to(D, 64) + 64 / sizeof(In), ldh = up_to(H, 64) + 64 / sizeof(In);

  In *packed_gate, *packed_up, *packed_down, *in_MD, *gate_in, *up_in, *right, *turned, *paired;
  Out *out_MD, *gate_out, *up_out, *sums;

  Worker(const Call& call, const Plan& plan) : call(call), plan(plan) {}

  template <class T> void take(char*& at, T*& buffer, int64_t count) {
    buffer = reinterpret_cast<T*>(at);
    at += up_to(count * int64_t(sizeof(T)), 64) + 64;
  }

  int64_t lay_out(char* base) {
    int64_t rows = up_to(E::kBlock, E::kRows), widest = larger(ldd, ldh);
    char* at = base;
    for (auto buffer : {&packed_gate, &packed_up, &packed_down}) take(at, *buffer, larger(E::packed(D, H), E::packed(H, D)));
    take(at, in_MD, rows * ldd);
    for (auto buffer : {&gate_in, &up_in}) take(at, *buffer, rows * ldh);
    take(at, out_MD, rows * ldd);
    for (auto buffer : {&gate_out, &up_out}) take(at, *buffer, rows * ldh);
    for (auto buffer : {&right, &turned, &paired}) take(at, *buffer, rows * widest);
    take(at, sums, 3 * H * D);
    return at - base;
  }

  bool prepare() {
    void* base = scratch(kBlocks, lay_out(nullptr));
    if (base == nullptr) *plan.failed = true;
    else lay_out(static_cast<char*>(base));
    return base != nullptr;
  }

  int64_t token(const Unit& unit, int64_t m) const { return unit.routed ? plan.token_M[m] : m; }
  S* row(const Unit& unit, int64_t m) const {
    return static_cast<S*>(plan.row_MD) + (unit.routed ? m : plan.routed_rows + m) * D;
  }
  static S* saved(void* base, const Unit& unit, int64_t m) {
    return base == nullptr ? nullptr : static_cast<S*>(base) + m * unit.ffn->inner;
  }
  int64_t matrix_bytes() const { return call.matrix_type == kDouble ? 8 : call.matrix_type == kFloat ? 4 : 2; }
  const void* matrix(const void* base, const Unit& unit) const {
    return static_cast<const char*>(base) + unit.expert * unit.ffn->inner * D * matrix_bytes();
  }
  template <class T> static void clear_rows(T* buffer, int64_t ld, int64_t from) {
    for (int64_t r = from; r < up_to(from, E::kRows); r++)
      for (int64_t i = 0; i < ld; i++) buffer[r * ld + i] = T{};
  }

  // The rows of tokens [T, D] that a block of a unit needs, as a left operand ...
  void gather(In* to, const void* tokens, int64_t type, const Unit& unit, int64_t first, int64_t count) {
    with_type(type, [&](auto* typed) {
      auto from = static_cast<decltype(typed)>(const_cast<void*>(tokens));
      for (int64_t r = 0; r < count; r++) E::convert(to + r * ldd, from + token(unit, first + r) * D, D);
    });
    clear_rows(to, ldd, count);
  }
  // ... and as a right operand.
  const In* gather_right(const void* tokens, int64_t type, const Unit& unit, int64_t first, int64_t count) {
    with_type(type, [&](auto* typed) {
      auto from = static_cast<decltype(typed)>(const_cast<void*>(tokens));
      for (int64_t r = 0; r < count; r++) {
        auto source = from + token(unit, first + r) * D;
        for (int64_t c = 0; c < D; c += L) E::place_vector(E::right(right, r, c, count, ldd), source + c, smaller(L, D - c));
      }
    });
    clear_rows(right, ldd, count);
    return E::finish_right(right, paired, count, ldd, D);
  }

  // The weights of the next part, taken from memory into the cache a few lines at a time while this part's are multiplied: an expert
  // of few rows would otherwise wait for its weights longer than it takes to pack them.
  struct Ahead { const char* at[3]; int64_t left, lines; } ahead{};

  void look_ahead(const Part& part, const Part* next) {
    ahead.left = 0;
    if (next == nullptr || next->unit == part.unit) return;
    const Unit& unit = plan.units[next->unit];
    const Ffn& ffn = *unit.ffn;
    const void* matrices[3] = {ffn.gate, ffn.up, ffn.down};
    for (int i = 0; i < 3; i++) ahead.at[i] = matrices[i] ? static_cast<const char*>(matrix(matrices[i], unit)) : nullptr;
    const Ffn& mine = *plan.units[part.unit].ffn;
    int64_t H = up_to(mine.inner, E::kPanel), W = up_to(D, E::kPanel), columns = H + W + (mine.gate ? smaller(H, W) : 0);
    int64_t steps = columns / E::kPanel * ((part.last - part.first + E::kStep - 1) / E::kStep);
    ahead.left = ffn.inner * D * matrix_bytes() / 64;
    ahead.lines = (ahead.left + steps - 1) / steps;
  }

  void fetch() {
    for (int64_t i = 0; i < ahead.lines && ahead.left > 0; i++, ahead.left--)
      for (const char*& at : ahead.at)
        if (at) __builtin_prefetch(at, 0, 2), at += 64;
  }

  // C[M, N] (+)= A B, a tile's rows and a panel's columns at a time.
  void multiply(int64_t M, int64_t N, int64_t K, const In* a, int64_t lda, const In* b, Out* c, int64_t ldc, bool add) {
    for (int64_t n = 0; n < N; n += E::kPanel)
      for (int64_t m = 0; m < M; m += E::kStep) {
        fetch();
        E::multiply(smaller(E::kStep, M - m), smaller(E::kPanel, N - n), K, a + m * lda, lda, b + n * K, c + m * ldc + n, ldc, add);
      }
  }

  template <class F> void blocks(const Part& part, F&& f) {
    int64_t rows = part.last - part.first, count = (rows + E::kBlock - 1) / E::kBlock;
    int64_t size = count ? up_to((rows + count - 1) / count, E::kStep) : 0;
    for (int64_t m = part.first; m < part.last; m += size) f(m, smaller(size, part.last - m));
  }

  void forward(const Part& part) {
    const Unit& unit = plan.units[part.unit];
    const Ffn& ffn = *unit.ffn;
    int64_t H = ffn.inner;
    if (ffn.gate) E::pack_transposed(packed_gate, matrix(ffn.gate, unit), call.matrix_type, D, H);
    E::pack_transposed(packed_up, matrix(ffn.up, unit), call.matrix_type, D, H);
    E::pack_transposed(packed_down, matrix(ffn.down, unit), call.matrix_type, H, D);
    blocks(part, [&](int64_t first, int64_t rows) {
      gather(in_MD, call.x_TD, call.x_type, unit, first, rows);
      S *keep_gate = saved(ffn.gate_MH, unit, first), *keep_up = saved(ffn.up_MH, unit, first);
      Out *gate = gate_out, *up = up_out;
      int64_t ld = ldh;
      if constexpr (kSame) {
        if (keep_up) gate = keep_gate, up = keep_up, ld = H;
      }
      if (ffn.gate) multiply(rows, H, D, in_MD, ldd, packed_gate, gate, ld, false);
      multiply(rows, H, D, in_MD, ldd, packed_up, up, ld, false);
      for (int64_t r = 0; r < rows; r++) {
        Out weight = unit.routed ? plan.weight_M[first + r] : 1;
        for (int64_t h = 0; h < H; h += L) {
          int64_t n = smaller(L, H - h);
          Vector<Out> u = load_some<Out>(up + r * ld + h, n), hidden;
          if (ffn.gate) {
            Vector<Out> g = load_some<Out>(gate + r * ld + h, n);
            hidden = activated<Out, E::kRough>(g, u);
            if (!kSame && keep_gate) E::put(keep_gate + r * H + h, g, n);
          } else {
            hidden = activated<Out>(u);
          }
          if (!kSame && keep_up) E::put(keep_up + r * H + h, u, n);
          E::put(gate_in + r * ldh + h, hidden * weight, L);
        }
      }
      clear_rows(gate_in, ldh, rows);
      S* result = row(unit, first);
      if constexpr (kSame) {
        multiply(rows, D, H, gate_in, ldh, packed_down, result, D, false);
      } else {
        multiply(rows, D, H, gate_in, ldh, packed_down, out_MD, ldd, false);
        for (int64_t r = 0; r < rows; r++) E::convert(result + r * D, out_MD + r * ldd, D);
      }
    });
  }

  // Where the sums of a part's weight gradients go, by matrix (gate, up, down): null where nobody wants them.
  struct Sums { Out* to[3]; bool convert; };

  Sums gradients(const Part& part, const Unit& unit) {
    void* wanted[3] = {unit.ffn->dgate, unit.ffn->dup, unit.ffn->ddown};
    bool fits = call.matrix_type == (sizeof(Out) == 8 ? kDouble : kFloat);
    Sums out{{}, !part.partial && !fits};
    int64_t size = unit.ffn->inner * D;
    for (int i = 0; i < 3; i++) {
      if (wanted[i] == nullptr) continue;
      if (part.partial) out.to[i] = static_cast<Out*>(part.partial) + i * size;
      else out.to[i] = fits ? static_cast<Out*>(wanted[i]) + unit.expert * size : sums + i * size;
    }
    return out;
  }

  void backward(const Part& part) {
    const Unit& unit = plan.units[part.unit];
    const Ffn& ffn = *unit.ffn;
    int64_t H = ffn.inner;
    E::pack(packed_down, matrix(ffn.down, unit), call.matrix_type, D, H);
    if (call.dx_TD) {
      if (ffn.gate) E::pack(packed_gate, matrix(ffn.gate, unit), call.matrix_type, H, D);
      E::pack(packed_up, matrix(ffn.up, unit), call.matrix_type, H, D);
    }
    Sums into = gradients(part, unit);
    blocks(part, [&](int64_t first, int64_t rows) {
      bool add = first != part.first;
      gather(in_MD, call.dy_TD, call.row_type, unit, first, rows);
      multiply(rows, H, D, in_MD, ldd, packed_down, up_out, ldh, false);
      for (int64_t r = 0; r < rows; r++) activation_backward(unit, first, r, rows);
      for (In* buffer : {gate_in, up_in, right}) clear_rows(buffer, ldh, rows);
      if (into.to[2]) outer(D, H, rows, in_MD, ldd, E::finish_right(right, paired, rows, ldh, H), into.to[2], add);
      if (into.to[0] || into.to[1]) {
        const In* x = gather_right(call.x_TD, call.x_type, unit, first, rows);
        if (into.to[0]) outer(H, D, rows, gate_in, ldh, x, into.to[0], add);
        if (into.to[1]) outer(H, D, rows, up_in, ldh, x, into.to[1], add);
      }
      if (call.dx_TD) input_gradient(unit, first, rows);
    });
    if (!into.convert) return;
    void* wanted[3] = {ffn.dgate, ffn.dup, ffn.ddown};
    for (int i = 0; i < 3; i++)
      if (into.to[i]) deliver(into.to[i], wanted[i], unit.expert * H * D, H * D);
  }

  void outer(int64_t M, int64_t N, int64_t rows, const In* a, int64_t lda, const In* b, Out* c, bool add) {
    E::outer(M, N, rows, a, lda, b, c, add, turned);
  }

  // dH = dy down lies in up_out. Leaves weight * activation in `right`, d gate and d up in gate_in and up_in.
  void activation_backward(const Unit& unit, int64_t first, int64_t r, int64_t rows) {
    const Ffn& ffn = *unit.ffn;
    int64_t H = ffn.inner;
    const S *gate = saved(ffn.gate_MH, unit, first + r), *up = saved(ffn.up_MH, unit, first + r);
    Out weight = unit.routed ? plan.weight_M[first + r] : 1;
    Vector<Out> dot{};
    for (int64_t h = 0; h < H; h += L) {
      int64_t n = smaller(L, H - h);
      Vector<Out> u = load_some<Out>(up + h, n), dhidden = load_some<Out>(up_out + r * ldh + h, n);
      Slopes<Out> at = ffn.gate ? slopes<Out, E::kRough>(load_some<Out>(gate + h, n), u) : slopes<Out>(u);
      dot += dhidden * at.value;
      dhidden *= weight;
      if (ffn.gate) E::put(gate_in + r * ldh + h, dhidden * at.by_gate, L);
      E::put(up_in + r * ldh + h, dhidden * at.by_up, L);
      E::put(E::right(right, r, h, rows, ldh), at.value * weight, L);
    }
    if (!unit.routed || !call.dweight_P) return;
    Out sum = 0;
    for (int64_t i = 0; i < L; i++) sum += dot[i];
    with_type(call.weight_type, [&](auto* typed) {
      put(static_cast<decltype(typed)>(call.dweight_P) + plan.pair_M[first + r], sum);
    });
  }

  void input_gradient(const Unit& unit, int64_t first, int64_t rows) {
    int64_t H = unit.ffn->inner;
    S* result = row(unit, first);
    Out* to = out_MD;
    int64_t ld = ldd;
    if constexpr (kSame) to = result, ld = D;
    multiply(rows, D, H, up_in, ldh, packed_up, to, ld, false);
    if (unit.ffn->gate) multiply(rows, D, H, gate_in, ldh, packed_gate, to, ld, true);
    if constexpr (!kSame)
      for (int64_t r = 0; r < rows; r++) E::convert(result + r * D, out_MD + r * ldd, D);
  }

  void deliver(const Out* from, void* gradient, int64_t offset, int64_t count) {
    with_type(call.matrix_type, [&](auto* typed) { convert(static_cast<decltype(typed)>(gradient) + offset, from, count); });
  }
};

// Calls f with the Worker type of a call.
template <class F> void with_worker(const Call& call, F&& f) {
  if (call.row_type == kDouble) return f(static_cast<Worker<Plain<double>, double>*>(nullptr));
  if (call.row_type == kFloat) return f(static_cast<Worker<Plain<float>, float>*>(nullptr));
#if defined(MUE_DOT)
  if (call.engine == kDot) return f(static_cast<Worker<Half<Dot>, bf16>*>(nullptr));
#endif
#if defined(MUE_TILES)
  if (call.engine == kTiles) return f(static_cast<Worker<Half<Squares<AmxTiles>>, bf16>*>(nullptr));
  if (call.engine == kTileModel) return f(static_cast<Worker<Half<Squares<TileModel>>, bf16>*>(nullptr));
#endif
  return f(static_cast<Worker<Plain<float>, bf16>*>(nullptr));
}

template <class F> void work(const Call& call, const Plan& plan, int64_t thread, F&& f) {
  with_worker(call, [&](auto* typed) {
    using W = std::remove_pointer_t<decltype(typed)>;
    W worker(call, plan);
    if (!worker.prepare()) return;
    W::Engine::begin();
    for (int64_t i = plan.part_begin[thread], end = plan.part_begin[thread + 1]; i < end; i++) {
      worker.look_ahead(plan.parts[i], i + 1 < end ? &plan.parts[i + 1] : nullptr);
      f(worker, plan.parts[i]);
    }
    W::Engine::end();
  });
}

}  // namespace

void forward(const Call& call, const Plan& plan, int64_t thread) {
  work(call, plan, thread, [](auto& worker, const Part& part) { worker.forward(part); });
}

void backward(const Call& call, const Plan& plan, int64_t thread) {
  work(call, plan, thread, [](auto& worker, const Part& part) { worker.backward(part); });
}

void combine(const Call& call, const Plan& plan, int64_t type, void* out_TD, int64_t first, int64_t last) {
  with_worker(call, [&](auto* typed) {
    using W = std::remove_pointer_t<decltype(typed)>;
    using Out = typename W::Out;
    auto rows = static_cast<const typename W::Row*>(plan.row_MD);
    int64_t D = call.width;
    with_type(type, [&](auto* to) {
      for (int64_t t = first; t < last; t++)
        for (int64_t c = 0; c < D; c += kLanes<Out>) {
          int64_t n = smaller<int64_t>(kLanes<Out>, D - c);
          Vector<Out> sum{};
          for (int64_t i = plan.bag_begin_T[t]; i < plan.bag_begin_T[t + 1]; i++)
            sum += load_some<Out>(rows + plan.bag[i] * D + c, n);
          Out values[kLanes<Out>];
          store(values, sum);
          convert_vector(static_cast<decltype(to)>(out_TD) + t * D + c, values, n);
        }
    });
  });
}

void reduce(const Call& call, const Part* const* parts, int64_t count, int64_t offset, int64_t elements, void* gradient,
            int64_t at) {
  with_worker(call, [&](auto* typed) {
    using Out = typename std::remove_pointer_t<decltype(typed)>::Out;
    Out* sum = static_cast<Out*>(parts[0]->partial) + offset;
    for (int64_t p = 1; p < count; p++) {
      const Out* more = static_cast<const Out*>(parts[p]->partial) + offset;
      for (int64_t i = 0; i < elements; i++) sum[i] += more[i];
    }
    with_type(call.matrix_type, [&](auto* to) { convert(static_cast<decltype(to)>(gradient) + at, sum, elements); });
  });
}

}  // namespace mue
