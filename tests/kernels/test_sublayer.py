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


# ---- as a diffusion transformer has them: over all tokens, shifted, scaled and gated ---------------------------------------------


def diffusion_leaves(name: str, B: int, T: int, D: int) -> Leaves:
    """(x, modulation (B, 3 D), weights …); heads of 6 share keys in pairs, inner width 40."""
    rows: list[tuple[int, ...] | None] = [(D,), (24, D), (12, D), (12, D), (6,), (6,), (D, 24)]
    if name != "attention":
        rows = [(D,), None if name == "no gate" else (40, D), (40, D), (D, 40)]
    torch.manual_seed(12)
    weights = [None if row is None else torch.randn(row) / row[-1] ** 0.5 + (len(row) == 1) for row in rows]
    return [torch.randn(B, T, D), torch.randn(B, 3 * D), *weights]


def plain_diffusion(name: str, x: Tensor, modulation: Tensor, gain: Tensor, *weights: Tensor | None) -> Tensor:
    """x + 0.7 · gate · branch(norm x · (1 + scale) + shift) by torch's operators."""
    shift, scale, gate = modulation.unsqueeze(-2).chunk(3, -1)
    n = normed(x, gain) * (1 + scale) + shift
    if name == "attention":
        q, k, v, q_gain, k_gain, o = (w for w in weights if w is not None)
        q, k, v = ((n @ m.mT).unflatten(-1, (-1, 6)) for m in (q, k, v))
        heads = (t.transpose(1, 2) for t in (normed(q, q_gain), normed(k, k_gain), v))
        y = F.scaled_dot_product_attention(*heads, scale=0.3, enable_gqa=True).transpose(1, 2).flatten(-2) @ o.mT
    else:
        first, up, down = weights
        assert up is not None and down is not None
        y = (F.gelu(n @ up.mT) if first is None else F.silu(n @ first.mT) * (n @ up.mT)) @ down.mT
    return x + 0.7 * gate * y


def kernels_diffusion(name: str, x: Tensor, modulation: Tensor, *weights: Tensor | None, half: bool = False) -> Tensor:
    if name == "attention":
        whole = [w for w in weights if w is not None]
        return sublayer.attention(x, whole, None, scale=0.3, residual=0.7, eps=1e-3, half=half, modulation=modulation)
    return sublayer.feed_forward(x, weights, residual=0.7, eps=1e-3, half=half, modulation=modulation)


@pytest.mark.usefixtures("kernel", "threads")
@pytest.mark.parametrize("name", ["attention", "feed forward", "no gate"])
# a sequence, several in a piece of the feed-forward, one in several parts, one token
@pytest.mark.parametrize("shape", [(1, 40, 24), (9, 16, 32), (4, 7, 10), (3, 200, 16), (5, 1, 8)])
def test_the_kernels_modulated_sublayers_are_torchs(name: str, shape: tuple[int, int, int]) -> None:
    """Results and all gradients, the modulation's by sequence; each of its vectors is seen, and whose it is."""
    leaves, D = diffusion_leaves(name, *shape), shape[-1]
    # one token attends to itself: the gradients of q and k, and of their gains, are zero
    zero = (4, 5, 7, 8) if name == "attention" and shape[1] == 1 else ()
    ours, exact = (functools.partial(f, name) for f in (kernels_diffusion, plain_diffusion))
    assert max(e for i, e in enumerate(both(ours, exact, leaves)) if i not in zero) < 4e-6

    def wrong(change: Callable[[Tensor], Tensor]) -> float:
        return both(lambda x, by, *weights: ours(x, change(by), *weights), exact, leaves)[0]

    for i in range(3):  # negative controls: the shift, the scale, the gate of 0; another sequence's
        assert wrong(lambda by, i=i: by * (torch.arange(3 * D) // D != i)) > 1e-3
    assert shape[0] == 1 or wrong(lambda by: by.roll(1, 0)) > 1e-3
    if name == "attention" and shape[1] > 1:  # and every token sees the last
        x, *rest = leaves
        later = x + (torch.arange(shape[1]) == shape[1] - 1)[:, None]
        assert not close(ours(later, *rest)[:, 0], ours(x, *rest)[:, 0], operations=1000)


@pytest.mark.usefixtures("kernel")
@pytest.mark.filterwarnings(
    "ignore:Input #:UserWarning"
)  # that it is not in double precision, which the kernel has none of
@pytest.mark.parametrize("name", ["attention", "feed forward", "no gate"])
def test_the_modulated_gradients_are_those_of_the_kernels_own_result(name: str) -> None:
    leaves = [None if x is None else x.requires_grad_() for x in diffusion_leaves(name, 2, 3, 8)]
    check = functools.partial(torch.autograd.gradcheck, inputs=leaves, eps=1e-2, atol=5e-3, rtol=5e-3)
    assert check(functools.partial(kernels_diffusion, name))

    def off(*leaves: Tensor | None) -> Tensor:
        return Bent.apply(kernels_diffusion(name, *leaves))

    assert not check(off, raise_exception=False)  # negative control


class Bent(torch.autograd.Function):
    """The identity with a gradient that is 5 % too large."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, dx: Tensor) -> Tensor:
        return 1.05 * dx


@pytest.mark.usefixtures("kernel", "threads")
@pytest.mark.parametrize("engine", ["plain", "dot products"])
@pytest.mark.parametrize("name", ["attention", "feed forward", "no gate"])
def test_modulated_in_bf16_the_kernels_are_as_exact_as_torchs_operators(
    name: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = library.loaded()
    assert loaded is not None
    if engine not in library.offered(loaded):
        pytest.skip(f"this processor has no {engine}")
    monkeypatch.setattr(library, "engine", lambda: engine)
    leaves, exact = diffusion_leaves(name, 8, 24, 48), functools.partial(plain_diffusion, name)

    def torchs(*leaves: Tensor | None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return exact(*leaves)

    ours = both(functools.partial(kernels_diffusion, name, half=True), exact, leaves)
    assert max(ours) > 1e-4  # negative control: it rounds
    # a gain of six numbers is a draw: all tensors together
    assert sum(e**2 for e in ours) <= 1.2**2 * sum(e**2 for e in both(torchs, exact, leaves))


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
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("name", ["attention", "feed forward", "no gate"])
@pytest.mark.parametrize("variants", [1, 2, 3, 6, 7])
def test_the_kernels_variants_are_themselves(name: str, variants: int, modulated: bool) -> None:
    """Stacked, each has the result and the gradients that it has alone: whether threads share it or it has one to itself."""
    torch.manual_seed(11)
    B, T, D, E = 4, 17, 24, 8
    rows = [(D,), (D, D), (E, D), (E, D), (E,), (E,), (D, D)]
    if name != "attention":
        rows = [(D,), (40, D), (40, D), (D, 40)]
    if modulated:
        rows = [*rows, (B, 3 * D)]
    weights: list[Tensor] = [torch.randn(variants, *row, requires_grad=True) for row in rows]
    x = torch.randn(variants, B, T, D, requires_grad=True)
    rope = None if modulated else rotary_table(T, E)

    def run(x: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        weights, modulation = (leaves[:-1], leaves[-1]) if modulated else (leaves, None)
        if name == "attention":
            y = sublayer.attention(x, weights, rope, scale=0.3, residual=0.7, eps=1e-3, modulation=modulation)
        else:
            given = [weights[0], None if name == "no gate" else weights[1], *weights[2:]]
            y = sublayer.feed_forward(x, given, residual=0.7, eps=1e-3, modulation=modulation)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *leaves], allow_unused=True)]

    together = run(x, weights)
    for v in range(variants):
        for ours, alone in zip(together, run(x[v], [w[v] for w in weights]), strict=True):
            assert (ours is alone is None) or norm_off(ours[v], alone.double()) < 2e-6
    if variants > 1:  # negative control: another variant's is another
        assert norm_off(together[1][0], together[1][1].double()) > 0.1


@pytest.mark.usefixtures("kernel")
def test_a_modulation_that_is_not_each_sequences_is_refused() -> None:
    """The kernel would read past its end, and write its gradient there."""
    x, weights = torch.randn(3, 5, 16), [torch.ones(16), None, torch.randn(24, 16), torch.randn(16, 24)]
    for shape in ((1, 48), (48,), (3, 32), (3, 1, 48)):
        with pytest.raises(ValueError, match=r"give \(3, 48\)"):
            sublayer.feed_forward(x, weights, residual=1.0, eps=1e-6, modulation=torch.randn(shape))
    attention = [
        torch.ones(16),
        *(torch.randn(16, 16) for _ in "qkv"),
        torch.ones(8),
        torch.ones(8),
        torch.randn(16, 16),
    ]
    with pytest.raises(ValueError, match=r"give \(3, 48\)"):
        sublayer.attention(x, attention, None, scale=1.0, residual=1.0, eps=1e-6, modulation=torch.randn(1, 48))
    still = sublayer.feed_forward(x, weights, residual=1.0, eps=1e-6, modulation=torch.zeros(3, 48))
    assert torch.equal(still, x)  # a gate of 0
