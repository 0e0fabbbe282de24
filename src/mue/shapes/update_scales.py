"""The conventions in which a rate of Muon is stated: by which number, of a matrix's shape alone, the orthogonal update is multiplied.

One step is W ← W·(1 - lr·wd) - lr·s(out, in)·Q with Q orthogonal, so that the same step has another lr under another s, and
another wd beside it, for lr·wd is what shrinks the weight. :func:`converted` goes from one convention to another and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mue.util.errors import nearest


@dataclass(frozen=True)
class UpdateScale:
    """One convention.

    Attributes:
        factor: s as a function of (out, in). formula: the same, to print.
        torch: what ``torch.optim.Muon`` calls it, its ``adjust_lr_fn``. source: where it is defined.
    """

    factor: Callable[[int, int], float]
    formula: str
    torch: str
    source: str


UPDATE_SCALES: dict[str, UpdateScale] = {
    # its operator norm from RMS to RMS is then lr at every shape
    "spectral": UpdateScale(
        lambda out, fan_in: math.sqrt(out / fan_in), "√(out/in)", "spectral_unclamped", "2310.17813, 2502.07529"
    ),
    "keller": UpdateScale(
        lambda out, fan_in: math.sqrt(max(1.0, out / fan_in)),
        "√max(1, out/in)",
        "original",
        "KellerJordan/Muon, muon_update; torch.optim.Muon's default",
    ),
    # an orthogonal m×n matrix has elements of RMS 1/√max(m, n); AdamW's updates had one of about 0.2 there
    "match-rms": UpdateScale(
        lambda out, fan_in: 0.2 * math.sqrt(max(out, fan_in)),
        "0.2·√max(out, in)",
        "match_rms_adamw",
        "2502.16982; MoonshotAI/Moonlight, adjust_lr_for_muon",
    ),
}


def update_scale(name: str) -> UpdateScale:
    """A convention by its name; ``ValueError`` with the nearest known one."""
    if name not in UPDATE_SCALES:
        raise ValueError(f"update_scale {name!r} is not understood{nearest(name, UPDATE_SCALES)}")
    return UPDATE_SCALES[name]


def lr_ratio(before: str, after: str, out: int, fan_in: int) -> float:
    """lr' / lr of the same step of one matrix in another convention; weight decay takes the inverse."""
    return update_scale(before).factor(out, fan_in) / update_scale(after).factor(out, fan_in)


def converted(lr: float, weight_decay: float, before: str, after: str, out: int, fan_in: int) -> tuple[float, float]:
    """(lr, weight decay) in another convention: the same step of the same matrix.

    Args:
        lr, weight_decay: as the convention ``before`` has them. after: the wanted one, both of :data:`UPDATE_SCALES`.
        out, fan_in: of one matrix: of one expert, of one projection in a fused tensor.

    Raises:
        ValueError: an unknown convention.
    """
    ratio = lr_ratio(before, after, out, fan_in)
    return lr * ratio, weight_decay / ratio
