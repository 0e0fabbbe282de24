"""A built library is tried with everything that training takes from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from mue.kernels import build, library, sublayer
from mue.moe import kernel_trial


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The trial takes the library that it is given for the one that is loaded, since it has a process of its own."""
    monkeypatch.setattr(library, "loaded", library.loaded)
    monkeypatch.setattr(library, "engine", library.engine)
    return monkeypatch


@pytest.mark.parametrize("engine", build.ENGINES)
def test_a_library_passes(kernel: Path, own: pytest.MonkeyPatch, engine: str) -> None:
    if engine not in library.offered(library.load(kernel)):
        pytest.skip(f"this processor has no {engine}")
    kernel_trial.main(str(kernel), engine)


@pytest.mark.parametrize("engine", ["plain", "dot products"])
@pytest.mark.parametrize("name", ["attention", "feed_forward"])
def test_a_sublayer_that_computes_wrongly_is_found(
    kernel: Path, own: pytest.MonkeyPatch, engine: str, name: str
) -> None:
    """The branch is a third too large; experts are as they should be."""
    if engine not in library.offered(library.load(kernel)):
        pytest.skip(f"this processor has no {engine}")
    right: Callable[..., Tensor] = getattr(sublayer, name)

    def wrong(x: Tensor, *weights: Any, residual: float, **more: Any) -> Tensor:
        return right(x, *weights, residual=residual * 4 / 3, **more)

    own.setattr(sublayer, name, wrong)
    with pytest.raises(SystemExit, match=name.replace("_", "-")):
        kernel_trial.main(str(kernel), engine)
