"""The Python file for a training loop of one's own: ``init_``, and groups for AdamW or an optimizer with Muon beside it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mue.export.file_text import INIT, clipping, head, matching, table
from mue.export.muon import is_muon, parts
from mue.export.rows import ExportRow, left_alone, rows
from mue.export.scale import own_scale
from mue.model.matrices import unpacked
from mue.plan.plan import PlanData
from mue.rules.optimizers import BOTH
from mue.shapes.update_scales import UPDATE_SCALES, update_scale

_GROUPS = '''

def param_groups(model):
    """Groups for torch.optim.AdamW, one per distinct setting."""
    groups = {}
    for i, parameter in _rows(model):
        lr, weight_decay, eps = ROWS[i][1:4]
        new = {"params": [], "lr": lr, "weight_decay": weight_decay, "eps": eps, "betas": BETAS}
        groups.setdefault(ROWS[i][1:4], new)["params"].append(parameter)
    return list(groups.values())
'''
# Views share the tensor's memory, so torch's own Muon moves the tensor. They are taken anew in each step: a tensor that was
# moved to another device in the meantime would leave old ones behind, which train nothing.
_MUON = '''

def _matrices(tensor, axes, experts, turns, parts):
    """(lr, weight decay, matrix as a view) of every matrix in a tensor."""
    merged = next((i for i, axis in enumerate(axes) if "*" in axis), None)
    if merged is not None:
        tensor = tensor.unflatten(merged, (experts, -1))
        axes = (*axes[:merged], *axes[merged].split("*"), *axes[merged + 1 :])
    tensor = tensor.permute([axes.index(kind) for kind in ("expert", "out", "in") if kind in axes])
    for matrix in tensor if tensor.dim() == 3 else [tensor]:
        first = 0
        for i, (rows, lr, weight_decay) in enumerate(parts):
            yield lr, weight_decay, matrix[first : first + rows] if turns == 1 else matrix[i :: len(parts)]
            first += rows


class MuonAndAdamW(torch.optim.Optimizer):
    """torch.optim.Muon on each matrix of the rows in MATRICES, torch.optim.AdamW on the rest; one optimizer to whoever asks."""

    def __init__(self, model):
        self.held, muon, adamw = [], {}, {}
        for i, parameter in _rows(model):
            if i not in MATRICES:
                lr, weight_decay, eps = ROWS[i][1:4]
                new = {"params": [], "lr": lr, "weight_decay": weight_decay, "eps": eps, "betas": BETAS}
                adamw.setdefault(ROWS[i][1:4], new)["params"].append(parameter)
                continue
            if hasattr(parameter, "placements"):
                raise ValueError("torch.optim.Muon moves whole matrices, and this tensor is sharded: use a stack that gathers them")
            matrices = []
            for lr, weight_decay, view in _matrices(parameter.detach(), *MATRICES[i]):
                matrices.append(torch.nn.Parameter(view))
                new = {"params": [], "lr": lr, "weight_decay": weight_decay, "momentum": MOMENTUM, "adjust_lr_fn": ADJUST_LR_FN}
                muon.setdefault((lr, weight_decay), new)["params"].append(matrices[-1])
            self.held.append((parameter, MATRICES[i], matrices))
        self.optimizers = [torch.optim.Muon(list(muon.values())), torch.optim.AdamW(list(adamw.values()))]
        super().__init__([group for one in self.optimizers for group in one.param_groups], {})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter, how, matrices in self.held:
            views = zip(matrices, _matrices(parameter, *how), strict=True)
            gradients = None if parameter.grad is None else _matrices(parameter.grad, *how)
            for matrix, (_, _, view) in views:
                matrix.grad, matrix.data = None, view
                matrix.grad = None if gradients is None else next(gradients)[2]
        for one in self.optimizers:
            one.step()
        return loss

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        for parameter, _, _ in self.held:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def state_dict(self):
        return {"optimizers": [one.state_dict() for one in self.optimizers]}

    def load_state_dict(self, state_dict):
        for one, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            one.load_state_dict(state)
        self.param_groups[:] = [group for one in self.optimizers for group in one.param_groups]
'''
_IN_PLACE = {"adamw": "torch.optim.AdamW(param_groups(model))", "muon": "MuonAndAdamW(model)"}


def loop_file(plan: PlanData, module: nn.Module, name: str, use: str, code: str = "") -> str:
    """A file with ``init_`` and an optimizer for a training loop of one's own.

    Args:
        plan: folded. module: the planned model. name: for whom, in words. use: lines that show how to call it. code: what the
            file has besides; in both OPTIMIZER stands for the expression that makes the optimizer.
    """
    found, alone = rows(plan, module, optimizers=BOTH), left_alone(module)
    cannot = ["a learning-rate schedule must multiply every group's own lr, never set one lr for all", clipping(plan)]
    if alone:
        cannot.append(
            f"groups of what the model leaves unplanned ({', '.join(row.pattern for row in alone)}): give your optimizer your own"
        )
    muon = is_muon(plan)
    if muon:
        cannot.append("speed: torch.optim.Muon iterates one matrix after the other, each expert by itself, in bfloat16")
    use, code = (text.replace("OPTIMIZER", _IN_PLACE[plan.tuned.optimizer]) for text in (use, code))
    start = head(plan, name, use, cannot, ("re", "", "torch"), own_scale(plan, module)) + table(plan, found)
    start += _matrices(plan, found) if muon else ""
    return start + matching(alone=[row.regex.pattern for row in alone]) + INIT + (_MUON if muon else _GROUPS) + code


def _matrices(plan: PlanData, found: Sequence[ExportRow]) -> str:
    """MOMENTUM, ADJUST_LR_FN and MATRICES as code."""
    # torch 2.13 has no √(out/in): it would scale by 1, without a word
    scale = "keller" if plan.tuned.update_scale == "spectral" else plan.tuned.update_scale
    lines = "".join(
        f"    {i}: {_matrix(row, plan, scale)!r},\n" for i, row in enumerate(found) if row.matrices is not None
    )
    return f"""MOMENTUM, ADJUST_LR_FN = {plan.momentum!r}, {UPDATE_SCALES[scale].torch!r}  # the latter: lr × {update_scale(scale).formula}
# row number → what Muon moves in its tensors: axes, experts along a merged one, turns, (rows, lr, weight decay) of each matrix. The
# rows' own lr and weight decay are the plan's, in its convention (lr × {update_scale(plan.tuned.update_scale).formula}); eps is AdamW's alone.
MATRICES = {{
{lines}}}
"""


def _matrix(row: ExportRow, plan: PlanData, scale: str) -> tuple[object, ...]:
    assert row.matrices is not None
    axes, experts, sizes, turns = unpacked(row.matrices)
    if turns not in (1, sizes[0]):
        raise ValueError(
            f"{row.pattern} holds {row.roles} head by head, of which no view is a matrix, and torch.optim.Muon moves matrices: give each"
            " projection a tensor of its own, or use mue.model.muon.Muon.of(plan, model)"
        )
    words = [word for axis in axes for word in axis.split("*")]
    if len(words) != len(set(words)):
        raise ValueError(
            f"{row.pattern} has axes ({', '.join(axes)}), of which no view is a matrix, and torch.optim.Muon moves matrices: give it two"
            " axes, or use mue.model.muon.Muon.of(plan, model)"
        )
    return axes, experts, turns, parts(row, plan, scale)
