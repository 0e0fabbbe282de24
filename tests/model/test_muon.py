"""Muon's step against exact polar factors in float64: matrix by matrix, in tensors that hold several."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mue
from mue.checks.optimizers import algorithm
from mue.fold import coefficients, fold
from mue.lab.models.language import LanguageModel
from mue.layouts.layout import Layout, ParamInfo
from mue.model.apply import param_groups
from mue.model.matrices import Matrices, join, matrices_of, split
from mue.model.muon import Muon, newton_schulz
from mue.model.tensor_plan import TensorFold, tensor_plans_of
from mue.shapes.update_scales import UPDATE_SCALES
from support.stood_in_optimizers import polar

BASE = mue.Dense(width=32, ffn=32, layers=2, head_dim=8, kv_heads=2, vocab=64, sequence=16)
TARGET = mue.MoE.parse("8e2a2s", width=64, expert=24, layers=2, head_dim=8, kv_heads=2, vocab=64, sequence=16)
TUNED = mue.HParams(lr=0.02, adamw_lr=4e-3, weight_decay=0.1, init_std=0.1, optimizer="muon", momentum=0.9)


def group(p: Tensor, how: Matrices, scale: str = "spectral", lr: float = 0.1, **more: Any) -> dict[str, Any]:
    names = {"algorithm": "muon", "momentum": 0.9, "adjust_lr_fn": UPDATE_SCALES[scale].torch, "matrices": how}
    return {"params": [p], "lr": lr, "weight_decay": 0.5, **names, **more}


def stepped(p: Tensor, how: Matrices, gradients: list[Tensor], scale: str = "spectral") -> Tensor:
    """A tensor after steps along given gradients, with exact polar factors."""
    weight = p.clone().requires_grad_()
    optimizer = Muon([group(weight, how, scale)], orthogonalize=polar)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


# a tensor's shape, what is in it, and how a single matrix lies in it: (tensor, expert, first row, rows) → (out, in)
HELD: dict[str, tuple[tuple[int, ...], Matrices, Callable[[Tensor, int, slice], Tensor]]] = {
    "experts": ((3, 6, 4), (("expert", "out", "in"), 1, (6,)), lambda t, e, rows: t[e, rows]),
    "experts, fan-in first": ((3, 4, 6), (("expert", "in", "out"), 1, (6,)), lambda t, e, rows: t[e, :, rows].mT),
    "stacked along in": ((12, 6), (("expert*in", "out"), 3, (6,)), lambda t, e, rows: t[4 * e : 4 * e + 4, rows].mT),
    "stacked along out": ((18, 4), (("expert*out", "in"), 3, (6,)), lambda t, e, rows: t[6 * e : 6 * e + 6][rows]),
    "gate and up of experts": ((3, 4, 6), (("expert", "in", "out"), 1, (3, 3)), lambda t, e, rows: t[e, :, rows].mT),
    "q, k and v": ((10, 4), (("out", "in"), 1, (6, 2, 2)), lambda t, e, rows: t[rows]),
}


@pytest.mark.parametrize("scale", list(UPDATE_SCALES))
@pytest.mark.parametrize("name", list(HELD))
def test_a_fused_tensor_moves_part_by_part(name: str, scale: str) -> None:
    """As its matrices do as tensors of their own; the polar factor of the whole is the control."""
    shape, how, part = HELD[name]
    torch.manual_seed(3)
    start, *gradients = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    fused = stepped(start, how, gradients, scale)
    firsts = [sum(how[2][:i]) for i in range(len(how[2]))]
    for expert in range(3 if "expert" in " ".join(how[0]) else 1):
        for first, rows in zip(firsts, how[2], strict=True):
            one = lambda t, e=expert, s=slice(first, first + rows): part(t, e, s)  # noqa: E731
            alone = stepped(one(start).clone(), (("out", "in"), 1, (rows,)), [one(g) for g in gradients], scale)
            assert torch.allclose(one(fused), alone, rtol=1e-12, atol=1e-13)
    flat = [t.reshape(-1, shape[-1]) for t in (start, *gradients)]
    whole = stepped(flat[0], (("out", "in"), 1, (len(flat[0]),)), flat[1:], scale)
    assert (whole.reshape(shape) - fused).norm() > 0.05 * (fused - start).norm()


# the same where the parts come in turns: the rows of each part
IN_TURNS: dict[str, tuple[tuple[int, ...], Matrices, Callable[[Tensor, int], list[Tensor]]]] = {
    "gate and up row by row": (
        (3, 4, 6),
        (("expert", "in", "out"), 1, (3, 3), 3),
        lambda t, e: [t[e, :, 0::2].mT, t[e, :, 1::2].mT],
    ),
    "q, k and v head by head": (
        (16, 4),
        (("out", "in"), 1, (8, 4, 4), 2),
        lambda t, e: [t[[*a, *(n + 8 for n in a)]] for a in ([0, 1, 2, 3], [4, 5], [6, 7])],
    ),
}


@pytest.mark.parametrize("name", list(IN_TURNS))
def test_parts_in_turns_move_one_by_one(name: str) -> None:
    """As gpt_oss has gate and up, and gpt_neox q, k and v. Cut in blocks, as if one lay after the other, it is another step."""
    shape, how, parts_of = IN_TURNS[name]
    torch.manual_seed(5)
    start, *gradients = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    fused = stepped(start, how, gradients)
    for expert in range(3 if "expert" in how[0] else 1):
        here = zip(*(parts_of(t, expert) for t in (start, *gradients, fused)), strict=True)
        for (first, *steps, after), rows in zip(here, how[2], strict=True):
            alone = stepped(first.clone(), (("out", "in"), 1, (rows,)), steps)
            assert torch.allclose(after, alone, rtol=1e-12, atol=1e-13)
    blocks = stepped(start, how[:3], gradients)
    assert (blocks - fused).norm() > 0.05 * (fused - start).norm()
    assert torch.equal(join(split(start, how), how, start), start)


@pytest.mark.parametrize("name", list(HELD))
def test_split_and_join(name: str) -> None:
    shape, how, _ = HELD[name]
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    parts = split(tensor, how)
    assert sum(x.numel() for x in parts) == tensor.numel() and {x.size(2) for x in parts} == {4}
    assert torch.equal(join(parts, how, tensor), tensor)


def test_the_iteration_goes_to_the_polar_factor() -> None:
    """Singular values land in Keller's 0.7 … 1.2 for wide, tall and square matrices alone or in a batch, vectors stay."""
    torch.manual_seed(0)
    for shape in ((5, 16, 48), (5, 48, 16), (2, 32, 32)):
        x = torch.randn(shape, dtype=torch.float64)
        made = newton_schulz(x)
        values = torch.linalg.svdvals(made)
        assert float(values.min()) > 0.65 and float(values.max()) < 1.25
        assert torch.allclose(made[0], newton_schulz(x[:1])[0], atol=1e-12)
        aligned = (made * polar(x)).sum((-2, -1)) / made.norm(dim=(-2, -1)) / polar(x).norm(dim=(-2, -1))
        assert float(aligned.min()) > 0.97
    assert not newton_schulz(torch.zeros(1, 3, 4)).any()


def test_it_is_torchs_muon_where_that_can_be() -> None:
    """One matrix to a tensor, Keller's scale and Moonlight's: torch iterates in bfloat16, hence the tolerance."""
    for scale in ("keller", "match-rms"):
        torch.manual_seed(1)
        ours, theirs = (
            torch.nn.Parameter(torch.randn(24, 16, generator=torch.Generator().manual_seed(0))) for _ in "ab"
        )
        start = ours.detach().clone()
        mine = Muon([group(ours, (("out", "in"), 1, (24,)), scale)])
        other = torch.optim.Muon([theirs], 0.1, 0.5, 0.9, adjust_lr_fn=UPDATE_SCALES[scale].torch)
        for _ in range(3):
            ours.grad = torch.randn(24, 16)
            theirs.grad = ours.grad.clone()
            mine.step()
            other.step()
        assert (ours - theirs).norm() < 0.02 * (ours - start).norm()
        assert torch.equal(mine.state[ours]["momentum_buffer"], other.state[theirs]["momentum_buffer"])


def planned(**changes: Any) -> tuple[mue.Plan, LanguageModel]:
    plan = mue.transfer(BASE, TARGET, TUNED.replace(**changes))
    model = LanguageModel(TARGET, plan.multipliers)
    plan.init_(model)
    return plan, model


def trained(model: LanguageModel, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    losses = []
    for step in range(steps):
        tokens = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:]).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_who_moves_what() -> None:
    """Matrices of blocks by Muon, experts among them; embedding, head, routers and gains by AdamW, bit for bit torch's."""
    plan, model = planned()
    optimizer = Muon.of(plan, model)
    kinds = {role: algorithm(optimizer, g) for g in optimizer.param_groups for role in g["roles"]}
    assert {r for r, kind in kinds.items() if kind == "adamw"} == {
        "embedding", "router", "norm", "qk_norm", "final_norm", "head",
    }  # fmt: skip
    assert kinds["expert_down"] == kinds["shared_up"] == kinds["attention_o"] == "muon"
    trained(model, optimizer, 1)
    for g in (g for g in optimizer.param_groups if g["algorithm"] == "adamw"):
        copies = [torch.nn.Parameter(p.detach().clone()) for p in g["params"]]
        plain = torch.optim.AdamW([{**g, "params": copies}], fused=True)
        for p, copy in zip(g["params"], copies, strict=True):
            copy.grad, p.grad = torch.ones_like(p), torch.ones_like(p)
            plain.state[copy] = {key: value.clone() for key, value in optimizer.state[p].items()}
        plain.step()
        only = Muon([g])
        only.state.update(optimizer.state)
        only.step()
        assert all(torch.equal(p, copy) for p, copy in zip(g["params"], copies, strict=True))


def test_groups_of_another_optimizer_are_refused() -> None:
    plan = mue.transfer(BASE, TARGET, mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.02))
    with pytest.raises(ValueError, match='a group without algorithm = "muon" or "adamw"'):
        Muon(param_groups(plan, LanguageModel(TARGET, plan.multipliers)))


def test_a_group_that_comes_later_is_asked_for_its_algorithm() -> None:
    optimizer = Muon([group(torch.zeros(4, 3), (("out", "in"), 1, (4,)))])
    with pytest.raises(ValueError, match='a group without algorithm = "muon" or "adamw"'):
        optimizer.add_param_group({"params": [torch.zeros(2)], "lr": 0.1})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [torch.zeros(2)], "algorithm": "adamw"})


def test_a_copy_steps_with_the_same_iteration() -> None:
    optimizer = Muon([group(torch.randn(4, 3), (("out", "in"), 1, (4,)))], orthogonalize=torch.zeros_like)
    again = deepcopy(optimizer)
    (p,), before = again.param_groups[0]["params"], optimizer.param_groups[0]["params"][0]
    p.grad = torch.ones(4, 3)
    again.step()
    assert again.orthogonalize is torch.zeros_like and torch.allclose(p, before * (1 - 0.1 * 0.5))  # decay alone


def test_a_loaded_state_lies_where_the_parameter_does() -> None:
    """Adam's count of steps, too, which fused AdamW wants there; without ``fused`` torch leaves it (control)."""
    adamw = {"algorithm": "adamw", "lr": 0.1, "weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-8}
    p = torch.ones(3)
    p.grad = torch.ones(3)
    saved = Muon([{"params": [p], **adamw}])
    saved.step()
    for fused in (True, False):
        state, far = saved.state_dict(), torch.zeros(3, device="meta")
        state["param_groups"][0]["fused"] &= fused
        there = Muon([{"params": [far], **adamw}])
        there.load_state_dict(state)
        assert there.state[far]["exp_avg"].is_meta and there.state[far]["step"].is_meta == fused


def test_state_goes_through_its_dict() -> None:
    """Training goes on from a state dict as if nothing had been, and the dict is plain enough for weights_only."""
    import io

    plan, model = planned()
    optimizer = Muon.of(plan, model)
    trained(model, optimizer)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    straight = trained(model, optimizer)
    _, other = planned()
    again = Muon.of(plan, other)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    assert trained(other, again) == straight


def test_a_fold_by_powers_of_two_is_the_same_training_in_float32() -> None:
    """Updates of the folded model are c times those of the other, to the last bit; by another c only nearly."""
    for width, exact in ((64, True), (96, False)):
        base = mue.Dense(width=width // 2, ffn=width // 2, layers=1, head_dim=8, vocab=64)
        target = mue.MoE.parse("8e2a", width=width, expert=width // 2 if exact else 20, layers=2, head_dim=8, vocab=64)
        plan = mue.transfer(base, target, TUNED)
        folded = fold(plan)
        one, two = LanguageModel(target, plan.multipliers), LanguageModel(target, folded.multipliers)
        plan.init_(one)
        c = coefficients(folded, two)
        with torch.no_grad():
            for p, q in zip(one.parameters(), two.parameters(), strict=True):
                q.copy_(p * c[q])
        optimizers = Muon.of(plan, one), Muon.of(folded, two)
        noise = torch.Generator().manual_seed(1)
        for _ in range(3):
            for p, q in zip(one.parameters(), two.parameters(), strict=True):
                q.grad = torch.randn(q.shape, generator=noise)
                p.grad = q.grad * c[q]
            for optimizer in optimizers:
                optimizer.step()
        far = max(
            float(((p * c[q] - q).abs().max() / q.abs().max()).detach())
            for p, q in zip(one.parameters(), two.parameters(), strict=True)
        )
        assert far == 0 if exact else 0 < far < 1e-3


def test_shared_experts_in_one_tensor_move_the_branch_as_they_do_apart() -> None:
    """Two of width h, or one of 2h as stock models have them: its down projection's rate is twice as high (operator norms add)."""
    plan, _ = planned()
    down = Layout("blocks.*.shared.down", "shared_down", ("out", "in"))
    wide = ParamInfo("blocks.0.shared.down", torch.empty(64, 48), down, (0,))
    one = ParamInfo("blocks.0.shared.down", torch.empty(64, 24), down, (0,))
    values = [tensor_plans_of(plan, [TensorFold(p, 1.0)])[0].values for p in (one, wide)]
    assert values[0] == plan.roles["shared_down"].values
    assert values[1].lr == pytest.approx(2 * values[0].lr) and values[1].weight_decay == pytest.approx(  # type: ignore[operator]
        values[0].weight_decay / 2  # type: ignore[operator]
    )


@pytest.mark.parametrize("scale", list(UPDATE_SCALES))
def test_fused_shared_experts_have_the_rate_of_their_matrices(scale: str) -> None:
    """Gate and up of two shared experts in one tensor move as the two matrices do that lie in tensors of their own."""
    plan, _ = planned(update_scale=scale)
    parts = ("shared_gate", "shared_up")
    own = Layout("blocks.*.shared.gate", parts[0], ("out", "in"))
    fused = Layout("blocks.*.shared.gate_up", parts[0], ("out", "in"), parts)
    alone = ParamInfo("blocks.0.shared.gate", torch.empty(80, 64), own, (0,))
    both = ParamInfo("blocks.0.shared.gate_up", torch.empty(160, 64), fused, (0,))
    one, two = (tensor_plans_of(plan, [TensorFold(p, 1.0)])[0].values for p in (alone, both))
    assert matrices_of(plan, both)[2] == (80, 80) and one == two
    # the control: 80 x 64 is another shape than planned, and only the spectral convention has one rate for both
    assert (one == plan.roles["shared_gate"].values) == (scale == "spectral")


def test_parts_of_unknown_sizes_are_refused() -> None:
    plan, _ = planned()
    parts = ("attention_q", "attention_k", "attention_v")
    fused = Layout("blocks.*.qkv", parts[0], ("out", "in"), parts)
    assert matrices_of(plan, ParamInfo("blocks.0.qkv", torch.empty(96, 64), fused, (0,)))[2] == (64, 16, 16)
    with pytest.raises(ValueError, match=r"of \(64, 16, 16\) rows in one tensor of 99"):
        matrices_of(plan, ParamInfo("blocks.0.qkv", torch.empty(99, 64), fused, (0,)))
    # only shared experts may be several in one: of routed ones twice the planned rows are another model
    experts = Layout("blocks.*.gate_up", "expert_gate", ("expert", "out", "in"), ("expert_gate", "expert_up"))
    with pytest.raises(ValueError, match=r"of \(24, 24\) rows in one tensor of 96"):
        matrices_of(plan, ParamInfo("blocks.0.gate_up", torch.empty(8, 96, 64), experts, (0,)))


def test_parts_in_an_unknown_order_are_refused() -> None:
    plan, _ = planned()
    parts = ("attention_q", "attention_k", "attention_v")
    info = ParamInfo("blocks.0.qkv", torch.empty(96, 64), Layout("blocks.*.qkv", parts[0], ("out", "in"), parts), (0,))
    heads, unknown = (replace(info, layout=replace(info.layout, order=order)) for order in ("heads", "unknown"))
    assert matrices_of(plan, info) == (("out", "in"), 1, (64, 16, 16))
    assert matrices_of(plan, heads) == (("out", "in"), 1, (64, 16, 16), 2)  # two heads of keys
    with pytest.raises(ValueError, match=r"blocks\.0\.qkv holds .* in which order its rows lie was not found"):
        matrices_of(plan, unknown)
    with pytest.raises(ValueError, match="unknown order 'row'; did you mean 'rows'"):
        Layout("w", "ffn_up", ("out", "in"), order="row")
    rows = replace(info.layout, order="rows")
    with pytest.raises(ValueError, match=r"rows in 32 turns \(order = 'rows'\), which do not divide them"):
        matrices_of(plan, replace(info, layout=rows))


def test_values_of_parts_may_differ_by_rounding() -> None:
    """As those of q and k do in another convention: their factors are of other shapes, and come to the same number."""
    base = mue.Dense(width=32, ffn=32, layers=2, head_dim=8, kv_heads=2, vocab=64)
    target = mue.Dense(width=64, ffn=64, layers=2, head_dim=8, kv_heads=4, vocab=64)
    plan = mue.transfer(base, target, TUNED.replace(update_scale="match-rms"))
    q, k = (plan.roles[f"attention_{x}"].values.lr for x in "qk")
    assert q != k and q == pytest.approx(k, rel=1e-14)
    parts = ("attention_q", "attention_k", "attention_v")
    info = ParamInfo("blocks.0.qkv", torch.empty(128, 64), Layout("blocks.*.qkv", parts[0], ("out", "in"), parts), (0,))
    assert tensor_plans_of(plan, [TensorFold(info, 1.0)])[0].values.lr == q


def test_the_mean_of_a_step_in_noise_grows_as_the_root_of_the_batch() -> None:
    """What the √ rule for batches asks of an optimizer; of the gradient itself the mean knows no batch (control)."""
    noise = torch.Generator().manual_seed(0)
    signal = polar(torch.randn(16, 32, generator=noise, dtype=torch.float64)) * 0.01
    steps, plain = [], []
    for batch in (1, 4, 16):
        half = torch.randn(300, 16, 32, generator=noise, dtype=torch.float64) / batch**0.5
        drawn = torch.cat([half, -half])  # whose mean is 0, so that 600 draws are enough
        along = polar(signal + drawn)
        assert float(along.norm()) == pytest.approx((600 * 16) ** 0.5)  # its size knows none
        steps.append(float((along * signal).sum() / 600))
        plain.append(float(((signal + drawn) * signal).sum() / 600))
    slopes = [torch.tensor(steps[i + 1] / steps[i]).log2().item() / 2 for i in range(2)]
    assert all(abs(slope - 0.5) < 0.06 for slope in slopes), slopes
    assert plain[2] == pytest.approx(plain[0])


def test_a_check_of_the_wiring_knows_the_optimizer() -> None:
    """No alarm on the planned hybrid; AdamW on all of its groups, and a rate that is off, are named."""
    plan, model = planned(update_scale="match-rms")
    tokens = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(0))
    batch = tokens[:, :-1], tokens[:, 1:]
    report = mue.check(model, plan, batch, Muon.of(plan, model), raises=False)
    assert not report.failures, str(report)
    wrong = torch.optim.AdamW(Muon.of(plan, model).param_groups)
    found = mue.check(model, plan, optimizer=wrong, raises=False, only=["groups"])
    assert any("muon" in str(f.expected) for f in found.failures)
    doubled = Muon.of(plan, model)
    next(g for g in doubled.param_groups if "expert_down" in g["roles"])["lr"] *= 2
    found = mue.check(model, plan, optimizer=doubled, raises=False, only=["groups"])
    assert found.failures
