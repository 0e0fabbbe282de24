"""Rewriting a safetensors file tensor by tensor, a chunk at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mue.convert import rewrite
from mue.util.safetensors import read_header

pytestmark = pytest.mark.usefixtures("in_float64")


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.sampled_from(["F64", "F32", "F16", "BF16"]), st.integers(0, 300)), min_size=1, max_size=5
    ),
    chunk=st.integers(1, 40),
    metadata=st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3),
)
def test_streaming_is_the_function_on_every_tensor(
    sizes: list[tuple[str, int]], chunk: int, metadata: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    tensors = {f"t{i}": torch.randn(n).to(rewrite._TYPES[kind]) for i, (kind, n) in enumerate(sizes)}
    save_file(tensors, folder / "a.safetensors", {"old": "1"})
    seen: list[int] = []

    def half(values: Tensor) -> Tensor:
        seen.append(values.numel() * values.element_size())
        return values / 2

    before, rewrite.CHUNK = rewrite.CHUNK, 8 * chunk
    try:
        rewrite.rewrite(
            folder / "a.safetensors", folder / "b.safetensors", lambda n: None if n == "t0" else half, metadata
        )
    finally:
        rewrite.CHUNK = before
    new = load_file(folder / "b.safetensors")
    assert all(torch.equal(new[n], t if n == "t0" else t / 2) for n, t in tensors.items()) and set(new) == set(tensors)
    assert read_header(folder / "b.safetensors").metadata == metadata
    assert all(n <= 8 * chunk for n in seen)  # never more than a chunk at once
