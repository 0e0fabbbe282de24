"""Muon and the AdamW beside it as one optimizer, for the groups of a plan (Keller Jordan's Muon; 2502.16982 for the decay).

    optimizer = Muon.of(plan, model)

A hidden matrix moves along its averaged gradient with all singular values made 1; embedding, head, routers, gains and biases move
as under AdamW. A tensor that holds several matrices (experts, gate and up, q, k and v) is moved matrix by matrix: the polar
factor of several is another thing than the polar factors of each. All matrices of one shape are orthogonalised together.

Shape suffixes: B matrices of one shape, N rows, M columns, N ≤ M.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from mue.model.apply import groups_of
from mue.model.matrices import join, split
from mue.plan.plan import PlanData
from mue.shapes.update_scales import UPDATE_SCALES

Orthogonalize = Callable[[Tensor], Tensor]
Scale = Callable[[int, int], float]
# KellerJordan/Muon, zeropower_via_newtonschulz5: a quintic whose slope at 0 is large; singular values end in about 0.7 … 1.2.
A, B, C, STEPS, EPS = 3.4445, -4.7750, 2.0315, 5, 1e-7
# Elements of the matrices that are iterated at once: they and their products stay in a core's cache (benchmarks/muon.py).
CHUNK = 1 << 18
_SCALES = {one.torch: one.factor for one in UPDATE_SCALES.values()}


def newton_schulz(x_BNM: Tensor) -> Tensor:
    """U·Vᵀ of every matrix of a batch, nearly: five steps of Keller's quintic, in the matrices' own precision.

    A step is X ← P(G)·X with G = X·Xᵀ and P = A + B·G + C·G². All P commute, so their product is made of N×N matrices alone, and
    meets X once; between matrices that are nearly square a step on X itself costs less.

    Args:
        x_BNM: (..., N, M), any N and M. A matrix of zeros stays one.
    """
    rows, columns = x_BNM.shape[-2:]
    if rows > columns:
        return newton_schulz(x_BNM.mT).mT
    x_BNM = x_BNM / x_BNM.norm(dim=(-2, -1), keepdim=True).clamp_min(EPS)
    x_BNM, shape = x_BNM.reshape(-1, rows, columns), x_BNM.shape
    # 17·N³ + 2·N²·M multiplications against 5·N³ + 10·N²·M: from M = 1.5·N on fewer, and from 3·N on clearly faster
    x_BNM = _by_gram(x_BNM) if columns >= 3 * rows else _by_steps(x_BNM)
    return x_BNM.reshape(shape)


def _by_steps(x_BNM: Tensor) -> Tensor:
    for _ in range(STEPS):
        gram_BNN = x_BNM @ x_BNM.mT
        x_BNM = torch.baddbmm(x_BNM, _quintic(gram_BNN), x_BNM, beta=A)
    return x_BNM


def _by_gram(x_BNM: Tensor) -> Tensor:
    gram_BNN = x_BNM @ x_BNM.mT
    product_BNN: Tensor | None = None
    for step in range(STEPS):
        p_BNN = _quintic(gram_BNN)
        p_BNN.diagonal(dim1=-2, dim2=-1).add_(A)
        product_BNN = p_BNN if product_BNN is None else p_BNN @ product_BNN
        if step < STEPS - 1:
            gram_BNN = p_BNN @ (p_BNN @ gram_BNN)
    assert product_BNN is not None
    return product_BNN @ x_BNM


def _quintic(gram_BNN: Tensor) -> Tensor:
    """B·G + C·G²."""
    return torch.baddbmm(gram_BNN, gram_BNN, gram_BNN, beta=B, alpha=C)


def orthogonal(matrices: list[Tensor], orthogonalize: Orthogonalize = newton_schulz) -> list[Tensor]:
    """Every matrix of a list of batches orthogonalised, those of one shape together, wide and tall ones alike.

    Args:
        matrices: (E, out, in) each. orthogonalize: of (B, N, M) with N ≤ M.
    """
    wide = [x if x.size(1) <= x.size(2) else x.mT for x in matrices]
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, x in enumerate(wide):
        alike.setdefault((*x.shape[1:], x.dtype, x.device), []).append(i)
    made: list[Tensor] = list(wide)
    for (rows, columns, *_), places in alike.items():
        batch = torch.cat([wide[i] for i in places])
        done = torch.cat([orthogonalize(part) for part in torch.split(batch, max(1, CHUNK // (rows * columns)))])
        for i, part in zip(places, torch.split(done, [len(wide[i]) for i in places]), strict=True):
            made[i] = part
    return [x if like.size(1) <= like.size(2) else x.mT for x, like in zip(made, matrices, strict=True)]


class Muon(torch.optim.Optimizer):
    """Muon where a group says ``algorithm = "muon"``, torch's AdamW where it says ``"adamw"``.

    Args:
        groups: of ``plan.param_groups(model)``, of a plan for ``optimizer = "muon"``; :meth:`of` makes them.
        orthogonalize: what makes the singular values of (B, N, M), N ≤ M, equal to 1.
        nesterov: look ahead by one step of the momentum, as Keller's, Moonlight's and torch's do.

    Raises:
        ValueError: a group that does not say which of the two it is for.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], orthogonalize: Orthogonalize = newton_schulz, nesterov: bool = True
    ) -> None:
        # where a group says fused, torch's load_state_dict moves Adam's step to the parameter's device, where _adamw has it
        super().__init__(groups, {"nesterov": nesterov, "fused": True})
        self.orthogonalize = orthogonalize

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles have: torch's own part leaves out attributes of subclasses."""
        return {**super().__getstate__(), "orthogonalize": self.orthogonalize}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as the constructor does with each of its own.

        Raises:
            ValueError: it does not say which of the two algorithms it is for.
        """
        if param_group.get("algorithm") not in ("muon", "adamw"):
            raise ValueError(
                'a group without algorithm = "muon" or "adamw": use the groups of a plan, mue.HParams(..., optimizer="muon")'
            )
        super().add_param_group(param_group)

    @classmethod
    def of(cls, plan: PlanData, model: nn.Module, **more: Any) -> Muon:
        """The optimizer of a planned model; ``more`` goes to the constructor."""
        return cls(groups_of(plan, model), **more)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon()
        for group in self.param_groups:
            if group["algorithm"] == "adamw":
                _adamw(group, self.state)
        return loss

    def _muon(self) -> None:
        """The matrices of all groups, orthogonalised together; then each group's own rate, scale and decay."""
        moved = [
            (g, p) for g in self.param_groups if g["algorithm"] == "muon" for p in g["params"] if p.grad is not None
        ]
        parts = [split(self._averaged(group, p), group["matrices"]) for group, p in moved]
        flat = iter(orthogonal([x for many in parts for x in many], self.orthogonalize))
        for (group, p), many in zip(moved, parts, strict=True):
            scale = _SCALES[group["adjust_lr_fn"]]
            update = join([next(flat) * scale(x.size(1), x.size(2)) for x in many], group["matrices"], p)
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _averaged(self, group: dict[str, Any], p: Tensor) -> Tensor:
        """The momentum of one tensor, a step ahead with Nesterov; as torch.optim.Muon has it, in at least single precision."""
        state = self.state[p]
        assert p.grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        average = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        update = p.grad.lerp(average, group["momentum"]) if group["nesterov"] else average
        return update.to(torch.promote_types(update.dtype, torch.float32))


def _adamw(group: dict[str, Any], states: Any) -> None:
    """torch's own AdamW (1711.05101) on one group, fused, with the states that torch.optim.AdamW would have."""
    held = [p for p in group["params"] if p.grad is not None]
    for p in held:
        if "step" not in states[p]:
            states[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            states[p]["exp_avg"], states[p]["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
    columns = ([states[p][key] for p in held] for key in ("exp_avg", "exp_avg_sq", "step"))
    mean, square, steps = columns
    beta1, beta2 = group["betas"]
    adamw(
        held, [p.grad for p in held], mean, square, [], steps, fused=True, amsgrad=False, beta1=beta1, beta2=beta2,
        lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
    )  # fmt: skip
