"""Optimizers as users write them: a Muon with the AdamW beside it, a chain of two, one on masters; each with slips to choose from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mue.checks import Report
from mue.model.apply import groups_of
from mue.model.muon import Muon
from support.wiring.case import case

Groups = list[dict[str, Any]]
KELLER = (3.4445, -4.7750, 2.0315)
SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral_unclamped": lambda out, fan_in: math.sqrt(out / fan_in),
    "original": lambda out, fan_in: math.sqrt(max(1.0, out / fan_in)),
    "match_rms_adamw": lambda out, fan_in: 0.2 * math.sqrt(max(out, fan_in)),
    "none": lambda out, fan_in: 1.0,
}


def iterated(x: Tensor, steps: int = 5) -> Tensor:
    """Newton and Schulz in bfloat16, on the last two axes."""
    x = x.bfloat16() / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.size(-2) > x.size(-1):
        return _turned(x.mT, steps).mT
    return _turned(x, steps)


def _turned(x: Tensor, steps: int) -> Tensor:
    a, b, c = KELLER
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def exact(x: Tensor, steps: int = 0) -> Tensor:
    """The polar factor by SVD, which makes something of nothing, too."""
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u @ vh


def _parts(x: Tensor, rows: tuple[int, ...], turns: int) -> list[Tensor]:
    """Fused projections, each by itself: one below the other, or in turns (the first head's q, k, v, the second's)."""
    pieces = x.unflatten(-2, (turns, -1)).split([n // turns for n in rows], dim=-2)
    return [piece.flatten(-3, -2) for piece in pieces]


def _whole(parts: list[Tensor], turns: int) -> Tensor:
    return torch.cat([part.unflatten(-2, (turns, -1)) for part in parts], dim=-2).flatten(-3, -2)


class OwnMuon(Optimizer):
    """Muon by batches of matrices, for the groups of a plan; AdamW where a group says so.

    Class attributes are the slips: ``steps`` of the iteration, ``nesterov``, ``scale`` in place of the groups', ``momentum`` in
    place of theirs, ``flat`` (``"rows"``: a stack's matrices below each other, ``"vectors"``: each one a row, ``"parts"``: fused
    ones as they lie), ``decay`` as a factor on the planned one, ``independent`` of the
    rate, ``exchanged`` with what has none, ``clip`` of the norm of all updates (``"update"``), of each
    (``"each"``) or of the whole step with lr in it (``"step"``), ``raw`` of the gradients, ``also`` more tensors that Muon moves.
    """

    steps, nesterov, scale, momentum, flat, decay = 5, True, "", 0.0, "", 1.0
    independent = exchanged = False
    clip, threshold, raw, orthogonalize = "", 1.0, 0.0, staticmethod(iterated)

    def __init__(self, groups: Groups, also: tuple[int, ...] = ()) -> None:
        super().__init__(groups, {})
        self.also = also

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        if self.raw:
            torch.nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], self.raw)
        updates = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                muon = group.get("algorithm") == "muon" or id(p) in self.also
                u = self._orthogonal(group, p) if muon else self._adamw(group, p)
                updates.append((group, p, u, muon))
        norm = math.sqrt(sum(float(u.norm()) ** 2 for _, _, u, muon in updates if muon))
        for group, p, u, muon in updates:
            if muon and self.clip == "update":
                u = u * min(1.0, self.threshold / (norm + 1e-6))
            if muon and self.clip == "each":
                u = u * min(1.0, self.threshold / (float(u.norm()) + 1e-6))
            if muon and self.clip == "step":
                u = u * (1e-3 / (norm * group["lr"] + 1e-6))
            decay = 0.1 * (group["weight_decay"] == 0) if self.exchanged else group["weight_decay"]
            p.mul_(1 - self.decay * decay * (1.0 if self.independent else group["lr"])).sub_(group["lr"] * u)

    def _orthogonal(self, group: dict[str, Any], p: Tensor) -> Tensor:
        g, state, mu = p.grad, self.state[p], self.momentum or group.get("momentum", 0.95)
        assert g is not None
        buffer = state.setdefault("buffer", torch.zeros_like(p))
        buffer.mul_(mu).add_(g)
        g = g + mu * buffer if self.nesterov else buffer
        if p.dim() < 2:
            return g / g.norm().clamp_min(1e-7)
        how = group.get("matrices") or (("out", "in"), 1, (p.shape[0],))
        axes, rows, turns = how[0], how[2], how[3] if len(how) == 4 else 1
        x = g.mT if axes[-2:] == ("in", "out") else g
        shape = x.shape
        if self.flat == "rows":
            x = x.reshape(-1, shape[-1])
        if self.flat == "vectors":
            x = x.reshape(len(x), -1)
        cut = [x] if self.flat else _parts(x, rows, turns)
        factor = SCALES[self.scale or group.get("adjust_lr_fn", "original")]
        done = [self.orthogonalize(m, self.steps).to(p.dtype) * factor(m.size(-2), m.size(-1)) for m in cut]
        whole = (done[0] if self.flat else _whole(done, turns)).reshape(shape)
        return whole.mT if axes[-2:] == ("in", "out") else whole

    def _adamw(self, group: dict[str, Any], p: Tensor) -> Tensor:
        g, s, (b1, b2) = p.grad, self.state[p], group["betas"]
        assert g is not None
        s["n"] = s.get("n", 0) + 1
        s["m"] = torch.lerp(s.get("m", torch.zeros_like(p)), g, 1 - b1)
        s["v"] = torch.lerp(s.get("v", torch.zeros_like(p)), g * g, 1 - b2)
        return s["m"] / (1 - b1 ** s["n"]) / ((s["v"] / (1 - b2 ** s["n"])).sqrt() + group["eps"])


def own(groups: Groups, also: tuple[int, ...] = (), **slips: Any) -> OwnMuon:
    """A user's Muon with some slips."""
    return type("OwnMuon", (OwnMuon,), slips)(groups, also)  # type: ignore[no-any-return]


def chain(groups: Groups) -> list[Optimizer]:
    """torch's Muon for the groups that are its, torch's AdamW for the rest."""
    muon, adamw = ([g for g in groups if g["algorithm"] == kind] for kind in ("muon", "adamw"))
    return [torch.optim.Muon(muon), torch.optim.AdamW(adamw)]


def chainable(groups: Groups) -> bool:
    """Whether torch's Muon takes all that is Muon's: one matrix a tensor, as (out, in)."""
    hows = [g["matrices"] for g in groups if g["algorithm"] == "muon"]
    return all(how[0] == ("out", "in") and len(how[2]) == 1 for how in hows)


class Masters:
    """Any optimizer on float32 copies that it makes when it is built, and writes back after every step."""

    def __init__(self, groups: Groups, make: Callable[[Groups], Optimizer]) -> None:
        self.pairs = [(p, torch.nn.Parameter(p.detach().float().clone())) for g in groups for p in g["params"]]
        copies = {id(p): master for p, master in self.pairs}
        self.inside = make([{**g, "params": [copies[id(p)] for p in g["params"]]} for g in groups])
        self.param_groups = groups
        self.state = self.inside.state

    @torch.no_grad()
    def step(self) -> None:
        for ours, (g, (p, master)) in zip(self._rates(), self._each(), strict=True):
            g["lr"] = ours
            master.grad = None if p.grad is None else p.grad.float()
        self.inside.step()
        for p, master in self.pairs:
            p.copy_(master)

    def _rates(self) -> list[float]:
        return [g["lr"] for g in self.param_groups for _ in g["params"]]

    def _each(self) -> list[tuple[dict[str, Any], tuple[Tensor, Tensor]]]:
        inner = [g for g in self.inside.param_groups for _ in g["params"]]
        return list(zip(inner, self.pairs, strict=True))


# ---- right ones ------------------------------------------------------------------------------------------------------------

# For a plan for Muon, and for one for AdamW: everything that does as planned, whatever it is called and however it is built.
BY_MUON: dict[str, Callable[[Groups], Any]] = {
    "ours": Muon,
    "a user's": own,
    "a user's, exact polar factors": lambda g: own(g, orthogonalize=staticmethod(exact)),
    "a user's, raw gradients clipped": lambda g: own(g, raw=1e-3),
    "a user's, on masters": lambda g: Masters(g, own),
    "torch's and AdamW": chain,
}
BY_ADAMW: dict[str, Callable[[Groups], Any]] = {
    "torch's": torch.optim.AdamW,
    "torch's, fused": lambda g: torch.optim.AdamW(g, fused=True),
    "torch's, on masters": lambda g: Masters(g, torch.optim.AdamW),
    "a user's": own,
}
STEPS = ("groups", "stale copies", "orthogonalisation", "momentum", "update scale", "weight decay")


def right_optimizers(family: str, seed: int) -> Iterator[tuple[str, Report]]:
    """What the checks of steps say of every right optimizer on a family's model; what fails or stays unmeasured is a false alarm."""
    for muon, many in ((False, BY_ADAMW), (True, BY_MUON)):
        made = case(family, seed, muon=muon)
        made.scheduler = None
        for name, make in many.items():
            groups = groups_of(made.plan, made.model)
            if make is chain and not chainable(groups):
                continue
            made.optimizer = make(groups)
            yield f"{'Muon' if muon else 'AdamW'}: {name}", made.check(only=STEPS)
