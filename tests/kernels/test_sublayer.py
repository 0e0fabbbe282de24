"""The kernels of whole sublayers, attention and feed-forward, against torch's operators in double precision and in bf16."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mue.kernels import library, sublayer
from mue.lab.models.layers import rotary_table
from mue.lab.models.ops import rotate
from support.precision import close, norm_off

Leaves = list[Tensor | None]


def both(ours: Callable[..., Tensor], exact: Callable[..., Tensor], leaves: Leaves) -> list[float]:
    """How far the result and each gradient are from those in float64."""
    found = []
    for function, kind in ((ours, torch.float32), (exact, torch.float64)):
        given = [None if x is None else x.detach().to(kind).requires_grad_() for x in leaves]
        y = function(*given)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(kind)
        found.append([y.detach(), *torch.autograd.grad(y, [x for x in given if x is not None], dy)])
    return [norm_off(o, e) for o, e in zip(*found, strict=True)]


def normed(x: Tensor, gain: Tensor) -> Tensor:
    return F.rms_norm(x, gain.shape, gain, 1e-3)


def attention_leaves(B: int, T: int, D: int, H: int, K: int, E: int) -> Leaves:
    torch.manual_seed(6)
    q, k, v = (torch.randn(heads * E, D) / D**0.5 for heads in (H, K, K))
    return [torch.randn(B, T, D), torch.rand(D) + 0.5, q, k, v, torch.rand(E) + 0.5, torch.rand(E) + 0.5, torch.randn(D, H * E) / D**0.5]  # fmt: skip


def plain_attention(x: Tensor, gain: Tensor, q: Tensor, k: Tensor, v: Tensor, q_gain: Tensor, k_gain: Tensor, o: Tensor) -> Tensor:  # fmt: skip
    n, E = normed(x, gain), q_gain.shape[0]
    rope = rotary_table(x.shape[1], E).to(x.dtype)
    heads = [(n @ m.mT).view(*x.shape[:2], -1, E) for m in (q, k, v)]
    heads[:2] = rotate(normed(heads[0], q_gain), rope), rotate(normed(heads[1], k_gain), rope)
    q_BHTE, k_BKTE, v_BKTE = (t.transpose(1, 2) for t in heads)
    y = F.scaled_dot_product_attention(q_BHTE, k_BKTE, v_BKTE, is_causal=True, scale=0.3, enable_gqa=True)
    return x + 0.7 * (y.transpose(1, 2).flatten(-2) @ o.mT)


def kernels_attention(
    x: Tensor, *weights: Tensor, scale: float = 0.3, back: bool = False, residual: float = 0.7, half: bool = False
) -> Tensor:
    rope = rotary_table(x.shape[1], weights[4].shape[0])
    rope = rope.flip(0).contiguous() if back else rope
    return sublayer.attention(x, weights, rope, scale=scale, residual=residual, eps=1e-3, half=half)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """More threads than one sum gradients apart."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("kernel", "threads")
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 10, 2, 1, 6), (3, 40, 32, 4, 2, 32), (1, 70, 24, 1, 1, 40), (5, 1, 8, 2, 2, 4), (4, 128, 64, 2, 2, 32)],
)
def test_the_kernels_attention_is_torchs(shape: tuple[int, int, int, int, int, int]) -> None:
    """From norm to sum, with grouped heads, lengths and widths that fill no block; it sees all that it is given."""
    leaves = attention_leaves(*shape)
    bound = 4e-6
    if shape[1] == 1:  # one token attends to itself: the gradients of q and k are zero
        assert all(
            e < bound for i, e in enumerate(both(kernels_attention, plain_attention, leaves)) if i not in (3, 4, 6, 7)
        )
        return
    assert max(both(kernels_attention, plain_attention, leaves)) < bound
    for wrong in ({"scale": 0.31}, {"back": True}, {"residual": 0.71}):  # negative controls
        assert both(functools.partial(kernels_attention, **wrong), plain_attention, leaves)[1] > 10 * bound
    x, *weights = (leaf for leaf in leaves if leaf is not None)
    later = x.clone()
    later[:, -1] += 1
    first, second = (kernels_attention(t, *weights) for t in (x, later))
    operations = 3 * shape[2] + 2 * shape[1] + 3 * shape[5]  # products over the width, tokens and a head
    assert close(second[:, :-1], first[:, :-1], operations=operations)  # causal
    assert not close(second[:, -1:], first[:, -1:], operations=operations)


@pytest.mark.usefixtures("kernel", "threads")
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(5, 7, 9), (200, 32, 96), (333, 72, 40), (1, 32, 33)])
def test_the_kernels_feed_forward_is_torchs(shape: tuple[int, int, int], gated: bool) -> None:
    torch.manual_seed(7)
    M, D, H = shape
    gate = torch.randn(H, D) / D**0.5 if gated else None
    leaves = [torch.randn(M, D), torch.rand(D) + 0.5, gate, torch.randn(H, D) / D**0.5, torch.randn(D, H) / H**0.5]

    def exact(x: Tensor, gain: Tensor, gate: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
        n = normed(x, gain)
        hidden = F.gelu(n @ up.mT) if gate is None else F.silu(n @ gate.mT) * (n @ up.mT)
        return x + 0.7 * (hidden @ down.mT)

    def ours(x: Tensor, *weights: Tensor | None, residual: float = 0.7, half: bool = False) -> Tensor:
        return sublayer.feed_forward(x, weights, residual=residual, eps=1e-3, half=half)

    assert max(both(ours, exact, leaves)) < 4e-6
    assert max(both(functools.partial(ours, residual=0.71), exact, leaves)) > 1e-4  # negative control
    rounded = both(functools.partial(ours, half=True), exact, leaves)
    assert 5e-4 < max(rounded) < 2e-2


@pytest.mark.usefixtures("kernel", "threads")
@pytest.mark.parametrize("engine", ["plain", "dot products"])
def test_in_bf16_the_kernels_are_as_exact_as_torchs_operators(engine: str) -> None:
    """Attention, gated and plain feed-forward of any size, by every way that this processor has: against the same in float64.

    How large the errors of a few numbers are (a gain's) is a draw: each tensor's are bounded over all examples together.
    """
    loaded = library.loaded()
    assert loaded is not None
    if engine not in library.offered(loaded):
        pytest.skip(f"this processor has no {engine}")
    squares: dict[
        tuple[str, int], list[float]
    ] = {}  # by kernel and tensor: of its errors, and of those of torch's operators

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(B=st.integers(1, 4), T=st.integers(16, 70), D=st.integers(24, 80), K=st.integers(1, 2), group=st.integers(1, 2), E=st.integers(4, 20))  # fmt: skip
    def examples(B: int, T: int, D: int, K: int, group: int, E: int) -> None:
        for name, found, allowed in in_bf16(engine, B, T, D, K, group, E):
            assert max(found) > 1e-4  # negative control: it rounds
            for i, (f, a) in enumerate(zip(found, allowed, strict=True)):
                both_squares = squares.setdefault((name, i), [0.0, 0.0])
                both_squares[0] += f**2
                both_squares[1] += a**2

    examples()
    assert len(squares) > 15
    assert all(f <= 1.2**2 * a for f, a in squares.values()), squares


def in_bf16(
    engine: str, B: int, T: int, D: int, K: int, group: int, E: int
) -> list[tuple[str, list[float], list[float]]]:
    """For each kernel the relative errors of its result and gradients, and those of torch's operators under autocast."""
    attention = attention_leaves(B, T, D, K * group, K, 2 * E)
    feed_forward: Leaves = [
        torch.randn(s) / s[-1] ** 0.5 for s in ((B, T, D), (D,), (3 * E, D), (3 * E, D), (D, 3 * E))
    ]

    def plain(x: Tensor, gain: Tensor, gate: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
        n = normed(x, gain)
        return x + 0.7 * (F.gelu(n @ up.mT) if gate is None else F.silu(n @ gate.mT) * (n @ up.mT)) @ down.mT

    def ours(x: Tensor, *weights: Tensor | None) -> Tensor:
        return sublayer.feed_forward(x, weights, residual=0.7, eps=1e-3, half=True)

    def loop(function: Callable[..., Tensor], *given: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "engine", lambda: engine)
        return [
            (name, list(both(kernels, exact, leaves)), list(both(functools.partial(loop, exact), exact, leaves)))
            for name, kernels, exact, leaves in (
                ("attention", functools.partial(kernels_attention, half=True), plain_attention, attention),
                ("feed forward", ours, plain, feed_forward),
                ("no gate", ours, plain, [*feed_forward[:2], None, *feed_forward[3:]]),
            )
        ]


@pytest.mark.usefixtures("kernel", "threads")
@pytest.mark.parametrize("name", ["attention", "feed forward", "no gate"])
@pytest.mark.parametrize("variants", [1, 2, 3, 6, 7])
def test_the_kernels_variants_are_themselves(name: str, variants: int) -> None:
    """Stacked, each has the result and the gradients that it has alone: whether threads share it or it has one to itself."""
    torch.manual_seed(11)
    B, T, D, E = 4, 17, 24, 8
    rows = [(D,), (D, D), (E, D), (E, D), (E,), (E,), (D, D)]
    if name != "attention":
        rows = [(D,), (40, D), (40, D), (D, 40)]
    weights: list[Tensor] = [torch.randn(variants, *row, requires_grad=True) for row in rows]
    x = torch.randn(variants, B, T, D, requires_grad=True)
    rope = rotary_table(T, E)

    def run(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
        if name == "attention":
            y = sublayer.attention(x, weights, rope, scale=0.3, residual=0.7, eps=1e-3)
        else:
            given = [weights[0], None if name == "no gate" else weights[1], *weights[2:]]
            y = sublayer.feed_forward(x, given, residual=0.7, eps=1e-3)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *weights], allow_unused=True)]

    together = run(x, weights)
    for v in range(variants):
        for ours, alone in zip(together, run(x[v], [w[v] for w in weights]), strict=True):
            assert (ours is alone is None) or norm_off(ours[v], alone.double()) < 2e-6
    if variants > 1:  # negative control: another variant's is another
        assert norm_off(together[1][0], together[1][1].double()) > 0.1
