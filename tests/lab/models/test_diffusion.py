"""The diffusion transformer: what it adds to the language model's parts, at init and in a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import mue
from mue.lab.models.diffusion import DiffusionModel, patches, place_table, time_features, unpatched
from mue.lab.tasks.diffusion import DiffusionTask
from mue.lab.train.run import Settings
from mue.layouts.of_model import placed
from mue.rules.roles import ROLES
from mue.shapes.published import dit_moe, ec_dit
from support.diffusion import BASE, IMAGE, MOE, batch_of, model_of, plan_of

EC = mue.MoE.parse(
    "8e2a",
    width=32,
    expert=16,
    layers=2,
    head_dim=16,
    image=IMAGE,
    router="expert-choice",
    router_settings={"within": "sequence"},
)
MIXED = mue.Mixed(32, (mue.Block(layers=1, ffn=32), *MOE.blocks), head_dim=16, image=IMAGE)


@pytest.mark.parametrize("shape", [BASE, MOE, EC, MIXED], ids=lambda s: s.name)
def test_parameters_are_those_that_the_shape_counts(shape: mue.Dense) -> None:
    params = placed(DiffusionModel(shape))
    assert sum(p.parameter.numel() for p in params) == shape.parameters
    assert {p.role for p in params} == {r for r, n in shape.counts().items() if n and ROLES[r].trained}
    for p in params:
        assert ROLES[p.role].inside == (p.layer is not None), p.name
        if ROLES[p.role].drawn and p.role != "class_embedding":
            assert ROLES[p.role].reads_residual == (p.fan_in == shape.width) or p.role in ("attention_o", "ffn_down"), (
                p.name
            )


def test_patches_and_back() -> None:
    image = mue.Image(size=12, channels=3, patch=4, classes=2)
    x = torch.arange(2 * 2 * 3 * 12 * 12.0).view(2, 2, 3, 12, 12)  # also with an axis of variants
    cut = patches(x, image)
    assert cut.shape == (2, 2, 9, 48) and torch.equal(unpatched(cut, image), x)
    assert torch.equal(cut[1, 0, 5].view(3, 4, 4), x[1, 0, :, 4:8, 8:12])  # the second row's last one


def test_places_and_times_tell_all_apart() -> None:
    table = place_table(replace(IMAGE, size=16), 32)
    assert table.shape == (64, 32) and torch.cdist(table, table).add(torch.eye(64)).min() > 0.05
    seen = time_features(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert seen.dtype == torch.float64 and torch.cdist(seen, seen).add(torch.eye(101)).min() > 0.5


@pytest.mark.parametrize("shape", [BASE, MOE], ids=lambda s: s.name)
def test_blocks_start_as_the_identity_and_their_branches_do_not(shape: mue.Dense) -> None:
    """adaLN-zero: exactly x comes out of a block; the branch before its gate is there, and without the zero it is heard."""
    plan = plan_of(shape)
    for awake in (0.0, 0.1):
        streams, branches = heard(model_of(plan, awake=awake))
        assert all(torch.equal(x, y) for x, y in streams) == (awake == 0)
        assert len(branches) == 4 and all(b.square().mean() > 1e-4 for b in branches)


def heard(model: DiffusionModel) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[torch.Tensor]]:
    """What goes into and comes out of each block, and its branches before their gates."""
    streams, branches = list[tuple[torch.Tensor, torch.Tensor]](), list[torch.Tensor]()
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, out: streams.append((given[0], out[0])))
        for part in (block.attention, block.ffn or block.moe):
            part.register_forward_hook(lambda _, __, out: branches.append(out[0] if isinstance(out, tuple) else out))
    model(*batch_of())
    return streams, branches


def test_every_patch_sees_every_other() -> None:
    model, (x, t, c, _) = model_of(plan_of(BASE), awake=0.3), batch_of(1)
    here = model(x, t, c).logits
    x[..., -1, -1] += 1
    assert (model(x, t, c).logits - here)[..., 0, 0].abs() > 1e-7  # a causal model's first token knows of no other


def test_time_and_class_are_heard() -> None:
    model, (x, t, c, _) = model_of(plan_of(BASE), awake=0.3), batch_of()
    here = model(x, t, c).logits
    assert (model(x, t * 0.9, c).logits - here).abs().max() > 1e-3
    assert (model(x, t, (c + 1) % 4).logits - here).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "alone"), [({"within": "sequence"}, True), ({"evaluation": "batch"}, False)], ids=["image", "batch"]
)
def test_a_sample_does_not_depend_on_its_batch(settings: dict[str, str], alone: bool) -> None:
    """Expert choice within an image, in training as in evaluation; over the batch it does (the control)."""
    model = model_of(plan_of(replace(EC, router_settings=settings)), awake=0.3).double()
    x, t, c, _ = batch_of(6, dtype=torch.float64)
    for training in (True, False):
        model.train(training)
        together, apart = model(x, t, c).logits[:1], model(x[:1], t[:1], c[:1]).logits
        assert torch.allclose(together, apart, rtol=0, atol=1e-12) == alone


def test_published_settings_by_name() -> None:
    moe, ec = (make(32, 2, IMAGE, head_dim=16) for make in (dit_moe, ec_dit))
    assert (moe.notation, moe.active_width) == ("8e2a2s", 2 * 128 + 64)
    for shape in (moe, ec):
        model = model_of(plan_of(shape), awake=0.3)
        out = model(*batch_of())
        assert ("load_balance" in out.losses) == (shape is moe)
        load = torch.bincount(out.routings[0].expert_P, minlength=8)
        assert (load == 24).all() == (shape is ec)  # 16 patches · 2/8 of each of 6 images


@pytest.mark.parametrize("shape", [BASE, MOE, EC], ids=lambda s: s.name)
def test_variants_in_a_stack_are_the_models_alone(shape: mue.Dense) -> None:
    """The model and its loss broadcast over a leading axis, which is what the task promises (stackable)."""
    from mue.lab.train.stacked_session import _stack_parameters

    plan, task = plan_of(shape), DiffusionTask()
    alone = [model_of(plan, seed, awake=0.3) for seed in (0, 1)]
    stack = task.build(plan, Settings(task="diffusion"))
    _stack_parameters(stack, 2, {name: None for name, _ in stack.named_parameters()})
    own = [dict(model.named_parameters()) for model in alone]
    with torch.no_grad():
        for name, p in stack.named_parameters():
            p.copy_(torch.stack([one[name] for one in own]))
    batches = [batch_of(seed=seed) for seed in (0, 1)]
    together = task.loss(stack, tuple(torch.stack(part) for part in zip(*batches, strict=True)))
    apart = [task.loss(model, batch) for model, batch in zip(alone, batches, strict=True)]
    assert torch.allclose(together.loss, torch.stack([out.loss for out in apart]), rtol=1e-5)
    assert torch.allclose(together.logits[1], apart[1].logits, atol=1e-5)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="draws no images"):
        DiffusionModel(replace(BASE, image=None))
    with pytest.raises(ValueError, match="divisible by 4"):
        DiffusionModel(mue.Dense(width=30, ffn=8, layers=1, head_dim=15, image=IMAGE))
    with pytest.raises(ValueError, match="reads token ids"):
        DiffusionModel(replace(MOE, router="hash", shared_experts=0))
    first, second = (replace(MOE.blocks[0], layers=1, shared_experts=0, router=name) for name in ("sigmoid", "hash"))
    with pytest.raises(ValueError, match="the hash router reads token ids"):
        DiffusionModel(mue.Mixed(32, (first, second), head_dim=16, image=IMAGE))
    with pytest.raises(ValueError, match=r"built for \(1, 8, 8\)"):
        model_of(plan_of())(torch.zeros(1, 1, 8, 6), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="whole number"):
        plan_of(replace(EC, active=1, experts=12))
    with pytest.raises(ValueError, match="not the planned"):
        plan_of(BASE).init_(DiffusionModel(replace(BASE, image=replace(IMAGE, classes=5))))


def test_gradients_reach_the_gates_first_and_then_all() -> None:
    """One step opens the gates; from then on every parameter has a gradient."""
    model = model_of(plan_of(BASE))
    silent = []
    for _ in range(2):
        model.zero_grad()
        model(*batch_of()).loss.backward()
        silent.append({n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()})
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * (p.grad if p.grad is not None else 0)
    assert {n.split(".")[-2] for n in silent[0]} >= {"q", "up", "time_in", "class_embedding"} and not silent[1]
    assert not any(n.endswith("modulation.weight") for n in silent[0])


def test_a_plan_knows_how_far_apart_patches_are() -> None:
    """E[Σw] of expert choice within an image at init, of 64 images and 4 seeds, within 6 % of the plan's; without it, 40 % off."""
    plan = plan_of(replace(EC, experts=8, width=64))
    planned, found = plan.target.blocks[0].moments, []
    for seed in range(4):
        model, draw = model_of(plan, seed), torch.Generator().manual_seed(seed)
        x, t = torch.randn(64, 1, 8, 8, generator=draw), torch.rand(64, generator=draw)
        for routing in model(x, t, torch.zeros(64, dtype=torch.long)).routings:
            found.append(float(routing.weight_P.detach().sum()) / routing.num_tokens / routing.route_scale)
    mean = sum(found) / len(found)
    assert planned is not None and abs(planned[0] / mean - 1) < 0.06
    settings = {k: v for k, v in plan.target.blocks[0].all_settings.items() if k != "token_std"}
    alike = plan.target.blocks[0].router_kind.moments(2, 8, {**settings, "token_std": None})  # type: ignore[misc]
    assert alike[0] / mean > 1.3
