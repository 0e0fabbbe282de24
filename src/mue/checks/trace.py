"""One forward pass seen kernel by kernel: every use of a parameter, the residual stream, and what is added to it.

No hooks: a module that is called twice, a functional call and a stacked tensor of experts are all seen, because what is
recorded is what the kernels were handed. Values are kept, so use small batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mue.checks.gated import Gated
from mue.checks.known import TIMES, broadcasts, factor_of, key_of, returned, seen_ahead, tensors, unmasked
from mue.checks.record import Added, Normed, Origin, Product, Record, Scores, Softmax, Term
from mue.layouts.layout import ParamInfo
from mue.rules.roles import ROLES

# Kernel → positions of its two factors.
_PRODUCTS = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "linear": (0, 1),
    "_grouped_mm": (0, 1),
    "mv": (0, 1),
    "dot": (0, 1),
}
_COPIES = frozenset(
    {"_to_copy", "clone", "contiguous", "index_select", "index", "t_copy", "transpose_copy", "lift_fresh"}
)
_SUMS = {"add": 1.0, "add_": 1.0, "sub": -1.0, "sub_": -1.0}
_ROWS = frozenset(
    {"mean", "sum", "var", "var_mean", "linalg_vector_norm"}
)  # one number for each row: what a norm divides by
# Of softcapped logits, c·tanh(x/c), the slope at zero is what a multiplier changes.
_SLOPE_ONE = frozenset({"tanh", "tanh_"})
_MASKS = frozenset({"where", "masked_fill", "masked_fill_"})


class Trace(Gated):  # type: ignore[no-untyped-call]
    """Record into ``record`` while this mode is on."""

    wants_plain_operators = True  # mue.moe.experts then takes no fused kernel, whose inside cannot be seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kernel, kwargs = func.overloadpacket.__name__, kwargs or {}
        given = list(tensors((*args, *kwargs.values())))
        self._save(kernel, args)
        self._handed(kernel, args, given)
        joined = self._join(kernel, args, kwargs)
        if kernel.startswith(("_scaled_dot_product", "_softmax", "_safe_softmax")):
            self._attention(func, args, kwargs)
        if kernel == "_log_softmax":
            self._result(args[0], self.record.losses)
        known = [self._chains.get(key_of(t)) for t in given]
        out = func(*args, **kwargs)
        outs = list(tensors((out,)))
        origin = Origin.union(self._origins.get(key_of(t)) for t in given)
        for t in outs:
            self._forget(kernel, t, given, origin)
        if kernel in ("nll_loss_forward", "nll_loss2d_forward"):  # targets (B·T,), or (B, T) beside logits (B, V, T)
            self._entropy(args, outs[0])
        if joined is not None and outs:
            self._add(kernel, joined, outs[0])
        elif outs:
            self._follow(kernel, args, kwargs, given, known, outs[0])
        return out

    # ---- the stream -------------------------------------------------------------------------------------------------

    def _join(self, kernel: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, bool] | None:
        """(carried, branch, onto the stream) where this kernel adds up what meets the stream, or is about to.

        Taken before it runs, for it may run in place. alpha is a multiplier like any other: torch.add(x, y, alpha=c) is x + c·y.
        """
        if (behind := self._behind_gate(kernel, args, kwargs)) is not None:
            return behind
        if kernel not in _SUMS or len(args) < 2 or not (self._wide(args[0]) and self._wide(args[1])):
            return None
        a, b = args[0], args[1]
        factor = _SUMS[kernel] * float(kwargs.get("alpha", 1))
        # where one is broadcast (positions are the same for every sequence), the other has the result's size
        if not broadcasts(a, b):
            return None
        orders = [self._order(t) for t in (a, b)]
        onto = max(orders) >= 0
        if not onto:
            onto = self._renewed(a, b) or self._renewed(b, a)
            orders = [int(self._renewed(a, b)), int(self._renewed(b, a))] if onto else orders
            if not onto and not self._apart(a, b):
                return None
        scaled = b if factor == 1 else self._times(b, factor)
        carried, branch = (a, scaled) if orders[0] >= orders[1] else (scaled, a)
        if kernel.endswith("_"):
            carried, branch = (self._times(t, 1.0) if t is args[0] else t for t in (carried, branch))
        return carried, branch, onto

    def _renewed(self, a: Tensor, b: Tensor) -> bool:
        """Whether ``a`` was made of the stream alone, as a norm after the addition makes it, and a branch joins it."""
        mine, other = self._origins.get(key_of(a)), self._origins.get(key_of(b))
        return mine is not None and mine.stream and not mine.products and other is not None and bool(other.products)

    def _apart(self, a: Tensor, b: Tensor) -> bool:
        """Whether a sum is of an attention and a feed-forward: a parallel block, whose parts are then kept apart."""
        kinds = [self._kinds(t) for t in (a, b)]
        return all(len(k) > 0 and "" not in k for k in kinds) and len(kinds[0] | kinds[1]) == 2

    def _kinds(self, t: Tensor) -> set[str]:
        origins = (
            [term.origin for term in self._sums[key_of(t)]]
            if key_of(t) in self._sums
            else [self._origins.get(key_of(t))]
        )
        return {"" if o is None else self.record.kind(o) for o in origins}

    def _terms(self, t: Tensor, like: Tensor) -> list[Term]:
        """The parts of a branch, each as it is added."""
        if (gated := self._gated.get(key_of(t))) is not None:
            gate, branch, factor = gated
            return [replace(term.times(factor), gate=gate) for term in self._terms(branch, like)]
        parts = self._sums.get(key_of(t))
        if parts is not None and all(p.value.numel() == t.numel() for p in parts):
            return parts
        source, factor = self._chains.get(key_of(t), (None, 1.0))
        value = t if t.numel() == like.numel() else t.expand(like.shape)
        return [
            Term(value, self._origins.get(key_of(t), Origin()), source if isinstance(source, Normed) else None, factor)
        ]

    def _add(self, kernel: str, joined: tuple[Tensor, Tensor, bool], out: Tensor) -> None:
        carried, branch, onto = joined
        if not onto:
            terms = [*self._terms(carried, out), *self._terms(branch, out)]
            self._sums[key_of(out)] = terms
            self._origins[key_of(out)] = Origin.union(t.origin for t in terms) or Origin()
            return
        record = self.record
        for t in (carried, branch):
            self._entered(t)
        before = carried if record.stream is None or record.stream.numel() != carried.numel() else record.stream
        if key_of(carried) not in self._roots:  # the stream begins anew: what came before is behind a norm
            source, _ = self._chains.get(key_of(carried), (None, 1.0))
            before = source.out if isinstance(source, Normed) and source.out.numel() == carried.numel() else carried
        if key_of(branch) not in self._roots and self._parameter(branch) is None:
            for term in self._terms(branch, out):
                if term.origin.products:
                    record.added.append(Added(before, carried, term, len(record.products)))
        self._move(out)

    # ---- everything else ----------------------------------------------------------------------------------------------

    def _follow(
        self,
        kernel: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[Tensor],
        known: list[tuple[Any, float] | None],
        out: Tensor,
    ) -> None:
        """Follow parameters, the stream and what is one of them but for a factor through one kernel."""
        if not given or not isinstance(args[0] if args else None, Tensor | list | tuple):
            return
        first = given[0]
        held = self._parameter(first)
        if held is not None and kernel == "embedding":
            self._looked_up(held[0], held[1], out)
            return
        if held is not None and self._of_parameters(kernel, given):
            if key_of(out) != key_of(first):
                self._hold(out, held[0], held[1] * (factor_of(kernel, args) or 1.0))
            return
        if (
            self._patched(kernel, args, out)
            or self._modulated(kernel, args, out)
            or self._normed(kernel, args, given, out)
        ):
            return
        if self._product(kernel, args, kwargs, out):
            return
        factor = factor_of(kernel, args)
        index = next((i for i, t in enumerate(given) if t.numel() > 1 or len(given) == 1), 0)
        chain, wide = known[index], given[index]
        if chain is not None and isinstance(chain[0], Scores) and kernel in (*_SUMS, *_MASKS, *_SLOPE_ONE, "cat"):
            self._chains[key_of(out)] = chain  # masks, positions and sinks are no multipliers
            return
        if factor is None and (
            kernel in (*_COPIES, "cat") or (kernel in _SLOPE_ONE and chain and isinstance(chain[0], Product))
        ):
            factor = 1.0
        if factor is None:
            return
        if chain is not None:
            self._chains[key_of(out)] = chain[0], chain[1] * factor
        if key_of(out) == key_of(wide):
            return
        if key_of(wide) in self._gated and out.numel() == wide.numel():
            gate, branch, before = self._gated[key_of(wide)]
            self._gated[key_of(out)] = gate, branch, before * factor
        if key_of(wide) in self._sums and out.numel() == wide.numel():
            self._sums[key_of(out)] = [t.times(factor) for t in self._sums[key_of(wide)]]
        rows = self._wide(out) or self._of_patches(out)
        if rows and out.numel() == wide.numel() and self._order(wide) >= 0 and kernel != "cat":
            self._roots[key_of(out)] = out
            self._alive.append(out)

    def _of_parameters(self, kernel: str, given: list[Tensor]) -> bool:
        """Whether a kernel makes of a parameter alone what still is that parameter: a cast, a multiple, 1 + gain."""
        if kernel in _COPIES:
            return True
        alone = all(self._parameter(t) is not None or t.numel() == 1 for t in given)
        return alone and kernel in (*_SUMS, *TIMES, "rsub")

    def _normed(self, kernel: str, args: tuple[Any, ...], given: list[Tensor], out: Tensor) -> bool:
        """Norms, fused or made of a square, a mean and a product; their gain and bias."""
        if kernel in ("native_layer_norm", "_fused_rms_norm") and self._wide(out):
            vectors = [held[0] for t in given[1:] if (held := self._parameter(t)) is not None]
            return self._ends(Normed(given[0], out, vectors))
        if kernel in ("pow", "square") or (kernel == "mul" and len(given) == 2 and given[0] is given[1]):
            self._squared = given[0] if self._wide(given[0]) else self._squared
        if kernel in _ROWS and out.shape[-1:] == (1,) and self._squared is not None:
            self._rows[key_of(out)] = given[0] if kernel not in ("mean", "sum") else self._squared
        by_rows = [self._rows[key_of(t)] for t in given if key_of(t) in self._rows]
        if by_rows and out.shape[-1:] == (1,):
            self._rows[key_of(out)] = by_rows[0]
        if by_rows and kernel in TIMES and self._wide(out) and by_rows[0].numel() == out.numel():
            return self._ends(Normed(by_rows[0], out, []))
        if kernel in (*TIMES, *_SUMS) and len(given) == 2:
            for t, other in (given, given[::-1]):
                held, (source, _) = self._parameter(t), self._chains.get(key_of(other), (None, 1.0))
                if held is not None and isinstance(source, Normed) and ROLES[held[0].role].vector:
                    return self._ends(Normed(source.given, out, [*source.vectors, held[0]]))
        return False

    def _ends(self, made: Normed) -> bool:
        self._entered(made.given)
        self._chains[key_of(made.out)] = made, 1.0
        self._keep(made, "given", "out")
        self.record.norms.append(made)
        self._last = made
        return True

    def _product(self, kernel: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> bool:
        """Keep a product with a parameter, and the last one of two activations, that may be q·k, if a softmax comes next."""
        if kernel not in _PRODUCTS:
            return False
        left, right = (args[i] for i in _PRODUCTS[kernel])
        for held, other, transposed in ((self._parameter(right), left, False), (self._parameter(left), right, True)):
            if held is not None:
                found = Product(held[0], other, out, transposed, held[1], self._last)
                found.given_is = self._chains.get(key_of(other))
                self._origins[key_of(out)] = Origin(frozenset({len(self.record.products)}))
                self.record.products.append(found)
                self._chains[key_of(out)] = found, 1.0
                self._keep(found, "given", "out")
                if held[0].role == "patch_embedding" and self.record.stream is None:
                    self._move(out)
                    self._chains[key_of(out)] = found, 1.0
                return True
        # of a matrix that is nobody's (an adapter that is not planned), or of two activations: the stream no longer
        origin = self._origins.pop(key_of(out), None)
        if origin is not None and origin.products:
            self._origins[key_of(out)] = Origin(origin.products)
        if kernel in ("bmm", "baddbmm"):
            # baddbmm: without the mask or the positions that come with it
            self._scores = Scores(out.clone() if kernel == "bmm" else left @ right)
            self._chains[key_of(out)] = self._scores, float(kwargs.get("alpha", 1))
            return True
        return False

    def _attention(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What a softmax saw. Routers have one as well, over products with their own matrix: not this."""
        kernel = func.overloadpacket.__name__
        origin = Origin.union(self._origins.get(key_of(t)) for t in args[: 1 if "softmax" in kernel else 2])
        products = [] if origin is None else [self.record.products[i] for i in sorted(origin.products)]
        if "softmax" in kernel:
            scores = args[0]
            # a router's softmax has the experts last, and one row a token
            if scores.dim() >= 3 and scores.shape[-2] > 1 and any(p.info.role != "router" for p in products):
                source, factor = self._chains.get(key_of(scores), (None, None))
                product, scale = (source, factor) if isinstance(source, Scores) else (self._scores, None)
                self.record.softmaxes.append(
                    Softmax(
                        products,
                        None if product is None else product.out,
                        logits=scores,
                        scale=scale,
                        later=seen_ahead(scores),
                    )
                )
            return
        # the unfused form of scaled_dot_product_attention: its products and its softmax were seen one by one
        if "math" in kernel:
            return
        q, k = args[0], args[1]
        scale = kwargs.get("scale")
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        later = q.shape[-2] == k.shape[-2] and unmasked(func, args, kwargs)
        self.record.softmaxes.append(Softmax(products, q=q, k=k, scale=scale, later=later))

    def _entropy(self, args: tuple[Any, ...], out: Tensor) -> None:
        """The mean of a cross-entropy, whatever its own reduction is (0: none, 1: mean, 2: sum), and its number of targets."""
        _, targets, _, reduction, ignored = args
        count = int((targets != ignored).sum())
        self.record.targets.append(targets)
        total = float(out.double().sum())
        self.record.entropies.append((total if reduction == 1 else total / max(count, 1), count))

    def _result(self, t: Tensor, into: list[tuple[Product, float]]) -> None:
        source, factor = self._chains.get(key_of(t), (None, 1.0))
        if isinstance(source, Product):
            into.append((source, factor))

    def finish(self, out: Any) -> None:
        """Note which of the returned tensors are the product with the head, but for a factor."""
        for t in returned(out):
            self._result(t, self.record.returned)


def traced(placed: Iterable[ParamInfo], width: int, run: Callable[[], Any]) -> tuple[Record, Any]:
    """Watch one forward pass.

    Args:
        placed: the parameters to recognise. width: D, which tells the residual stream from other tensors.
        run: calls the model; gradients are off meanwhile.

    Returns:
        What was seen, and what ``run`` returned. Every value is kept, so the batch should be small.
    """
    with torch.no_grad(), Trace(placed, width) as trace:
        out = run()
    trace.finish(out)
    record: Record = trace.record
    return record, out
