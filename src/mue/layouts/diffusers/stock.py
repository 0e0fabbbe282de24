"""A stock model of ``diffusers``: its parameters as observed on a tiny model of its class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from torch import nn

from mue.layouts.diffusers.config import build_image, image_config
from mue.layouts.diffusers.family import image_family_of
from mue.layouts.diffusers.inputs import check_inputs, inputs_of, kinds_of
from mue.layouts.layout import Layout, unwrap
from mue.layouts.observe.describe import Description
from mue.layouts.observe.module_flow import ModuleFlow, module_flows
from mue.layouts.observe.of_image import decide_of_image
from mue.layouts.transformers.describe import describe_config

# Of the tiny model. PixArt reads the sizes of a picture by thirds of the width, and feed-forwards are rounded to multiples of 256: from
# here on those of HiDream grow with the width.
_WIDTH = 192


class _Pass:
    """The forward pass of one tiny model, always on the same inputs."""

    def __init__(self) -> None:
        self._given: tuple[nn.Module, dict[str, Any]] | None = None

    def given(self, model: nn.Module) -> dict[str, Any]:
        if self._given is None or self._given[0] is not model:
            self._given = model, inputs_of(model)
        return self._given[1]

    def run(self, model: nn.Module) -> object:
        return model(**self.given(model))

    def flows(self, model: nn.Module) -> Mapping[str, ModuleFlow]:
        given = self.given(model)
        return module_flows(model, lambda keywords: model(**keywords), given, kinds_of(given))


def describe_images(kind: type[nn.Module], config: Any, rows: Sequence[Layout] = ()) -> Description:
    """Roles for every parameter of an :func:`mue.layouts.diffusers.config.image_config` of any size, observed on a tiny model of the class.

    Raises:
        ValueError: a class that cannot be built and run at a tiny size.
    """
    check_inputs(kind)
    family, one = image_family_of(kind), _Pass()
    tiny = replace(family, tiny={"hidden_size": _WIDTH, **family.tiny})
    return describe_config(config, rows, partial(build_image, kind), one.run, decide_of_image, one.flows, tiny)


def observe_diffusers(model: nn.Module) -> Description:
    """What is known of a stock model, observed once for each class and config; its ``layout_rows`` win.

    Raises:
        ValueError: as :func:`mue.layouts.diffusers.config.image_config` and :func:`describe_images` do.
    """
    inner: Any = unwrap(model)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in inner.config.items() if not k.startswith("_")}
    kind: Any = type(inner)
    return _observed(kind, tuple(sorted(given.items())), tuple(getattr(inner, "layout_rows", ())))


@lru_cache(maxsize=32)  # every function of mue.model asks anew
def _observed(kind: type[nn.Module], given: tuple[tuple[str, Any], ...], rows: tuple[Layout, ...]) -> Description:
    return describe_images(kind, image_config(kind, dict(given)), rows)
