"""The seam for images that need no path: a source is one file of ``mue.lab.data.images.sources``, or of a package of yours.

@IMAGE_SOURCES.register("mine")
def mine(size: int | None, fraction: float) -> list[Part]: ...
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from mue.lab.data.images.part import Part
from mue.util.errors import extra
from mue.util.registry import Registry

Source = Callable[[int | None, float], list[Part]]
"""From the size that was asked for (None: the source's own) and the fraction to hold out to its parts; ``ValueError`` for a size it has not."""

IMAGE_SOURCES: Registry[Source] = Registry("source of images", home="mue.lab.data.images.sources")


def sklearn_datasets(name: str) -> ModuleType:
    """scikit-learn's data sets.

    Args:
        name: of the source that needs them.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import sklearn.datasets
    except ImportError:
        raise ValueError(f'source = "{name}" comes with scikit-learn, in the images extra: {extra("images")}') from None
    found: ModuleType = sklearn.datasets
    return found
