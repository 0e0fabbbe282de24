"""What each optimizer's numbers become when a weight used as ``c·W`` is stored as ``W' = c·W`` (docs/why/fold.md).

The gradient of W' is 1/c of that of W, and one step must move W' by c times as much. So every cell is a power of c:

    lr' = lr·c^a    weight decay' = wd·c^b    eps' = eps·c^e    state' = state·c^n

This is how a multiplier moves into a weight. How lr and decay scale with width is another table (mue.rules.optimizers), and
it has fewer optimizers: SignSGD, Shampoo, SOAP and LARS can be folded by hand (:func:`fold_numbers`), but no transfer to them is
derived. Every row here is proved by training in both forms for 200 steps in float64 (tests/plan/test_fold_table.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mue.util.errors import nearest

# Adam's averages of g and of g², where g is 1/c of what it was.
MOMENTS: Mapping[str, int] = {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2}
VELOCITY: Mapping[str, int] = {"momentum_buffer": -1}


@dataclass(frozen=True)
class Fold:
    """Powers of c for one optimizer; None where it has no such number.

    Attributes:
        state: name of a state tensor → its power; one that is missing here cannot be converted.
        why: the derivation in a line. floor: power of a floor on rms(W), where there is one.
    """

    lr: int
    weight_decay: int | None
    eps: int | None
    state: Mapping[str, int]
    why: str
    floor: int | None = None


FOLDS: dict[str, Fold] = {
    "adamw": Fold(1, -1, -1, MOMENTS, "m/√v does not know the gradient's scale, eps beside √v does; lr·wd stays"),
    "nadamw": Fold(1, -1, -1, {**MOMENTS, "mu_product": 0}, "as AdamW: Nesterov's average is linear in the gradient"),
    "adamw-independent": Fold(1, 0, -1, MOMENTS, "as AdamW, but the shrink is wd alone"),
    # decay joins the gradient here, and with it Adam's ratio
    "adam-l2": Fold(1, -2, -1, MOMENTS, "wd·W must shrink with the gradient it joins: 1/c, of a weight c times larger"),
    "lion": Fold(1, -1, None, {"exp_avg": -1}, "a sign; lr·wd stays"),
    "signsgd": Fold(1, -1, None, VELOCITY, "a sign; lr·wd stays"),
    # lr' = c²·lr, not c·lr: SGD's step is proportional to the gradient, which is 1/c
    "sgd": Fold(2, -2, None, VELOCITY, "1/c of the gradient must move c times as far; lr·wd stays, decoupled or L2"),
    "muon": Fold(
        1, -1, None, VELOCITY, "the polar factor has no scale (torch's bf16 iteration: exact for powers of two)"
    ),
    "shampoo": Fold(
        1,
        -1,
        -2,
        {"left": -2, "right": -2, **VELOCITY},
        "L^-1/4 G R^-1/4 has no scale; eps is the damping beside G·Gᵀ",
    ),
    "soap": Fold(
        1, -1, -1, {**MOMENTS, "left": -2, "right": -2}, "AdamW in the eigenbasis of G·Gᵀ, which has no scale"
    ),
    "lamb": Fold(
        0, -1, -1, MOMENTS, "the step is relative to ‖W‖; wd stands beside m/√v. Not with a clamp on the weight's norm"
    ),
    # wd/c², for wd·W stands beside a gradient of 1/c, and W is c times as large.
    # What it accumulates are steps, which grow by c.
    "lars": Fold(0, -2, None, {"momentum_buffer": 1}, "the step is relative to ‖W‖; wd·W stands beside the gradient"),
    # wd unchanged and eps1·c⁻², which is torch's own form
    "adafactor": Fold(
        0,
        0,
        -2,
        {"row_var": -2, "col_var": -2, "variance": -2},
        "the step is relative to rms(W), floored at eps2; torch shrinks by lr·wd; eps is eps1, beside the squared gradient"
        " (torch also squares it: exact while that does not bind)",
        floor=1,
    ),
    # Relative updates take lr as it is; c·lr was off by a relative error of 1 in the test
    "hyperball": Fold(
        0, None, -1, {**MOMENTS, **VELOCITY, "radius": 1}, "a relative step, back on the sphere the weight started on"
    ),
}


def fold_of(optimizer: str) -> Fold:
    """The row of an optimizer; ``ValueError`` for one that is not understood."""
    if optimizer not in FOLDS:
        raise ValueError(f"no fold is known for optimizer {optimizer!r}{nearest(optimizer, FOLDS)}")
    return FOLDS[optimizer]


def fold_numbers(
    optimizer: str, c: float, lr: float, weight_decay: float = 0.0, eps: float = 0.0
) -> tuple[float, float, float]:
    """What an optimizer is told of a weight after ``c`` was folded into it, for models without a plan.

    Args:
        optimizer: a row of :data:`FOLDS`. c: what the forward pass multiplied the weight by, above 0.
        lr, weight_decay, eps: before the fold.

    Returns:
        (lr, weight decay, eps) after it; what the optimizer does not have stays as it is.

    Raises:
        ValueError: an optimizer without a row.
    """
    row = fold_of(optimizer)
    return lr * c**row.lr, weight_decay * c ** (row.weight_decay or 0), eps * c ** (row.eps or 0)
