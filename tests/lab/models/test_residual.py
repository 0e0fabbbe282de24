"""mue.lab.models.residual: the model by the kernel is the model by torch's operators, watched, hooked, compiled and in bf16."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import mue
from mue.kernels import library, sublayer
from mue.lab.models import ops as paths
from mue.lab.models.diffusion import DiffusionModel
from mue.lab.models.language import LanguageModel
from mue.lab.models.layers import FeedForward, RMSNorm
from mue.lab.models.residual import add_feed_forward
from mue.plan.values import Multipliers
from support.diffusion import BASE as DIT
from support.diffusion import MOE as DIT_MOE
from support.diffusion import batch_of
from support.precision import close, norm_off


def gradients(model: nn.Module, *batch: Tensor, **context: bool) -> dict[str, Tensor]:
    """The loss, and by name the gradients; `plain`: by torch's operators, `half`: in bf16, `compiled`."""
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if context.get("compiled") else model
    with (
        FlopCounterMode(display=False) if context.get("plain") else contextlib.nullcontext(),
        torch.autocast("cpu", torch.bfloat16, enabled=context.get("half", False)),
    ):
        loss = call(*batch).loss
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
    plain = gradients(model, tokens, tokens, plain=True)
    assert not calls
    ours = gradients(model, tokens, tokens)
    dense = isinstance(shape, mue.Dense)
    assert calls == ["attention", "feed_forward"] * shape.layers if dense else ["attention"] * shape.layers
    assert max(norm_off(ours[name], plain[name].double()) for name in plain) < 1e-5
    block, x = model.blocks[0], torch.randn(3, 20, 32, requires_grad=True)
    straight, again = (
        torch.autograd.grad(run()[0].square().sum(), x)[0]
        for run in (lambda: block(x), lambda: checkpoint(block, x, use_reentrant=False))
    )
    operations = 2 * (7 * 48 + 2 * 20)  # forwards and back: seven products, attention over the tokens
    assert close(again, straight, operations=operations)
    assert not close(1.01 * again, straight, operations=operations)  # negative control
    if dense:
        compiled = gradients(model, tokens, tokens, compiled=True)
        assert max(norm_off(compiled[name], plain[name].double()) for name in plain) < 1e-5
        monkeypatch.setattr(paths, "bf16_instructions", lambda: False)
        rounded, torchs = (gradients(model, tokens, tokens, half=True, plain=p) for p in (False, True))
        errors = [
            statistics.mean(norm_off(found[name], plain[name].double()) for name in plain)
            for found in (rounded, torchs)
        ]
        assert 1e-3 < errors[0] < 1.2 * errors[1]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("shape", [DIT, DIT_MOE], ids=["dense", "moe"])
def test_a_diffusion_model_by_the_kernel_is_the_model(
    shape: mue.Dense | mue.MoE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modulated, over all patches: the same watched, compiled, in bf16 and where no kernel was built."""
    multipliers = Multipliers(residual=0.6, output=(1.3,) * shape.layers, route=(2.0,) * shape.layers)
    torch.manual_seed(8)
    model, batch = DiffusionModel(shape, multipliers), batch_of()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif "modulation" in name:
                parameter.normal_(std=0.1)
    calls: list[str] = []
    for name in ("attention", "feed_forward"):
        kernel = getattr(sublayer, name)
        monkeypatch.setattr(sublayer, name, lambda *a, n=name, k=kernel, **b: calls.append(n) or k(*a, **b))
    plain = gradients(model, *batch, plain=True)
    assert not calls
    ours = gradients(model, *batch)
    dense = isinstance(shape, mue.Dense)
    assert calls == (["attention", "feed_forward"] if dense else ["attention"]) * shape.layers
    assert max(norm_off(ours[name], plain[name].double()) for name in plain) < 1e-5
    model.multipliers = replace(multipliers, head=1.001)
    assert norm_off(gradients(model, *batch)["head.weight"], plain["head.weight"].double()) > 1e-4  # negative control
    model.multipliers = multipliers
    if dense:
        compiled = gradients(model, *batch, compiled=True)
        assert max(norm_off(compiled[name], plain[name].double()) for name in plain) < 1e-5
        monkeypatch.setattr(paths, "bf16_instructions", lambda: False)
        rounded, torchs = (gradients(model, *batch, half=True, plain=p) for p in (False, True))
        errors = [
            statistics.mean(norm_off(found[name], plain[name].double()) for name in plain)
            for found in (rounded, torchs)
        ]
        assert 1e-3 < errors[0] < 1.2 * errors[1]
    calls.clear()
    model.blocks[0].attention.causal = True  # somebody's change: no kernel masks without RoPE
    model(*batch)
    assert calls.count("attention") == shape.layers - 1
    calls.clear()
    monkeypatch.setattr(library, "built", lambda: False)
    model.blocks[0].attention.causal = False
    without = gradients(model, *batch)
    assert not calls and max(norm_off(without[name], plain[name].double()) for name in plain) < 1e-5


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


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("leading", [(1,), ()], ids=["one for all", "no axis of sequences"])
def test_a_condition_for_all_images_is_one_for_each(leading: tuple[int, ...]) -> None:
    """Torch's operators broadcast one time and class over the images; the kernel, which reads one for each, gets as many."""
    torch.manual_seed(9)
    model, (x, time, classes, velocity) = DiffusionModel(DIT), batch_of()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name:
                parameter.normal_(std=0.1)
    one = time[0].expand(leading), classes[0].expand(leading)
    same = x, time[:1].expand_as(time), classes[:1].expand_as(classes), velocity
    ours, theirs, each = (
        gradients(model, x, *one, velocity),
        gradients(model, x, *one, velocity, plain=True),
        gradients(model, *same),
    )
    for expected in (theirs, each):
        assert max(norm_off(ours[name], expected[name].double()) for name in ours) < 1e-5
    other = gradients(model, x, time, classes, velocity)  # negative control
    assert norm_off(other["loss"], ours["loss"].double()) > 1e-4


@pytest.mark.usefixtures("kernel")
def test_a_modulation_that_is_more_than_a_tensor_is_not_passed_over() -> None:
    """A wrapper has no memory of its own, which the kernel would read as no modulation at all."""
    norm, ffn = RMSNorm(16), FeedForward(16, 24, True, 1.0)
    x, modulation = torch.randn(2, 9, 16), torch.randn(2, 48)
    plain = add_feed_forward(x, norm, ffn, 0.5, modulation)
    wrapped: Tensor = add_feed_forward(x, norm, ffn, 0.5, TwoTensor(modulation, modulation))
    assert norm_off(wrapped.a.detach(), plain.detach().double()) < 1e-5  # type: ignore[attr-defined]
    assert norm_off(add_feed_forward(x, norm, ffn, 0.5).detach(), plain.detach().double()) > 1e-2  # negative control
