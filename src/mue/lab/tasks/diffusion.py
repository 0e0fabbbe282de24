"""Diffusion: learn the velocity of the rectified flow between images and noise.

    t = sigmoid(normal)        x_t = (1 − t) · x_0 + t · ε        loss = mean of (v(x_t, t, class) − (ε − x_0))²

as DiT-MoE is trained (2407.11633). Shape suffixes: B images, C channels, H and W pixels.
"""

from __future__ import annotations

import base64
import hashlib
import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from mue.lab.data import ImageSet
from mue.lab.data.batches import round_keys, shuffled
from mue.lab.data.images.scale import numbers
from mue.lab.train.run import Run, Settings
from mue.lab.train.task import TASKS, Batch, Task, TaskBatches
from mue.plan.plan import PlanData
from mue.shapes import Transformer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mue.lab.models.output import Output

UNLABELLED = 0.1  # part of the labels that training leaves out, for guidance (2207.12598)
SHOWN, SHOWN_STEPS = 10, 12  # classes that a validation draws, and steps of each
TIME_BINS = 8  # of a validation: equally likely parts of the training's times, each at its middle


@TASKS.register("diffusion")
class DiffusionTask(Task):
    """Rectified-flow matching on images with the lab's diffusion transformer.

    A batch is (x_t (B, C, H, W), t (B,), classes (B,), velocities (B, C, H, W)).
    """

    unit: ClassVar[str] = "squared error per pixel"
    reads: ClassVar[str] = ImageSet.kind
    stackable: ClassVar[bool] = True

    def build(self, plan: PlanData, settings: Settings) -> nn.Module:
        from mue.lab.models.diffusion import DiffusionModel

        return DiffusionModel(
            plan.target,
            plan.multipliers,
            balance=settings.balance,  # type: ignore[arg-type]
            z_loss=plan.tuned.z > 0,
            seed=settings.seed,
        )

    def batches(self, run: Run, corpus: ImageSet) -> FlowBatches:
        shape, settings = run.plan.target, run.settings
        assert run.plan.training is not None
        _check_images(shape, corpus)
        return FlowBatches(
            corpus,
            images=run.plan.training.batch // shape.sequence,
            tokens_per_step=run.plan.training.batch,
            held=min(settings.eval_sequences, len(corpus.held_out)),
            seed=settings.seed,
        )

    def loss(self, model: nn.Module, batch: Batch) -> Output:
        output: Output = model(*batch)
        return output

    def watch(self, model: nn.Module) -> dict[str, Any]:
        """A drawn image of each class, of the first :data:`SHOWN`, with the same noise at every validation.

        Returns:
            ``drawn``: pixels, their shape and the way; or ``not_drawn``: why there are none.
        """
        from mue.lab.models.diffusion import DiffusionModel
        from mue.lab.models.draw import draw
        from mue.lab.models.sampling import Sampling

        assert isinstance(model, DiffusionModel)
        shown, way = range(min(SHOWN, model.image.classes)), Sampling(steps=SHOWN_STEPS)
        try:
            drawn = draw(model, shown, shown, way)
        except ValueError as error:  # it diverged, or its router looks at the batch: no reason to stop the run
            return {"not_drawn": str(error)}
        content = base64.b64encode(drawn.tobytes()).decode()
        return {"drawn": {"shape": list(drawn.shape), "bytes": content, "way": asdict(way)}}

    def at_end(self, model: nn.Module, batches: TaskBatches) -> dict[str, Any]:
        from mue.lab.models.at_times import at_times
        from mue.lab.models.diffusion import DiffusionModel

        assert isinstance(model, DiffusionModel)
        place = next(model.parameters()).device
        return at_times(model, [tuple(part.to(place) for part in batch) for batch in batches.validation()])

    def baseline_loss(self, shape: Transformer) -> float:
        # of the mean: noise varies by 1, and pixels, which lie in [-1, 1], by at most 1
        return 2.0


def _check_images(shape: Transformer, corpus: ImageSet) -> None:
    """The model is one for these images; ``ValueError`` says what differs."""
    image = shape.image
    if image is None:
        raise ValueError(
            f"the task diffusion needs a shape that draws images, and {shape.name} has none: add [base.image] and [target.image] with"
            " size, channels, patch and classes"
        )
    found = {"channels": corpus.train.shape[1], "size": corpus.train.shape[2], "classes": len(corpus.classes)}
    if corpus.train.shape[2] != corpus.train.shape[3]:
        raise ValueError(
            f"the images have {corpus.train.shape[2]} rows and {corpus.train.shape[3]} columns, and a model draws squares"
        )
    for name, value in found.items():
        if getattr(image, name) != value:
            raise ValueError(
                f"the data have {name} {value}, the model's image {name} {getattr(image, name)}: change [base.image] and [target.image]"
            )


@dataclass(frozen=True, eq=False)
class FlowBatches:
    """Images on their way to noise: which, how far, with which noise and label is a function of (seed, step) alone.

    Attributes:
        corpus: the images. images: of a step. tokens_per_step: their patches. held: images that a validation reads, at each of
            :data:`TIME_BINS` times. seed: of the run.
    """

    corpus: ImageSet
    images: int
    tokens_per_step: int
    held: int
    seed: int = 0

    def at(self, step: int) -> Batch:
        import torch

        sample_B = np.arange(step * self.images, (step + 1) * self.images, dtype=np.int64)
        epoch_B, place_B = np.divmod(sample_B, len(self.corpus.train))
        for epoch in np.unique(epoch_B):
            here = epoch_B == epoch
            place_B[here] = shuffled(place_B[here], len(self.corpus.train), round_keys("images", self.seed, int(epoch)))
        draw = _generator(f"train {self.seed} {step}")
        class_B = torch.from_numpy(self.corpus.train_class[place_B])
        time_B = torch.randn(self.images, generator=draw).sigmoid()
        unlabelled_B = torch.rand(self.images, generator=draw) < UNLABELLED
        class_B = class_B.masked_fill(unlabelled_B, len(self.corpus.classes))
        return _on_the_way(self.corpus.train[place_B], time_B, class_B, draw)

    def validation(self) -> list[Batch]:
        """A batch for each of :func:`bin_times`: the same images with the same noise in all of them and for every run."""
        import torch

        chosen = np.linspace(0, len(self.corpus.held_out) - 1, self.held).astype(np.int64)
        class_B = torch.from_numpy(self.corpus.held_out_class[chosen])
        return [
            _on_the_way(self.corpus.held_out[chosen], torch.full((self.held,), t), class_B, _generator("validation"))
            for t in bin_times()
        ]


def bin_times(bins: int = TIME_BINS) -> list[float]:
    """The middles of equally likely parts of the training's times, so that the mean over them estimates the training's loss."""
    return [1 / (1 + math.exp(-NormalDist().inv_cdf((i + 0.5) / bins))) for i in range(bins)]


def _on_the_way(image_BCHW: npt.NDArray[np.uint8], time_B: Tensor, class_B: Tensor, draw: torch.Generator) -> Batch:
    """x_t, t, class and velocity of images, with the noise that a generator draws next."""
    import torch

    from mue.lab.models import flow

    image = numbers(image_BCHW)
    noise = torch.randn(image.shape, generator=draw)
    return flow.noised(image, noise, time_B), time_B, class_B, flow.velocity(image, noise)


def _generator(draw: str) -> torch.Generator:
    import torch

    number = hashlib.blake2b(f"diffusion {draw}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(number, "little") >> 1)
