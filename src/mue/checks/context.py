"""What every check may look at: the model, the plan, a batch and what the user built from them; measured once, on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mue.checks.branches import Branch, branches
from mue.checks.known import returned
from mue.checks.record import Record
from mue.checks.solve import Coefficients, own_activations, solve_coefficients
from mue.checks.trace import traced
from mue.layouts.layout import ParamInfo, unwrap
from mue.layouts.of_model import placement_of
from mue.layouts.place import Placement
from mue.model.apply import groups_of
from mue.model.tensor_plan import TensorPlan, tensor_plans
from mue.plan.plan import PlanData

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass
class Context:
    """The arguments of :func:`mue.check`, and measurements that several checks share."""

    model: nn.Module
    plan: PlanData
    batch: Any = None
    optimizers: Sequence[Optimizer] = ()
    scheduler: Any = None
    checkpoint: Any = None
    clip: Callable[[], Any] | None = None
    loss: Loss | None = None
    tokens: int = 64  # that branches are taken apart on: each computes every expert
    extra: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def placed(self) -> list[ParamInfo]:
        """Every trainable parameter with its role, in the model's order; ``ValueError`` where one has none."""
        return self.placement.planned

    @cached_property
    def placement(self) -> Placement:
        """That, and what the model's table says to leave alone."""
        return placement_of(self.model)

    @cached_property
    def tensor_plans(self) -> list[TensorPlan]:
        """Every parameter with its planned values; ``ValueError`` where this is not the planned model."""
        return tensor_plans(self.plan, self.model)

    @cached_property
    def expected(self) -> dict[int, dict[str, Any]]:
        """id of a parameter → the optimizer group it belongs to, as planned."""
        return {id(p): group for group in groups_of(self.plan, self.model) for p in group["params"]}

    @property
    def meta(self) -> bool:
        """Whether the model has shapes only."""
        return any(p.is_meta for p in self.model.parameters())

    @cached_property
    def names(self) -> dict[int, ParamInfo]:
        """id of a parameter → what it is. By id, for optimizers hold the tensors themselves."""
        return {id(p.parameter): p for p in self.placed}

    def forward(self) -> Any:
        """What the model returns for the batch, in the mode in which it is."""
        return forward(self.model, self.batch)

    def loss_of_batch(self) -> Tensor:
        """The training loss of the batch, a scalar with a gradient."""
        return loss_of(self.model, self.batch, self.loss)

    @cached_property
    def seen(self) -> tuple[Record, Any]:
        """One forward pass in evaluation mode, kernel by kernel."""
        inner = unwrap(self.model)
        with evaluating(inner):
            return traced(self.placed, self.plan.target.width, lambda: forward(inner, self.batch))

    @cached_property
    def branches(self) -> list[Branch]:
        """What each block added to the residual stream in that pass, in order."""
        return branches(self.seen[0])

    @cached_property
    def parts(self) -> dict[int, Coefficients | None]:
        """Layer → what its feed-forward branch is made of."""
        found: dict[int, Coefficients | None] = {}
        likely: Coefficients | None = None
        own = own_activations(unwrap(self.model))
        for b in self.branches:
            if b.kind == "feed-forward":
                likely = found[b.layer] = solve_coefficients(b, self.placed, self.tokens, likely, own)
        return found

    @cached_property
    def tolerance(self) -> float:
        """Relative, of anything that went through the model's own arithmetic."""
        # A right model's multipliers come out to seven digits in float32 (docs/checks.md). bf16 has eight bits, 0.4 % a
        # rounding, and a branch rounds several times.
        parameters = list(self.model.parameters())
        low = any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters)
        # without a device torch.is_autocast_enabled speaks of CUDA alone
        low |= any(torch.is_autocast_enabled(kind) for kind in {p.device.type for p in parameters} - {"meta"})
        return 4e-2 if low else 2e-3


def forward(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: a mapping as keywords, a tuple or list as arguments, anything else as the one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """The training loss.

    Raises:
        ValueError: the model returns no loss and the user gave no function for it.
    """
    if loss is not None:
        return loss(model, batch)
    out = forward(model, batch)
    found = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if found is None and isinstance(out, Tensor | tuple | list):  # (logits, loss), (loss, logits, …), a loss alone
        found = next((t for t in returned(out) if t.dim() == 0 and t.requires_grad), None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"{type(unwrap(model)).__name__} returned no loss for this batch: put the targets into the batch"
            " (tokens, targets) or give loss=lambda model, batch: ..."
        )
    return found


def logits_of(out: Any) -> Tensor | None:
    """The logits in what a model returned; what it drew, where nothing is called so."""
    found = out.get("logits", out) if isinstance(out, Mapping) else getattr(out, "logits", out)
    return next((t for t in returned(found) if t.dim() >= 2 and t.is_floating_point()), None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, no load counting), then every module's own mode again, for they may differ."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
