"""The same training without forward multipliers: they go into init, lr, weight decay and eps, and back.

>>> import mue
>>> from mue.fold import fold, unfold
>>> base, target = mue.Dense(width=128, ffn=128, layers=8), mue.Dense(width=1024, ffn=4096, layers=8)
>>> plan = mue.transfer(base, target, mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.01))
>>> fold(plan).output_multiplier, unfold(fold(plan)) == plan
(1.0, True)

A face: the public names of folding at one place, each from where its work is done (``mue.plan``, ``mue.model``, ``mue.convert``).
Nothing else belongs here. Plans fold without torch; what meets a model imports it on use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mue.plan.fold import fold, unfold
from mue.plan.fold_table import FOLDS, Fold, fold_numbers

if TYPE_CHECKING:
    from mue.convert.live import convert
    from mue.model.clip import agc, clip_grad_norm_
    from mue.model.coefficients import coefficients

__all__ = ["FOLDS", "Fold", "agc", "clip_grad_norm_", "coefficients", "convert", "fold", "fold_numbers", "unfold"]


# Where what meets a model lives; imported on use, since it needs torch.
_ON_MODELS = {
    "agc": "mue.model.clip",
    "clip_grad_norm_": "mue.model.clip",
    "coefficients": "mue.model.coefficients",
    "convert": "mue.convert.live",
}


def __getattr__(name: str) -> Any:
    if name in _ON_MODELS:
        return getattr(import_module(_ON_MODELS[name]), name)
    raise AttributeError(f"module 'mue.fold' has no attribute {name!r}")
