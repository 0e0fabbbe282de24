"""Shapes of published diffusion transformers with experts, by name; the widths are for you to choose."""

from __future__ import annotations

from typing import Any

from mue.shapes.image import Image
from mue.shapes.transformer import MoE


def dit_moe(width: int, layers: int, image: Image, *, experts: int = 8, active: int = 2, **numbers: Any) -> MoE:
    """DiT-MoE (2407.11633): softmax scores, 2 of 8 or 16 experts of width 4d, two shared ones (2d together), load balance at 0.01.

    The authors leave the two scores as they are; here they are normalised, as the rule's R = a needs.

    Args:
        numbers: what else a :class:`mue.MoE` takes.
    """
    own: dict[str, Any] = {
        "expert": 4 * width,
        "shared": width,
        "router": "softmax",
        "router_settings": {"losses": {"load_balance": 0.01}},
    }
    return MoE.parse(f"{experts}e{active}a2s", width=width, layers=layers, image=image, **own | numbers)


def ec_dit(width: int, layers: int, image: Image, *, experts: int = 8, capacity: int = 2, **numbers: Any) -> MoE:
    """EC-DiT (2410.02098): experts of width 4d choose capacity · T/N patches of each image; raw softmax weights, R = a/m1.

    Args:
        numbers: what else a :class:`mue.MoE` takes.
    """
    own: dict[str, Any] = {"expert": 4 * width, "router": "expert-choice", "router_settings": {"within": "sequence"}}
    return MoE.parse(f"{experts}e{capacity}a", width=width, layers=layers, image=image, **own | numbers)
