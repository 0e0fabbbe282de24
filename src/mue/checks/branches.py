"""What each branch really adds to the residual stream, against the same branch computed here from its weights alone.

A feed-forward branch is taken apart: every expert is computed from its own matrices, and the coefficients with which they
add up to what the stream received are solved for. So the output multiplier, the route scale and every gate weight are read
off the branch's output, whatever code made it (stacked, sorted, grouped or looped experts).

Shape suffixes: T tokens, D width, C columns (one per routed expert, one for the shared experts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mue.checks.record import Added, Normed, Product, Record
from mue.layouts.layout import ParamInfo, expert_slices
from mue.rules.roles import ROLES

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu²": lambda x: F.relu(x).square(),
}
FIT = 2e-2  # largest relative residual at which a branch counts as understood: beyond what bf16 rounds away


@dataclass(frozen=True)
class FeedForwardWeights:
    """The matrices of one feed-forward as (out, in); ``gate`` None where it has none."""

    up: Tensor
    gate: Tensor | None
    down: Tensor

    def __call__(self, x_TD: Tensor, activation: Activation, swapped: bool = False) -> Tensor:
        up = x_TD @ self.up.T
        if self.gate is None:
            hidden = activation(up)
        else:
            gate = x_TD @ self.gate.T
            hidden = activation(up) * gate if swapped else activation(gate) * up
        return hidden @ self.down.T


@dataclass(frozen=True)
class Coefficients:
    """How a feed-forward branch is made of its parts.

    Attributes:
        routed: (T, N) coefficient of every expert for every token. single: (T,) of the dense or shared feed-forward, None
            where there is none. residual: what the parts leave unexplained, relative. activation: which one fitted.
        swapped: the activation is on ``up``. determined: as many equations as unknowns.
    """

    routed: Tensor
    single: Tensor | None
    residual: float
    activation: str
    swapped: bool = False
    determined: bool = True

    @property
    def fits(self) -> bool:
        return self.residual < FIT and self.determined

    @property
    def active(self) -> Tensor:
        """(T, N) which experts a token really uses."""
        size = self.routed.abs()
        # what the solution leaves for an unused expert is rounding; a hundredth of the largest weight is far above that
        largest = size.amax(1, keepdim=True) if size.shape[1] else size
        return size > 1e-2 * largest.clamp(min=1e-30)


@dataclass(frozen=True)
class Branch:
    """One branch of one layer as it met the stream.

    Attributes:
        kind: ``"attention"`` or ``"feed-forward"``. added: the addition. products: those with the layer's parameters of that kind.
        ends: those of them that the branch was made of directly.
    """

    kind: str
    layer: int
    added: Added
    products: tuple[Product, ...]
    ends: tuple[Product, ...]

    @property
    def out(self) -> Tensor:
        """(T, D): as it met the stream."""
        return self.added.term.value.flatten(0, -2)

    @property
    def normed(self) -> Normed | None:
        """The norm that the branch ends in, if it does."""
        return self.added.term.normed

    @property
    def made(self) -> Tensor:
        """(T, D): what the weights gave, before a norm that ends the branch."""
        return self.out if self.normed is None else self.normed.given.reshape(-1, self.out.shape[-1])

    def last(self, *roles: str) -> Product | None:
        """The last product with a parameter of one of ``roles``."""
        return next((p for p in reversed(self.products) if p.info.role in roles), None)

    @property
    def given(self) -> Tensor | None:
        """(T, D): what the feed-forward reads."""
        reading = [p for p in self.products if ROLES[p.info.role].feed_forward and ROLES[p.info.role].reads_residual]
        for p in reading:
            if p.given.shape[-1] == self.out.shape[-1] and p.given.numel() == self.out.numel() and not p.transposed:
                return p.given.reshape(self.out.shape)
        # no router and no shared expert reads all rows of it: the norm before the first product does
        normed = reading[0].normed if reading else None
        return None if normed is None or normed.out.numel() != self.out.numel() else normed.out.reshape(self.out.shape)


def branches(record: Record) -> list[Branch]:
    """The branches of every block in the order of the forward pass; additions that belong to no block are left out.

    A branch is told by what it ends in: o for attention, a down projection for the feed-forward.
    """
    found: list[Branch] = []
    since: dict[tuple[int, str], int] = {}
    for added in record.added:
        layers = {p.info.layer for p in record.ends(added.term.origin) if p.info.layer is not None}
        kind = record.kind(added.term.origin)
        if not layers or not kind:
            continue
        key = max(layers), kind
        own = [p for p in record.products[since.get(key, 0) : added.upto] if p.info.layer == key[0]]
        since[key] = added.upto
        mine = tuple(p for p in own if ROLES[p.info.role].feed_forward == (kind == "feed-forward"))
        found.append(Branch(kind, key[0], added, mine, tuple(record.ends(added.term.origin))))
    return found


# ---- weights -----------------------------------------------------------------------------------------------------------


def matrices(p: ParamInfo, tensor: Tensor, experts: bool) -> Iterator[tuple[str, Tensor]]:
    """(role, matrix as (out, in)) of one tensor, the parts of a fused one apart. ``experts``: the expert axis is gone."""
    axes = [a.removeprefix("expert*") for a in p.layout.axes if not (experts and a == "expert")]
    out, inner = axes.index("out"), axes.index("in")
    whole = tensor if (out, inner) == (0, 1) else tensor.transpose(out, inner)
    parts = p.layout.parts or (p.role,)
    yield from zip(parts, whole.chunk(len(parts), 0), strict=True)


def dense_parts(placed: Iterable[ParamInfo], layer: int, kind: str, dtype: torch.dtype) -> FeedForwardWeights | None:
    """The dense or shared feed-forward of a layer; several shared experts side by side are one of their joint width."""
    found: dict[str, list[Tensor]] = {}
    for p in placed:
        if p.layer == layer and ROLES[p.role].kind == kind:
            for _, tensor in expert_slices(p):
                for role, m in matrices(p, tensor, "expert" in p.layout.axes):
                    found.setdefault(ROLES[role].part, []).append(m.to(dtype))
    return _assembled(found)


def expert_parts(placed: Iterable[ParamInfo], layer: int, dtype: torch.dtype) -> Iterator[FeedForwardWeights]:
    """Every routed expert of a layer, one after another (their copies are freed as they go)."""
    own = [p for p in placed if p.layer == layer and ROLES[p.role].kind == "expert"]
    stacked = [p for p in own if "expert" in p.layout.axes or p.layout.stacked > 1]
    if stacked:
        slices = [[t for _, t in expert_slices(p)] for p in stacked]
        for many in zip(*slices, strict=True):
            yield _expert(zip(stacked, many, strict=True), "expert", dtype)
        return
    apart: dict[int, list[tuple[ParamInfo, Tensor]]] = {}
    for p in own:
        assert p.expert is not None
        apart.setdefault(p.expert, []).append((p, p.parameter.detach()))
    for expert in sorted(apart):
        yield _expert(apart[expert], "", dtype)


def _expert(pairs: Iterable[tuple[ParamInfo, Tensor]], gone: str, dtype: torch.dtype) -> FeedForwardWeights:
    found: dict[str, list[Tensor]] = {}
    for p, tensor in pairs:
        for role, m in matrices(p, tensor, bool(gone)):
            found.setdefault(ROLES[role].part, []).append(m.to(dtype))
    whole = _assembled(found)
    assert whole is not None
    return whole


def _assembled(found: dict[str, list[Tensor]]) -> FeedForwardWeights | None:
    if "up" not in found or "down" not in found:
        return None
    joined = {part: torch.cat(many, 1 if part == "down" else 0) for part, many in found.items()}
    return FeedForwardWeights(joined["up"], joined.get("gate"), joined["down"])


# ---- taking a branch apart -----------------------------------------------------------------------------------------------


def solve_coefficients(
    branch: Branch, placed: Sequence[ParamInfo], tokens: int = 64, likely: Coefficients | None = None
) -> Coefficients | None:
    """Solve for what a feed-forward branch is made of.

    Args:
        branch: a feed-forward as it met the stream. placed: the model's parameters with their roles.
        tokens: of how many, the first ones. likely: another layer's result: its activation is tried first.

    Returns:
        Coefficients (tokens, N) in float64 with all multipliers in them that the model applied; None where the branch's
        input was not seen.
    """
    given = branch.given
    if given is None:
        return None
    x_TD, y_TD = given[:tokens], branch.made[:tokens].double()
    x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    if likely is not None and likely.fits:
        same = _solved(branch.layer, placed, x_TD, y_TD, likely.activation, likely.swapped)
        # fits to rounding: nothing better will be found by trying the others
        if same is None or not same.determined or same.residual < 1e-4:
            return same
    best: Coefficients | None = None
    for name, swapped in [(n, s) for s in (False, True) for n in ACTIVATIONS]:
        # four tokens tell activations apart, and computing every expert for each candidate is what costs
        few = _solved(branch.layer, placed, x_TD[:4], y_TD[:4], name, swapped)
        if few is None or (few.routed.shape[1] and not few.determined):
            return few
        if best is None or few.residual < best.residual:
            best = few
    assert best is not None
    return _solved(branch.layer, placed, x_TD, y_TD, best.activation, best.swapped)


def columns(
    layer: int, placed: Sequence[ParamInfo], x_TD: Tensor, activation: str, swapped: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """(N, T, D) of the routed experts and (T, D) of the dense or shared feed-forward, without any multiplier."""
    act = ACTIVATIONS[activation]
    routed = [expert(x_TD, act, swapped) for expert in expert_parts(placed, layer, x_TD.dtype)]
    single = None
    for kind in ("ffn", "shared"):
        part = dense_parts(placed, layer, kind, x_TD.dtype)
        if part is not None:
            single = part(x_TD, act, swapped)
    return (torch.stack(routed) if routed else None), single


def _solved(
    layer: int, placed: Sequence[ParamInfo], x_TD: Tensor, y_TD: Tensor, activation: str, swapped: bool
) -> Coefficients | None:
    """Coefficients with one activation, token by token in float64; None where the layer has no feed-forward.

    Columns are what each expert gives for the token, (D,) each: D equations for as many unknowns as there are experts,
    so fewer experts than the residual width are needed.
    """
    routed, single = columns(layer, placed, x_TD, activation, swapped)
    every = [m for m in (routed, None if single is None else single[None]) if m is not None]
    if not every:
        return None
    # D equations for C unknowns, token by token: fewer experts than the width, or nothing can be told
    M_TDC = torch.cat(every).permute(1, 2, 0).double()
    experts = 0 if routed is None else routed.shape[0]
    none = y_TD.new_zeros(y_TD.shape[0], experts)
    if M_TDC.shape[2] >= M_TDC.shape[1]:
        return Coefficients(none, None, 1.0, activation, swapped, determined=False)
    if not bool(M_TDC.isfinite().all() and y_TD.isfinite().all()):
        return Coefficients(none, None, float("inf"), activation, swapped)
    # Least squares of least norm: twins (upcycled experts) share their coefficient, and the sum stays what it is.
    size = M_TDC.norm(dim=1, keepdim=True).clamp(min=1e-300)
    unit = M_TDC / size
    # Unit columns, so that one expert far too large does not hide the others. 1e-9 of the normal equations is 3e-5 of
    # the columns: twins fall below it in float64, experts of their own do not.
    c_TC = torch.linalg.pinv(unit.mT @ unit, rtol=1e-9, hermitian=True) @ (unit.mT @ y_TD[..., None])
    c_TC = c_TC[..., 0] / size[:, 0]
    left = (M_TDC @ c_TC[..., None])[..., 0] - y_TD
    residual = float(left.norm() / y_TD.norm().clamp(min=1e-300))
    return Coefficients(c_TC[:, :experts], None if single is None else c_TC[:, experts], residual, activation, swapped)


def fit_sum(out: Tensor, parts: Sequence[Tensor]) -> tuple[list[float], float]:
    """(c, relative residual) of out = Σ c_i · parts_i by least squares, computed in float64.

    Args:
        out, parts: tensors of as many elements.

    Returns:
        ([], inf) where there are no parts.
    """
    if len(parts) == 1:
        c, residue = fit_ratio(out, parts[0])
        return [c], residue
    if not parts:
        return [], float("inf")
    y, M = out.double().flatten(), torch.stack([p.double().flatten() for p in parts], 1)
    c_P = torch.linalg.lstsq(M, y[:, None]).solution[:, 0]
    return c_P.tolist(), float((M @ c_P - y).norm() / y.norm().clamp(min=1e-300))


def fit_ratio(out: Tensor, reference: Tensor) -> tuple[float, float]:
    """(c, relative residual) of out = c · reference by least squares.

    Args:
        out, reference: tensors of as many elements; computed with in float64.

    Returns:
        (nan, inf) where the reference is zero or ``out`` is not finite: no multiple of it is right then.
    """
    a, b = out.double().flatten(), reference.double().flatten()
    square = float(b @ b)
    if square == 0 or not bool(a.isfinite().all()):
        return float("nan"), float("inf")
    c = float(a @ b) / square
    return c, float((a - c * b).norm() / a.norm().clamp(min=1e-300))
