"""Many variants of one model trained as one program: weights with a leading axis of variants, one optimizer step for all.

    stack = StackedSession(session, size=8)  # of a run of the kind
    stack.put(0, session)                    # the run moves in: from now on its model and optimizer are views of the stack's tensors
    stack.step()                             # a step of every run in it, each with its own batch, schedule and settings
    stack.drop(0)                            # and out again; the others notice nothing

The leading axis is explicit in the model (``mue.lab.models.language`` broadcasts over it) rather than made by ``torch.func.vmap``: routing to experts
depends on the data and writes in place, which vmap cannot follow, and a batched product is what vmap would make of a dense model anyway.
Nothing in the program mixes variants (no sum, norm or product runs over their axis, except the sum whose gradient is 1 for each), so a
variant that diverges takes its own slice along and nothing else.

Shape suffixes: V variants, B sequences, T tokens, N tensors of one size, S elements of one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mue.lab.models.stacked_moe import StackedMoE
from mue.lab.train.run import Run
from mue.lab.train.session import TrainingSession
from mue.lab.train.step import autocast, compile_blocks, moe_layers, objective, uncompiled
from mue.lab.train.task import Batch, task_of
from mue.model.matrices import Matrices, join, split, stacked_once_more
from mue.model.muon import Scale, orthogonal
from mue.moe import MoELayer
from mue.shapes.update_scales import UPDATE_SCALES
from mue.util.files import digest

# Settings that a stack computes with; in all others its runs may differ.
_SHARED = ("precision", "balance", "consistency", "eval_sequences", "task")


def check_stackable(run: Run) -> None:
    """Refuse a run whose task builds a model that has no leading axis of variants, or whose routers do not get along with one.

    Raises:
        ValueError: it is one.
    """
    if not task_of(run.settings).stackable:
        raise ValueError(
            f"runs of the task {run.settings.task!r} cannot be stacked: its model has no axis of variants (Task.stackable);"
            ' use runner = "processes"'
        )
    if run.settings.ema:
        raise ValueError('runs with averages of their weights (ema) cannot be stacked; use runner = "processes"')
    for kind in (block.router_kind for block in run.plan.target.blocks if block.experts):
        if not kind.stackable:
            raise ValueError(
                f"runs with the {kind.name} router cannot be stacked: its layers share trained parameters, which have no axis of"
                ' variants; use runner = "processes"'
            )


def stack_kind(run: Run) -> str:
    """What runs that can share a stack have in common, as a hash: shape, multipliers, data, batch size and a few settings.

    Learning rates, weight decays, eps, betas, schedules, seeds and lengths may differ: they are tensors of the stack.

    Raises:
        ValueError: the run cannot be stacked at all.
    """
    check_stackable(run)
    effective, tuned = run.effective, run.plan.tuned
    settings = {k: v for k, v in effective["settings"].items() if k in _SHARED}
    batch = effective["training"]["batch"]
    # Whether there is a z loss, not how much of one: the model computes it only where a coefficient asks for it.
    alike = [effective["shape"], effective["multipliers"], effective["data"], batch, settings, tuned.z > 0]
    return digest([*alike, tuned.optimizer, tuned.update_scale, tuned.muon_moves])


class ParameterBank:
    """All parameters of one size that one optimizer moves, of all variants, with their gradients and its state.

    Of one size, so that AdamW is a few short sequences: one compiled over all 91 tensors of a model took 389 s to
    compile and gained nothing (docs/LOG.md, "Runs stacked, in processes, compiled").

    Attributes:
        names: of the N parameters. weight_NVS, grad_NVS, step_NV.
        setting_3NV1: peak lr, weight decay and eps.
        matrices: which of them lie in a parameter that Muon moves; None where AdamW does. shape: of such a parameter.
        states: the optimizer's state by its names, each (N, V, S).
    """

    def __init__(self, named: dict[str, nn.Parameter], variants: int, matrices: Matrices | None = None) -> None:
        self.names, self.matrices = list(named), matrices
        like = next(iter(named.values()))
        self.shape = like.shape
        # Torch's own names, so that a run's checkpoint is the same whether it was trained alone or here.
        names = ("momentum_buffer",) if matrices else ("exp_avg", "exp_avg_sq")
        self.weight_NVS, self.grad_NVS, *states = (
            like.new_zeros(len(named), variants, like.numel()) for _ in range(2 + len(names))
        )
        self.states = dict(zip(names, states, strict=True))
        # In the type that torch counts steps in; one for each parameter though all are equal, since a checkpoint
        # refuses one tensor under many names.
        self.step_NV = like.new_zeros(len(named), variants, dtype=torch.float32)
        self.setting_3NV1 = like.new_ones(3, len(named), variants, 1)

    def put(self, i: int, variant: int, parameter: nn.Parameter, group: dict[str, Any], state: dict[str, Any]) -> None:
        """Take over a parameter of a variant; it and its optimizer's state become views.

        Args:
            i: its place among the N. variant: among the V. parameter: of the variant's own model.
            group, state: its optimizer's, of which peak lr, weight decay and eps, and the moments, are taken.
        """
        views = {}
        for name, bank in {"": self.weight_NVS, **self.states}.items():
            view, value = bank[i, variant].view(parameter.shape), state.get(name) if name else parameter.data
            view.zero_() if value is None else view.copy_(value)
            views[name] = view
        parameter.data = views.pop("")
        state.update(views)
        if self.matrices is None:
            state["step"] = self.step_NV[i, variant]
        for setting_NV1, key in zip(self.setting_3NV1, ("initial_lr", "weight_decay", "eps"), strict=True):
            setting_NV1[i, variant] = group[key]


class StackedSession:
    """``size`` places for runs of one kind, computed together.

    Attributes:
        sessions: the run in each place, or None. An empty place costs as much as a full one and has all weights zero.
    """

    def __init__(self, example: TrainingSession, size: int, *, compiled: bool = False) -> None:
        check_stackable(example.run)
        model = example.model
        self.task, self.settings, self.device, self.compiled = example.task, example.settings, example.device, compiled
        self.sessions: list[TrainingSession | None] = [None] * size
        self.idle = copy.deepcopy(model)  # what the empty places route with
        self.model = copy.deepcopy(model)
        groups = {p: group for group in example.optimizer.param_groups for p in group["params"]}
        self.banks = _stack_parameters(
            self.model, size, {name: groups[p].get("matrices") for name, p in model.named_parameters()}
        )
        self.scale = UPDATE_SCALES[example.run.plan.tuned.update_scale].factor
        self.moe_blocks = [module for module in self.model.modules() if isinstance(module, StackedMoE)]
        for place in range(size):
            self._route(place, moe_layers(self.idle))
        if compiled:
            compile_blocks(self.model)
        # dynamic: one program for banks of all sizes.
        self.adamw_ = torch.compile(adamw_, dynamic=True) if compiled else adamw_

    @property
    def occupied(self) -> list[tuple[int, TrainingSession]]:
        """(place, session) of every run under way."""
        return [(place, session) for place, session in enumerate(self.sessions) if session is not None]

    @torch.no_grad()
    def put(self, place: int, session: TrainingSession) -> None:
        """A run moves in, with whatever state its optimizer has. Its model must not be trained by other means while it is here."""
        named = dict(session.model.named_parameters())
        groups = {p: group for group in session.optimizer.param_groups for p in group["params"]}
        for bank in self.banks:
            bank.step_NV[:, place] = session.step
            for i, name in enumerate(bank.names):
                bank.put(i, place, named[name], groups[named[name]], session.optimizer.state[named[name]])
        self._route(place, session.moe_layers)
        self.sessions[place] = session
        session.stacked, session.compiled = max(session.stacked, len(self.sessions)), self.compiled

    @torch.no_grad()
    def drop(self, place: int) -> None:
        """Empty a place: what was in it, finite or not, is gone."""
        for bank in self.banks:
            for values in (bank.weight_NVS, *bank.states.values()):
                values[:, place] = 0
            bank.setting_3NV1[:, :, place] = 1  # eps above all: 0/0 in an empty place would be NaN
        self._route(place, moe_layers(self.idle))
        self.sessions[place] = None

    def step(self) -> None:
        """One step of every run inside, its bookkeeping included; a run that ends stays until it is dropped."""
        batch = self._batch()
        for bank in self.banks:
            bank.grad_NVS.zero_()  # not set to None: the parameters' gradients are views of it
        with autocast(self.device, self.settings):
            output = self.task.loss(self.model, batch)
        assert output.loss is not None
        own = [session.coefficients if session else None for session in self.sessions]
        each = {name: self._each([0.0 if one is None else one.get(name, 1.0) for one in own]) for name in output.losses}
        objective(output, each).sum().backward()  # type: ignore[no-untyped-call]
        norms = self._clip_()
        self._update_()
        losses = output.loss.tolist()
        for place, session in self.occupied:
            session.end_moe_step_()
            session.advance(losses[place])
        val_losses = self._validate()
        for place, session in self.occupied:
            norm = None if session.tuned.clip is None else norms[place]
            session.record(norm, [r.parts[place] for r in output.routings], val_losses.get(place))

    def _batch(self) -> Batch:
        """Every run's own batch as one with a leading axis of variants, drawn once where runs share seed and step."""
        drawn: dict[tuple[int, int], Batch] = {}
        for _, session in self.occupied:
            order = session.settings.seed, session.step
            if order not in drawn:
                drawn[order] = session.batches.at(session.step)
        idle = next(iter(drawn.values()))  # an empty place computes on anything
        batches = [drawn.get((c.settings.seed, c.step), idle) if c else idle for c in self.sessions]
        return tuple(torch.stack(part).to(self.device) for part in zip(*batches, strict=True))

    def _each(self, values: list[float]) -> Tensor:
        """(V,) of the weights' type."""
        return torch.tensor(values, dtype=torch.float64).to(self.banks[0].weight_NVS)

    @torch.no_grad()
    def _clip_(self) -> list[float]:
        """Scale the gradients of the runs that clip; the norms before it (empty where none clips)."""
        limits = [
            math.inf if session is None or session.tuned.clip is None else session.tuned.clip
            for session in self.sessions
        ]
        if all(math.isinf(limit) for limit in limits):
            return []
        square_V = sum(bank.grad_NVS.square().sum((0, 2)) for bank in self.banks)
        assert isinstance(square_V, Tensor)
        norm_V = square_V.sqrt()
        scale_V1 = (self._each(limits) / (norm_V + 1e-6)).clamp(max=1.0)[:, None]  # as nn.utils.clip_grad_norm_
        for bank in self.banks:
            bank.grad_NVS.mul_(scale_V1)
        return norm_V.tolist()

    @torch.no_grad()
    def _update_(self) -> None:
        """The optimizer's step of all runs, each with its own schedule, betas and step count."""
        rows = []  # in double, as torch.optim has them in Python: 1 - beta^step is small at first
        for session in self.sessions:
            step = session.step + 1 if session else 1
            beta1, beta2 = session.plan.betas if session else (0.0, 0.0)
            own = (session.lr_factor, session.plan.momentum) if session else (0.0, 0.0)
            rows.append([step, *own, beta1, beta2, 1 - beta1**step, 1 - beta2**step])
        like = self.banks[0].weight_NVS
        table = torch.tensor(rows, dtype=torch.float64).to(like.device)
        columns = (column.to(like.dtype)[:, None] for column in table[:, 1:].unbind(1))
        step_V, (factor, momentum, *betas) = table[:, 0], columns
        for bank in self.banks:
            if bank.matrices is None:
                bank.step_NV.copy_(step_V.expand_as(bank.step_NV))
                lr, decay, eps = bank.setting_3NV1
                mean, square = bank.states.values()
                self.adamw_(bank.weight_NVS, bank.grad_NVS, mean, square, lr * factor, decay, eps, *betas)
        muon_([bank for bank in self.banks if bank.matrices is not None], factor, momentum, self.scale)

    @torch.no_grad()
    def _validate(self) -> dict[int, float]:
        """Place → validation loss of the runs for which one is due: together where they are several."""
        due = {place: session for place, session in self.occupied if session.eval_due}
        if len(due) < 2:  # alone it takes a forward pass of one model, not of the whole stack
            return {place: session.validate() for place, session in due.items()}
        models = [self.model, self.idle, *(session.model for _, session in self.occupied)]
        for model in models:
            model.eval()
        columns = []
        for batch in next(iter(due.values())).validation:
            each = tuple(part.to(self.device).expand(len(self.sessions), *part.shape) for part in batch)
            with autocast(self.device, self.settings), uncompiled(self.compiled):
                loss_V = self.task.loss(self.model, each).loss
            assert loss_V is not None
            columns.append(loss_V.tolist())
        for model in models:
            model.train()
        return {place: math.fsum(column[place] for column in columns) / len(columns) for place in due}

    def _route(self, place: int, layers: list[MoELayer]) -> None:
        """The place routes with the routers of ``layers``."""
        for moe, layer in zip(self.moe_blocks, layers, strict=True):
            moe.layers[place] = layer


def adamw_(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, lr: Tensor, decay: Tensor, eps: Tensor,
    beta1: Tensor, beta2: Tensor, correction1: Tensor, correction2: Tensor,
) -> None:  # fmt: skip
    """The step of torch.optim.AdamW (1711.05101, algorithm 2) in place, with settings that broadcast against the tensors.

    Args:
        weight, grad: (N, V, S). mean, square: Adam's moments, likewise. lr, decay, eps: (N, V, 1), the schedule's
            factor in lr.
        beta1, beta2: (V, 1). correction1, correction2: 1 − beta^step, (V, 1).
    """
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad * (1 - beta2))
    weight.mul_(1 - lr * decay)
    weight.sub_(lr / correction1 * mean / ((square / correction2).sqrt() + eps))


def muon_(banks: list[ParameterBank], factor: Tensor, momentum: Tensor, scale: Scale) -> None:
    """The step of :class:`mue.model.muon.Muon` in place: the matrices of all banks, variants and experts orthogonalised together.

    Args:
        banks: of the parameters that Muon moves. factor, momentum: of each variant, (V, 1). scale: s(out, in).
    """
    parts: list[list[Tensor]] = []
    how: list[Matrices] = []
    for bank in banks:
        assert bank.matrices is not None
        average = bank.states["momentum_buffer"].lerp_(bank.grad_NVS, 1 - momentum)
        ahead = bank.grad_NVS.lerp(average, momentum)
        how.append(stacked_once_more(bank.matrices))  # of tensors and variants
        parts.append(split(ahead.view(-1, *bank.shape), how[-1]))
    flat = iter(orthogonal([x for many in parts for x in many]))
    for bank, many, matrices in zip(banks, parts, how, strict=True):
        lr, decay, _ = bank.setting_3NV1
        scaled = [next(flat) * scale(x.size(1), x.size(2)) for x in many]
        update = join(scaled, matrices, bank.grad_NVS.view(-1, *bank.shape)).reshape(bank.grad_NVS.shape)
        bank.weight_NVS.mul_(1 - lr * factor * decay).sub_(lr * factor * update)


def _stack_parameters(model: nn.Module, variants: int, matrices: Mapping[str, Matrices | None]) -> list[ParameterBank]:
    """Give every parameter of ``model`` a leading axis of variants, as views of banks with their gradients.

    ``matrices``: by parameter, those that Muon moves; None where AdamW does.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, MoELayer):
                setattr(module, name, StackedMoE(child, variants))
    sizes: dict[tuple[Any, ...], dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        held = matrices[name]
        sizes.setdefault((held, parameter.numel() if held is None else parameter.shape), {})[name] = parameter
    banks = [ParameterBank(named, variants, held) for (held, _), named in sizes.items()]
    for bank, named in zip(banks, sizes.values(), strict=True):
        for old, weight, grad in zip(named.values(), bank.weight_NVS, bank.grad_NVS, strict=True):
            stacked = nn.Parameter(weight.view(variants, *old.shape))
            stacked.grad = grad.view(stacked.shape)
            for module in model.modules():  # a tied tensor has two places
                module._parameters.update({k: stacked for k, p in module._parameters.items() if p is old})
    return banks
