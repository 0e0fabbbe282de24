"""A trained run as something that images are drawn from."""

from __future__ import annotations

from collections.abc import Sequence

from mue.lab.data import ImageSet
from mue.lab.models.diffusion import DiffusionModel
from mue.lab.trained.find import TrainedRun
from mue.util.errors import nearest


def model_of(found: TrainedRun) -> DiffusionModel:
    """The model of a run, in eval mode; ``ValueError`` where it draws no images."""
    if found.run.data.get("kind") != ImageSet.kind:
        raise ValueError(
            f"{found.folder} learnt the task {found.run.settings.task!r} on text, and draws no images: mue generate writes text with it"
        )
    model = found.model()
    if not isinstance(model, DiffusionModel):
        raise ValueError(
            f"{found.folder} learnt the task {found.run.settings.task!r}: only diffusion models draw images"
        )
    return model


def classes_named(found: TrainedRun, names: Sequence[str]) -> dict[str, int]:
    """The places of classes by name; all of them where none is named.

    Raises:
        ValueError: a name that is none.
    """
    known: list[str] = found.run.data["classes"]
    for name in names:
        if name not in known:
            raise ValueError(f"--class {name!r} is none of the {len(known)} classes{nearest(name, known)}")
    return {name: known.index(name) for name in names or known}
