"""How images are drawn, as numbers: the command line reads its defaults here, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from mue.util.errors import nearest, positive, positive_int


@dataclass(frozen=True)
class Sampling:
    """How noise becomes an image.

    Attributes:
        guidance: w of :func:`mue.lab.models.flow.guided`: 1 is the model's own velocity, more of it is surer of the class and less various.
        steps: from noise to image. sampler: of :data:`mue.lab.models.flow.SAMPLERS`.
    """

    guidance: float = 1.5
    steps: int = 25
    sampler: str = "heun"

    def __post_init__(self) -> None:
        from mue.lab.models.flow import SAMPLERS

        object.__setattr__(self, "guidance", positive("guidance", self.guidance, zero=True))
        object.__setattr__(self, "steps", positive_int("steps", self.steps))
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r} is unknown{nearest(self.sampler, SAMPLERS)}")
