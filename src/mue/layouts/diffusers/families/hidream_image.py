"""HiDream: its class's own values build no model (no patch, no captions, too few axes)."""

from __future__ import annotations

from mue.layouts.diffusers.family import IMAGE_FAMILIES
from mue.layouts.transformers.family import Family


@IMAGE_FAMILIES.register("HiDreamImageTransformer2DModel")
def hidream_image() -> Family:
    return Family(
        # of the published HiDream-I1 (2505.22705); a caption of its own for each of the 16 + 32 blocks
        defaults={
            "patch_size": 2,
            "in_channels": 16,
            "caption_channels": (4096, 4096),
            "llama_layers": tuple(range(32)) + (31,) * 16,
            "axes_dims_rope": (64, 32, 32),
        }
    )
