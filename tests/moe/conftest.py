"""Tests of the native backend need its kernel."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _kernel_of_the_native_backend(request: pytest.FixtureRequest) -> None:
    if getattr(request.node, "callspec", None) and "native" in request.node.callspec.params.values():
        request.getfixturevalue("kernel")
