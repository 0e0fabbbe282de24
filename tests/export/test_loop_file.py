"""The written optimizer for a loop of one's own under Muon: torch's Muon on views of a tensor's matrices takes the plan's step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import _muon

import mue
from mue.export import export
from mue.fold import fold
from mue.lab.models.language import LanguageModel
from mue.layouts.inspect import inspect
from mue.layouts.layout import Layout
from mue.layouts.transformers.configs import build
from mue.model.muon import Muon
from support.stack_values import run
from support.stood_in_optimizers import polar

BASE = mue.Dense(width=32, ffn=32, layers=2, head_dim=8, kv_heads=2, vocab=64, sequence=16)
MOE = mue.MoE.parse("4e2a1s", width=48, expert=24, layers=2, head_dim=8, kv_heads=2, vocab=64, sequence=16)
TUNED = mue.HParams(lr=0.02, adamw_lr=4e-3, weight_decay=0.1, init_std=0.1, optimizer="muon", momentum=0.9)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's Muon with exact polar factors, so that two programs can be told apart at the last bits."""
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", lambda x, *_: polar(x))


def moved(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> dict[str, Tensor]:
    """Every parameter after steps along given gradients; some tensors have none in the second step, as experts of their own may."""
    for step in range(steps):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(model.parameters()):
            gradient = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.grad = None if step == 1 and i % 5 == 0 else gradient
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def lab(plan: mue.Plan) -> nn.Module:
    model = LanguageModel(MOE, fold(plan).multipliers).double()
    plan_ = fold(plan)
    plan_.init_(model)
    return model


def largest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("scale", ["spectral", "keller", "match-rms"])
def test_it_takes_the_plans_step(exact: None, scale: str) -> None:
    plan = mue.transfer(BASE, MOE, TUNED.replace(update_scale=scale))
    text = export(plan, "torch")
    ours = moved(model := lab(plan), Muon.of(fold(plan), model, orthogonalize=polar))
    theirs = moved(model := lab(plan), run(text)["MuonAndAdamW"](model))
    assert largest(ours, theirs) < 1e-12
    lr = next(iter(run(text)["MATRICES"].values()))[3][0][1]
    perturbed = run(text.replace(repr(lr), repr(1.001 * lr)))["MuonAndAdamW"]
    model = lab(plan)
    assert largest(ours, moved(model, perturbed(model))) > 1e-6


def test_a_stock_model_is_moved_expert_by_expert(exact: None) -> None:
    """Fused gate and up of all experts in one tensor: torch.optim.Muon alone refuses it."""
    pytest.importorskip("transformers", reason="needs the hf extra")
    from mue.export.hf_model import stock_config

    target = mue.MoE.parse("4e2a", width=48, expert=24, layers=2, head_dim=8, kv_heads=2, vocab=64, router="softmax")
    plan = mue.transfer(BASE, target, TUNED)
    config = stock_config(target)

    def made() -> nn.Module:
        model = build(config).double()
        fold(plan).init_(model)
        return model

    code = run(export(plan, "transformers", config))
    ours = moved(model := made(), Muon.of(fold(plan), model, orthogonalize=polar))
    arguments = code["trainer_arguments"](model := made(), lambda step: 1.0)
    optimizer, schedule = arguments["optimizers"]
    theirs = moved(model, optimizer)
    assert largest(ours, theirs) < 1e-12 and schedule.optimizer is optimizer
    assert any(p.dim() == 3 for p in model.parameters())
    with pytest.raises(ValueError, match="only supports 2D"):
        torch.optim.Muon([p for p in model.parameters() if p.dim() == 3])
    code["MATRICES"] = {
        i: (*how[:3], [(sum(n for n, *_ in how[3]), *how[3][0][1:])]) for i, how in code["MATRICES"].items()
    }
    whole = moved(model := made(), code["MuonAndAdamW"](model))
    assert largest(ours, whole) > 1e-3  # gate and up as one matrix


@pytest.mark.parametrize(
    ("family", "refused"), [("gpt_oss", ""), ("gpt_neox", "query_key_value.weight holds .* head by head")]
)
def test_parts_in_turns(exact: None, family: str, refused: str) -> None:
    """Rows in turn are a view with a step, heads in turn are none."""
    pytest.importorskip("transformers", reason="needs the hf extra")
    from support.stock_models import stock, tiny

    config = tiny(family)
    target = inspect(config).shape
    assert target is not None
    plan = mue.transfer(mue.Dense(32, 32, 1, head_dim=16, gated=target.gated, tied=target.tied), target, TUNED)

    def made() -> nn.Module:
        fold(plan).init_(model := stock(config))
        return model

    if refused:
        with pytest.raises(ValueError, match=refused):
            export(plan, "torch", config)
        return
    code = run(export(plan, "torch", config))
    ours = moved(model := made(), Muon.of(fold(plan), model, orthogonalize=polar))
    theirs = moved(model := made(), code["MuonAndAdamW"](model))
    code["MATRICES"] = {i: (*how[:2], 1, how[3]) for i, how in code["MATRICES"].items()}
    in_blocks = moved(model := made(), code["MuonAndAdamW"](model))
    assert largest(ours, theirs) < 1e-12 and largest(ours, in_blocks) > 1e-3


def test_schedules_and_checkpoints_reach_both(exact: None) -> None:
    plan = mue.transfer(BASE, MOE, TUNED)
    make = run(export(plan, "torch"))["MuonAndAdamW"]
    through = moved(model := lab(plan), make(model), 4)
    optimizer = make(model := lab(plan))
    moved(model, optimizer, 2)
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict()
    again = lab(plan)
    again.load_state_dict(weights)
    resumed = make(again)
    resumed.load_state_dict(state)
    for step in (2, 3):
        resumed.zero_grad()
        generator = torch.Generator().manual_seed(step)
        for p in again.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        resumed.step()
    assert largest(through, dict(again.named_parameters())) < 1e-12
    torch.optim.lr_scheduler.LambdaLR(resumed, lambda step: 0.5)
    assert all(g["lr"] == 0.5 * g["initial_lr"] for one in resumed.optimizers for g in one.param_groups)
    resumed.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in again.parameters() if p.grad is not None)
    assert any(p.grad is not None for p in again.parameters())


def test_a_tensor_that_moved_to_another_dtype_is_still_trained(exact: None) -> None:
    """Views of what a parameter was before would train nothing."""
    plan = mue.transfer(BASE, MOE, TUNED)
    model = lab(plan)
    optimizer = run(export(plan, "torch"))["MuonAndAdamW"](model)
    model.float()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = moved(model, optimizer, 1)
    assert all((after[name] - before[name]).any() for name in before)


def test_what_no_view_can_be_is_refused() -> None:
    plan = fold(mue.transfer(BASE, MOE, TUNED))

    class Heads(LanguageModel):
        """The output projection with an axis for its heads."""

        def __init__(self) -> None:
            super().__init__(MOE, plan.multipliers)
            for block in self.blocks:
                w = block.attention.o.weight
                block.attention.o.weight = nn.Parameter(w.detach().reshape(48, -1, 8))

        def layout(self) -> list[Layout]:
            rows = [r for r in super().layout() if r.role != "attention_o"]
            return [*rows, Layout("blocks.*.attention.o.weight", "attention_o", ("out", "in", "in"))]

    with pytest.raises(
        ValueError, match=r"blocks\.\*\.attention\.o\.weight has axes \(out, in, in\), of which no view is a matrix"
    ):
        export(plan, "torch", Heads())
    lion = mue.transfer(BASE, MOE, mue.HParams(lr=1e-4, weight_decay=0.1, init_std=0.02, optimizer="lion"))
    with pytest.raises(ValueError, match="exports speak AdamW and Muon, and this plan is for 'lion'"):
        export(lion, "torch")
