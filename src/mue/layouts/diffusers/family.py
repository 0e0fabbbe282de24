"""What is special about one class of ``diffusers``: most need nothing, the others one file each in ``families``."""

from __future__ import annotations

from collections.abc import Callable

from mue.layouts.transformers.family import Family
from mue.util.registry import Registry

IMAGE_FAMILIES: Registry[Callable[[], Family]] = Registry(
    "family of diffusion transformers", home="mue.layouts.diffusers.families"
)


def image_family_of(kind: type) -> Family:
    """What is special about a class, or about the one that it is made of; of one that nobody registered, nothing."""
    found = next((special for base in kind.__mro__ if (special := IMAGE_FAMILIES.get(base.__name__))), None)
    return Family() if found is None else found()
