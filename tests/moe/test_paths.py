"""The lab's paths through attention, products, norms and feed-forward against torch's own, in double precision and in bf16."""

from __future__ import annotations

import contextlib
import functools
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import mue
from mue.kernels import library, norm, sublayer
from mue.lab.models import ops as paths
from mue.lab.models.language import LanguageModel, RMSNorm, rotary_table, rotate
from mue.plan.values import Multipliers
from support.precision import close


def off(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "turned"), [((5, 7), False), ((2, 3, 4, 6), True), ((3, 40, 4, 32), True), ((1, 3), False)]
)
def test_the_kernels_norm_is_torchs(shape: tuple[int, ...], turned: bool, dtype: torch.dtype) -> None:
    """Output, gradients of input and gain, with and without RoPE; widths that fill no vector too."""
    torch.manual_seed(0)
    x, gain = torch.randn(shape).to(dtype), torch.randn(shape[-1])
    turn = rotary_table(shape[1], shape[-1]) if turned else None
    dy = torch.randn(shape)

    def run(function: Callable[[Tensor, Tensor], Tensor | None], kind: torch.dtype) -> list[Tensor]:
        leaves = [
            x.to(kind).requires_grad_(),
            gain.to(max(kind, torch.float32, key=lambda t: t.itemsize)).requires_grad_(),
        ]
        y = function(*leaves)
        assert y is not None
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    def exact(x: Tensor, gain: Tensor) -> Tensor:
        y = F.rms_norm(x, gain.shape, gain, 1e-3)
        return y if turn is None else rotate(y, turn.double())

    ours = run(functools.partial(norm.rms_norm, eps=1e-3, turn=turn), dtype)
    oracle = run(exact, torch.float64)
    bound = 1e-6 if dtype == torch.float32 else 5e-3
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    assert all(off(o, e) < bound for o, e in zip(ours, oracle, strict=True))
    other = run(functools.partial(norm.rms_norm, eps=1.0, turn=turn), dtype)
    assert off(other[0], oracle[0]) > 10 * bound  # negative control: eps is seen
    if turn is not None and shape[-1] > 6:
        wrong = run(functools.partial(norm.rms_norm, eps=1e-3, turn=turn.flip(0)), dtype)
        assert off(wrong[0], oracle[0]) > 0.1 and off(wrong[1], oracle[1]) > 0.1  # and so is which token a row is of


@pytest.mark.usefixtures("kernel")
def test_the_norm_gives_the_same_bits_every_time_and_steps_aside_when_watched() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 32, 4, 32, requires_grad=True)
    module = RMSNorm(32)
    found = []
    for _ in range(3):
        y = module(x)
        found.append(torch.cat([t.flatten() for t in (y, *torch.autograd.grad(y.sin().sum(), (x, module.weight)))]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])  # a resumed run's metrics rest on it
    assert y.grad_fn is not None and y.grad_fn.name() == "NativeRMSNormBackward"
    with FlopCounterMode(display=False):
        assert norm.rms_norm(x, module.weight, 1e-6) is None
    with torch.no_grad():
        assert norm.rms_norm(x, module.weight, 1e-6) is None
    assert norm.rms_norm(x.double(), module.weight, 1e-6) is None


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("instructions", [True, False])
def test_attention_in_bf16_is_as_near_as_torchs(
    kv_heads: int, instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In plain products and in float32 it is no further from float64 than the fused kernel; machine and length decide."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, heads, 20, 8, dtype=torch.float64) for heads in (4, kv_heads, kv_heads))
    exact = paths.attend(q, k, v, 0.3)
    half = [x.bfloat16() for x in (q, k, v)]
    calls = []
    plain = paths._plain
    monkeypatch.setattr(paths, "_plain", lambda *arguments: calls.append(1) or plain(*arguments))
    monkeypatch.setattr(paths, "bf16_instructions", lambda: instructions)
    with torch.autocast("cpu", torch.bfloat16):
        found = paths.attend(*half, 0.3)
    torchs = F.scaled_dot_product_attention(*half, is_causal=True, scale=0.3, enable_gqa=True)
    assert found.dtype == torch.bfloat16 and calls == [1] * instructions
    assert off(found, exact) < 1.5 * off(torchs, exact) < 0.03
    assert off(paths.attend(*half, 0.6), exact) > 0.02  # negative control: scale is seen
    monkeypatch.setattr(paths, "_PLAIN_LENGTH", 19)
    calls.clear()
    paths.attend(*half, 0.3)
    assert not calls


def test_a_product_in_emulated_bf16_is_the_product_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs and outputs are rounded as bf16 is, gradients too; one weight or a variant each."""
    torch.manual_seed(2)
    for lead in ((), (3,)):
        x = torch.randn(*lead, 5, 6, 64, requires_grad=True)
        weight = torch.randn(*lead, 32, 64, requires_grad=True)
        dy = torch.randn(*lead, 5, 6, 32).bfloat16()
        found = []
        for instructions in (False, True):
            monkeypatch.setattr(paths, "bf16_instructions", lambda instructions=instructions: instructions)
            with torch.autocast("cpu", torch.bfloat16):
                y = paths.project(x, weight)
            assert y.dtype == torch.bfloat16
            found.append([y, *torch.autograd.grad(y, (x, weight), dy)])
        for ours, torchs in zip(*found, strict=True):
            assert ours.dtype == torchs.dtype
            assert off(ours, torchs.double()) < 4e-3  # both round; a bit of bf16 is 4e-3
        assert (
            off(found[0][0], (x.flatten(-3, -2) @ weight.mT).view_as(y).double()) > 5e-4
        )  # negative control: it rounds
        assert paths.project(x, weight).dtype == torch.float32  # and only where bf16 is asked for


Leaves = list[Tensor | None]


def both(ours: Callable[..., Tensor], exact: Callable[..., Tensor], leaves: Leaves) -> list[float]:
    """How far the result and each gradient are from those in float64."""
    found = []
    for function, kind in ((ours, torch.float32), (exact, torch.float64)):
        given = [None if x is None else x.detach().to(kind).requires_grad_() for x in leaves]
        y = function(*given)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(kind)
        found.append([y.detach(), *torch.autograd.grad(y, [x for x in given if x is not None], dy)])
    return [off(o, e) for o, e in zip(*found, strict=True)]


def normed(x: Tensor, gain: Tensor) -> Tensor:
    return F.rms_norm(x, gain.shape, gain, 1e-3)


def attention_leaves(B: int, T: int, D: int, H: int, K: int, E: int) -> Leaves:
    torch.manual_seed(6)
    q, k, v = (torch.randn(heads * E, D) / D**0.5 for heads in (H, K, K))
    return [torch.randn(B, T, D), torch.rand(D) + 0.5, q, k, v, torch.rand(E) + 0.5, torch.rand(E) + 0.5, torch.randn(D, H * E) / D**0.5]  # fmt: skip


def plain_attention(x: Tensor, gain: Tensor, q: Tensor, k: Tensor, v: Tensor, q_gain: Tensor, k_gain: Tensor, o: Tensor) -> Tensor:  # fmt: skip
    n, E = normed(x, gain), q_gain.shape[0]
    turn = rotary_table(x.shape[1], E).to(x.dtype)
    heads = [(n @ m.mT).view(*x.shape[:2], -1, E) for m in (q, k, v)]
    heads[:2] = rotate(normed(heads[0], q_gain), turn), rotate(normed(heads[1], k_gain), turn)
    q_BHTE, k_BKTE, v_BKTE = (t.transpose(1, 2) for t in heads)
    y = F.scaled_dot_product_attention(q_BHTE, k_BKTE, v_BKTE, is_causal=True, scale=0.3, enable_gqa=True)
    return x + 0.7 * (y.transpose(1, 2).flatten(-2) @ o.mT)


def kernels_attention(
    x: Tensor, *weights: Tensor, scale: float = 0.3, back: bool = False, residual: float = 0.7, half: bool = False
) -> Tensor:
    turn = rotary_table(x.shape[1], weights[4].shape[0])
    turn = turn.flip(0).contiguous() if back else turn
    return sublayer.attention(x, weights, turn, scale=scale, residual=residual, eps=1e-3, half=half)


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
    turn = rotary_table(T, E)

    def run(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
        if name == "attention":
            y = sublayer.attention(x, weights, turn, scale=0.3, residual=0.7, eps=1e-3)
        else:
            given = [weights[0], None if name == "no gate" else weights[1], *weights[2:]]
            y = sublayer.feed_forward(x, given, residual=0.7, eps=1e-3)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *weights], allow_unused=True)]

    together = run(x, weights)
    for v in range(variants):
        for ours, alone in zip(together, run(x[v], [w[v] for w in weights]), strict=True):
            assert (ours is alone is None) or off(ours[v], alone.double()) < 2e-6
    if variants > 1:  # negative control: another variant's is another
        assert off(together[1][0], together[1][1].double()) > 0.1


def gradients(model: LanguageModel, tokens: Tensor, **context: bool) -> dict[str, Tensor]:
    """The loss, and by name the gradients; `plain`: by torch's operators, `half`: in bf16, `compiled`."""
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if context.get("compiled") else model
    with (
        FlopCounterMode(display=False) if context.get("plain") else contextlib.nullcontext(),
        torch.autocast("cpu", torch.bfloat16, enabled=context.get("half", False)),
    ):
        loss = call(tokens, tokens).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters)
    return {"loss": loss.detach(), **dict(zip(names, found, strict=True))}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "shape",
    [
        mue.Dense(32, 48, 2, head_dim=8, kv_heads=2, sequence=20),
        mue.Dense(32, 48, 1, head_dim=8, sequence=20, gated=False),
        mue.MoE.parse("4e2a", width=32, expert=24, layers=2, head_dim=8, sequence=20),
        mue.MoE.parse("4e2a1s", width=32, expert=24, layers=1, head_dim=8, sequence=20),
    ],
    ids=["dense", "no gate", "moe", "shared"],
)
def test_a_model_by_the_kernel_is_the_model(shape: mue.Dense | mue.MoE, monkeypatch: pytest.MonkeyPatch) -> None:
    """All multipliers off 1; watched it takes torch's operators; compiled it is one graph; in bf16 both round alike."""
    torch.manual_seed(8)
    layers = (1.3,) * shape.layers
    model = LanguageModel(shape, Multipliers(residual=0.6, output=layers, route=(2.0,) * shape.layers))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.dim() > 1 else parameter.mul_(torch.rand_like(parameter) + 0.5)
    tokens = torch.randint(shape.vocab, (3, 20))
    calls: list[str] = []
    for name in ("attention", "feed_forward"):
        kernel = getattr(sublayer, name)
        monkeypatch.setattr(sublayer, name, lambda *a, n=name, k=kernel, **b: calls.append(n) or k(*a, **b))
    plain = gradients(model, tokens, plain=True)
    assert not calls
    ours = gradients(model, tokens)
    dense = isinstance(shape, mue.Dense)
    assert calls == ["attention", "feed_forward"] * shape.layers if dense else ["attention"] * shape.layers
    assert max(off(ours[name], plain[name].double()) for name in plain) < 1e-5
    block, x = model.blocks[0], torch.randn(3, 20, 32, requires_grad=True)
    straight, again = (
        torch.autograd.grad(run()[0].square().sum(), x)[0]
        for run in (lambda: block(x), lambda: checkpoint(block, x, use_reentrant=False))
    )
    operations = 2 * (7 * 48 + 2 * 20)  # forwards and back: seven products, attention over the tokens
    assert close(again, straight, operations=operations)
    assert not close(1.01 * again, straight, operations=operations)  # negative control
    if dense:
        compiled = gradients(model, tokens, compiled=True)
        assert max(off(compiled[name], plain[name].double()) for name in plain) < 1e-5
        monkeypatch.setattr(paths, "bf16_instructions", lambda: False)
        rounded, torchs = (gradients(model, tokens, half=True, plain=p) for p in (False, True))
        errors = [
            statistics.mean(off(found[name], plain[name].double()) for name in plain) for found in (rounded, torchs)
        ]
        assert 1e-3 < errors[0] < 1.2 * errors[1]


@pytest.mark.usefixtures("kernel")
def test_when_a_block_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, in float32 or emulated bf16, where it fits the cache and has work for every thread; of variants as of one."""
    x, weights = torch.randn(2, 8, 16), [torch.randn(16), torch.randn(16, 16)]
    small, large = torch.randn(1, 8, 16), torch.randn(2, 1 << 14, 16)
    monkeypatch.setattr(paths, "thread_count", lambda: 2)
    for x_BTD, attention, feed_forward in (
        (x, True, True), (small, False, True), (large, False, True), (x.double(), False, False), (x[None], False, False),
    ):  # fmt: skip
        assert paths.attention_by_kernel(x_BTD, weights) == attention
        assert paths.feed_forward_by_kernel(x_BTD, [*weights, None]) == feed_forward
    stacked = [torch.stack([weight] * 3) for weight in weights]
    assert paths.attention_by_kernel(small.expand(3, *small.shape), stacked)  # of one sequence each
    assert paths.feed_forward_by_kernel(x.expand(3, *x.shape), stacked)
    assert not paths.attention_by_kernel(x.expand(2, *x.shape), stacked)
    with torch.no_grad():
        assert not paths.attention_by_kernel(x, weights)
    with FlopCounterMode(display=False):
        assert not paths.feed_forward_by_kernel(x, weights)
    sharded = TwoTensor(weights[1], weights[1])
    assert not paths.attention_by_kernel(x, [weights[0], sharded])
    wide = torch.empty(1 << 10, 1 << 9)
    assert not paths.attention_by_kernel(x, [wide]) and not paths.feed_forward_by_kernel(x, [wide])
    with torch.autocast("cpu", torch.bfloat16):
        for instructions in (True, False):
            monkeypatch.setattr(paths, "bf16_instructions", lambda instructions=instructions: instructions)
            assert paths.feed_forward_by_kernel(x, weights) != instructions
    monkeypatch.setattr(library, "built", lambda: False)
    assert not paths.attention_by_kernel(x, weights)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("touch", ["hook", "pre-hook", "backward hook", "patched", "replaced"])
def test_a_touched_module_is_called(touch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks, patches and replacements inside a block take effect: the block goes by its modules then."""
    torch.manual_seed(9)
    model = LanguageModel(mue.Dense(32, 48, 2, head_dim=8, sequence=20))
    tokens, heard, calls = torch.randint(256, (2, 20)), list[str](), list[int]()
    kernel = sublayer.attention
    monkeypatch.setattr(sublayer, "attention", lambda *a, **b: calls.append(1) or kernel(*a, **b))
    model(tokens, tokens).loss.backward()
    assert len(calls) == 2  # the control: untouched blocks are the kernel's
    q = model.blocks[0].attention.q
    if touch == "hook":
        q.register_forward_hook(lambda *_: heard.append(touch))
    elif touch == "pre-hook":
        q.register_forward_pre_hook(lambda *_: heard.append(touch))
    elif touch == "backward hook":
        q.register_full_backward_hook(lambda *_: heard.append(touch))
    else:
        inner, other = q.forward, type("Other", (type(q),), {})
        patched = lambda x: heard.append(touch) or inner(x)  # noqa: E731
        if touch == "patched":
            q.forward = patched
        else:
            q.__class__ = other
            other.forward = lambda self, x: heard.append(touch) or inner(x)
    calls.clear()
    model(tokens, tokens).loss.backward()
    assert heard == [touch] and len(calls) == 1


@pytest.mark.usefixtures("kernel")
def test_a_hook_on_a_moe_sees_its_own_output() -> None:
    """Not times the residual multiplier, which an unwatched block folds into it; the loss is the same."""
    shape = mue.MoE.parse("4e2a", width=32, expert=24, layers=1, head_dim=8, sequence=20)
    torch.manual_seed(10)
    model = LanguageModel(shape)
    block, tokens = model.blocks[0], torch.randint(256, (2, 20))
    block.residual = 0.5
    alone = model(tokens, tokens).loss
    heard = list[Tensor]()
    block.moe.register_forward_hook(
        lambda _, given, found: heard.extend((given[0], found[0])) if len(given) == 1 else None
    )
    assert torch.allclose(model(tokens, tokens).loss, alone, atol=1e-6)
    given, found = heard
    assert torch.allclose(block.moe(given)[0], found, atol=1e-6)
    assert not torch.allclose(block.moe(given, block.residual)[0], found, atol=1e-6)  # negative control


def test_the_lab_starts_without_the_compiler() -> None:
    """It takes as long to import as all of torch."""
    command = "import sys, mue.lab.runners.worker, mue.lab.models.language; print('torch' in sys.modules, 'torch._dynamo' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["True", "False"]
