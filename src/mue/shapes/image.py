"""Images in numbers: what a diffusion transformer (2212.09748) draws, and the patches that are its tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from mue.util.errors import explain_calls, positive_int

TIME_FEATURES = 256
"""Sines and cosines of the time that its embedding reads: DiT's number (2212.09748), the same at every width."""
LONGEST = 10_000.0
"""Wavelength of the slowest sine, over 2π: of times and of places, as DiT has it (2212.09748)."""
MODULATIONS = 6
"""Vectors of width d that a block takes from the condition: shift, scale and gate of attention and of the feed-forward (adaLN-zero)."""


@explain_calls
@dataclass(frozen=True)
class Image:
    """Square images of ``size``² pixels in ``channels`` channels, cut into patches of ``patch``² pixels, each of one of ``classes``.

    Raises:
        ValueError: a number that is no whole one above 0; patches that do not divide the image.

    Examples:
        >>> Image(size=32, channels=3, patch=4, classes=10).tokens
        64
    """

    size: int
    channels: int
    patch: int
    classes: int

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, positive_int(f"image.{f.name}", getattr(self, f.name)))
        if self.size % self.patch:
            raise ValueError(
                f"patches of {self.patch} pixels do not divide images of {self.size}: choose another patch"
            )

    @property
    def tokens(self) -> int:
        """Patches of an image, which are its tokens."""
        return (self.size // self.patch) ** 2

    @property
    def patch_elements(self) -> int:
        """Numbers of one patch: the fan-in of the patch embedding, and what the head puts out."""
        return self.patch**2 * self.channels

    def spread(self, width: int, patch_std: float) -> float:
        """Of what patches are normed to at init, the part (a root mean square) in which they differ from each other.

        Places are DiT's fixed sines (2212.09748), of which most turn slowly, and so are alike for all patches; pixels vary by about 1.
        Of n places on a line a wave's mean has the square that all share, (Σ sin)²/n² + (Σ cos)²/n²; what is left of 1 differs.

        Args:
            width: d. patch_std: init std of the patch embedding.
        """
        n, waves = self.size // self.patch, max(width // 4, 1)
        alike = 0.0
        for i in range(waves):
            angle = LONGEST ** (-i / waves)
            sin, cos = (sum(f(angle * j) for j in range(n)) / n for f in (math.sin, math.cos))
            alike += (sin**2 + cos**2) / waves
        pixels = patch_std**2 * self.patch_elements
        return math.sqrt(((1 - alike) / 2 + pixels) / (1 / 2 + pixels))

    @property
    def text(self) -> str:
        """``"32×32×3 in patches of 4"``."""
        return f"{self.size}×{self.size}×{self.channels} in patches of {self.patch}"
