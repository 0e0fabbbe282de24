# ruff: noqa: N815 (shape suffixes in field names)
"""A feed-forward branch taken apart: with which coefficients its experts and its dense or shared part add up to it.

Every expert is computed from its own matrices, and the coefficients with which they add up to what the stream received are
solved for, token by token. So the output multiplier, the route scale and every gate weight are read off the branch's output,
whatever code made it (stacked, sorted, grouped or looped experts).

Shape suffixes: T tokens, D width, N experts, K of them, C columns (one per routed expert, one for the shared experts).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mue.checks.branches import Branch
from mue.checks.record import Product
from mue.checks.weights import ACTIVATIONS, Activation, dense_parts, expert_parts, matrices
from mue.layouts.layout import ParamInfo, expert_slices
from mue.rules.roles import ROLES

FIT = 2e-2  # largest relative residual at which a branch counts as understood: beyond what bf16 rounds away
EVEN = 2e-2  # spread of what should be one number for every token, at most: a norm in between spreads it far more


@dataclass(frozen=True)
class Coefficients:
    """How a feed-forward branch is made of its parts.

    Attributes:
        routed: (T, N) coefficient of every expert for every token. single: (T,) of the dense or shared feed-forward, None
            where there is none. residual: what the parts leave unexplained, relative. activation: which one fitted, of the
            routed experts, or of the one feed-forward there is. shared: that of the shared experts.
        given: (T, D) what the branch was computed from. watched: ``single`` was read off the product of the forward pass, for
            its activation is not known.
        determined: as many equations as unknowns.
    """

    routed: Tensor
    single: Tensor | None
    residual: float
    activation: Activation
    shared: Activation
    given: Tensor
    watched: bool = False
    determined: bool = True

    @property
    def fits(self) -> bool:
        return self.residual < FIT and self.determined

    @property
    def active(self) -> Tensor:
        """(T, N) which experts a token really uses."""
        size = self.routed.abs()
        # what the solution leaves for an unused expert is rounding; a hundredth of the largest weight is far above that, but
        # for weights in bf16, whose rounding shows in what the solution leaves of the branch as well
        largest = size.amax(1, keepdim=True) if size.shape[1] else size
        return size > max(1e-2, 8 * self.residual) * largest.clamp(min=1e-30)


@dataclass(frozen=True)
class _Problem:
    """One branch: its input and output, and what its own weights and products say.

    Attributes:
        single: the dense or shared feed-forward's own product, None where it was not seen. logits: (T, N) of its router.
    """

    layer: int
    placed: Sequence[ParamInfo]
    x_TD: Tensor
    y_TD: Tensor
    single: Tensor | None
    logits: Tensor | None

    def first(self, tokens: int) -> _Problem:
        """The same for fewer tokens."""
        cut = [None if t is None else t[:tokens] for t in (self.single, self.logits)]
        return _Problem(self.layer, self.placed, self.x_TD[:tokens], self.y_TD[:tokens], *cut)


def solve_coefficients(
    branch: Branch,
    placed: Sequence[ParamInfo],
    tokens: int = 64,
    likely: Coefficients | None = None,
    own: Sequence[Activation] = (),
) -> Coefficients | None:
    """Solve for what a feed-forward branch is made of.

    Args:
        branch: a feed-forward as it met the stream. placed: the model's parameters with their roles.
        tokens: of how many, the first ones. likely: another layer's result: its activation is tried first.
        own: activations of the model's own, beside the usual ones.

    Returns:
        Coefficients (tokens, N) in float64 with all multipliers in them that the model applied; None where the branch's
        input was not seen.
    """
    best: Coefficients | None = None
    for given in branch.givens:
        x_TD = given[:tokens].to(torch.promote_types(given.dtype, torch.float32))
        y_TD = branch.made[:tokens].double()
        problem = _Problem(branch.layer, placed, x_TD, y_TD, _single(branch, tokens), _logits(branch, tokens))
        found = _best(branch, problem, likely, own)
        if found is not None and (best is None or found.residual < best.residual):
            best = found
        if best is not None and best.fits:
            break
    return best


def _best(
    branch: Branch, problem: _Problem, likely: Coefficients | None, own: Sequence[Activation]
) -> Coefficients | None:
    """The solution with the activations that leave least."""
    if likely is not None and likely.fits and not likely.watched:
        same = _solved(problem, likely.activation, likely.shared)
        # fits to rounding: nothing better will be found by trying the others
        if same is None or not same.determined or (same.residual < 1e-4 and _even(branch, same)):
            return same
    best: Coefficients | None = None
    for candidates in _candidates(problem, own):
        for activation, shared, watched in candidates:
            # four tokens tell activations apart, and computing every expert for each candidate is what costs
            few = _solved(problem.first(4), activation, shared, watched)
            if few is None:
                return None
            if best is None or (few.residual < best.residual and _even(branch, few)):
                best = few
        assert best is not None
        if best.fits and _even(branch, best):
            break
    assert best is not None
    return _solved(problem, best.activation, best.shared, best.watched)


def _candidates(problem: _Problem, own: Sequence[Activation]) -> Iterator[list[tuple[Activation, Activation, bool]]]:
    """Activations of the routed experts and of the shared ones, in groups; one group is tried where none before it fitted.

    One and the same for both, swapped for one of them, and those of the routed experts beside the watched product of the others.
    """
    every = [*ACTIVATIONS, *own]
    yield [(a, a, False) for a in every]
    kinds = {ROLES[p.role].kind for p in problem.placed if problem.layer in p.layers}
    if kinds >= {"expert", "shared"}:
        pairs = [(a, b) for a in ACTIVATIONS for b in ACTIVATIONS if a.name == b.name and a.swapped != b.swapped]
        yield [(a, b, False) for a, b in pairs]
    if problem.single is not None:
        yield [(a, a, True) for a in (every if "expert" in kinds else every[:1])]


def _even(branch: Branch, c: Coefficients) -> bool:
    """Whether the dense or shared feed-forward has one coefficient for all tokens: a norm inside it would not."""
    if c.single is None or c.single.numel() < 2 or not c.determined:
        return True
    single = single_multiplier(branch, c.single)
    return float(single.std(correction=0)) <= EVEN * float(single.mean().abs())


def shared_gate(b: Branch, like: Tensor) -> Tensor | None:
    """σ of the shared experts' own gate, token by token (Qwen2-MoE); None where they have none."""
    gates = [p for p in b.products if p.info.role == "router" and p.info.fan_out == 1]
    return None if not gates else torch.sigmoid(gates[-1].out.reshape(-1)[: like.shape[0]].double())


def single_multiplier(b: Branch, single: Tensor) -> Tensor:
    """(T,) what multiplies the dense or shared feed-forward, its own gate taken out."""
    gate = shared_gate(b, single)
    return single if gate is None or gate.shape != single.shape else single / gate


def _single(branch: Branch, tokens: int) -> Tensor | None:
    """(T, D): what the down projections of the dense or shared feed-forward gave, where they were seen."""
    mine = [
        p for p in branch.ends if ROLES[p.info.role].kind in ("ffn", "shared") and ROLES[p.info.role].part == "down"
    ]
    shape = branch.made.shape
    if not mine or any(p.transposed or p.out.numel() != branch.made.numel() or p.factor != 1 for p in mine):
        return None
    return torch.stack([p.out.reshape(shape)[:tokens].double() for p in mine]).sum(0)


def _logits(branch: Branch, tokens: int) -> Tensor | None:
    # the shared experts' own gate is a router of one
    product = next((p for p in reversed(branch.products) if p.info.role == "router" and p.info.fan_out > 1), None)
    if product is None or product.out.numel() % branch.made.shape[0]:
        return None
    return product.out.reshape(branch.made.shape[0], -1)[:tokens]


def columns(
    layer: int, placed: Sequence[ParamInfo], x_TD: Tensor, activation: Activation, shared: Activation | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """(N, T, D) of the routed experts and (T, D) of the dense or shared feed-forward, without any multiplier."""
    routed = [expert(x_TD, activation) for expert in expert_parts(placed, layer, x_TD.dtype)]
    single = None
    for kind in ("ffn", "shared"):
        part = dense_parts(placed, layer, kind, x_TD.dtype)
        if part is not None:
            single = part(x_TD, shared or activation)
    return (torch.stack(routed) if routed else None), single


def _solved(p: _Problem, activation: Activation, shared: Activation, watched: bool = False) -> Coefficients | None:
    """Coefficients with given activations, token by token in float64; None where the layer has no feed-forward.

    Columns are what each expert gives for the token, (D,) each: D equations for as many unknowns as there are experts.
    Where these are too few, the experts that the router's own logits put last are left out; if the rest explains the
    branch, it is explained.
    """
    routed, single = columns(p.layer, p.placed, p.x_TD, activation, shared)
    single = p.single if watched else single
    every = [m.double() for m in (routed, None if single is None else single[None]) if m is not None]
    if not every:
        return None
    M_TDC = torch.cat(every).permute(1, 2, 0)
    D, N = M_TDC.shape[1], 0 if routed is None else routed.shape[0]
    none = p.y_TD.new_zeros(p.y_TD.shape[0], N)

    def found(c: Tensor, s: Tensor | None, residual: float, determined: bool = True) -> Coefficients:
        return Coefficients(c, s, residual, activation, shared, p.x_TD, watched, determined)

    if not bool(M_TDC.isfinite().all() and p.y_TD.isfinite().all()):
        return found(none, None, float("inf"))
    few = M_TDC.shape[2] >= D
    if few:
        if p.logits is None or p.logits.shape != none.shape:
            return found(none, None, 1.0, determined=False)
        picked_TK = p.logits.topk(D // 2, 1).indices
        kept = torch.cat([picked_TK, torch.arange(N, M_TDC.shape[2]).expand(len(picked_TK), -1)], 1)
        M_TDC = M_TDC.gather(2, kept[:, None].expand(-1, D, -1))
    c_TC, residual = _least_squares(M_TDC, p.y_TD)
    if few:
        all_TC = none.new_zeros(none.shape[0], N + (single is not None))
        c_TC = all_TC.scatter(1, kept, c_TC)
    return found(c_TC[:, :N], None if single is None else c_TC[:, N], residual, not few or residual < FIT)


def _least_squares(M_TDC: Tensor, y_TD: Tensor) -> tuple[Tensor, float]:
    """Coefficients (T, C) of least norm, and what they leave, relative.

    Twins (upcycled experts) share their coefficient, and the sum stays what it is.
    """
    size = M_TDC.norm(dim=1, keepdim=True).clamp(min=1e-300)
    unit = M_TDC / size
    # Unit columns, so that one expert far too large does not hide the others. 1e-9 of the normal equations is 3e-5 of
    # the columns: twins fall below it in float64, experts of their own do not.
    c_TC = torch.linalg.pinv(unit.mT @ unit, rtol=1e-9, hermitian=True) @ (unit.mT @ y_TD[..., None])
    c_TC = c_TC[..., 0] / size[:, 0]
    left = (M_TDC @ c_TC[..., None])[..., 0] - y_TD
    return c_TC, float(left.norm() / y_TD.norm().clamp(min=1e-300))


# ---- what else a model says of itself -----------------------------------------------------------------------------------------


def own_activations(model: nn.Module) -> list[Activation]:
    """Activations of the model's own code: of transformers' experts, whose modules have them as a method on gate and up."""
    found: dict[type, Activation] = {}
    for module in model.modules():
        apply = getattr(module, "_apply_gate", None)
        if callable(apply) and type(module) not in found:

            def mix(gate: Tensor | None, up: Tensor, apply: object = apply) -> Tensor:
                # the parts of a fused tensor in their order: that is also how code sees them which takes every other column
                assert callable(apply) and gate is not None
                out: Tensor = apply(torch.cat([gate, up], -1))
                return out

            found[type(module)] = Activation(f"{type(module).__name__}'s own", mix)
    return list(found.values())


def as_declared(p: Product) -> bool | None:
    """Whether a product is that of the declared axes, by its first rows; None where that cannot be told.

    A bias does not matter: rows are compared less the first of them.
    """
    wide = p.given.shape[-1]
    given, out = p.given.reshape(-1, wide)[:9].double(), p.out.reshape(-1, p.out.shape[-1])[:9].double()
    if p.transposed or len(given) < 2 or len(given) != len(out) or p.info.parameter.dim() > 3:
        return None
    x, y = given[1:] - given[0], out[1:] - out[0]
    for _, tensor in expert_slices(p.info):
        parts = [m.double() for _, m in matrices(p.info, tensor, "expert" in p.info.layout.axes)]
        whole = torch.cat(parts) * p.factor
        for weight in (whole, *(part * p.factor for part in parts)):
            if weight.shape == (y.shape[1], x.shape[1]) and float((x @ weight.T - y).norm()) < FIT * float(y.norm()):
                return True
    return False
