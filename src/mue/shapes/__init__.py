"""A model, a run and its tuned values in numbers.

Here: the shape of a block and of a transformer, batch and steps, tuned values; what follows from them by counting.
Not here: how a value scales (``mue.rules``), and anything that needs torch.
"""

from mue.shapes.block import MEASURED, NORMALISED, Block, parse_notation
from mue.shapes.hparams import DECOUPLED, OPTIMIZERS, HParams, Training
from mue.shapes.image import Image
from mue.shapes.routers import ROUTERS, RouterKind
from mue.shapes.settings import Setting
from mue.shapes.transformer import DEFAULT_HEAD_DIM, Dense, Mixed, MoE, Transformer, shape_from_dict

__all__ = [
    "DECOUPLED",
    "DEFAULT_HEAD_DIM",
    "MEASURED",
    "NORMALISED",
    "OPTIMIZERS",
    "ROUTERS",
    "Block",
    "Dense",
    "HParams",
    "Image",
    "Mixed",
    "MoE",
    "RouterKind",
    "Setting",
    "Training",
    "Transformer",
    "parse_notation",
    "shape_from_dict",
]
