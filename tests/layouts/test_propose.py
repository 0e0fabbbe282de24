"""A proposed layout: pasted, planned with and checked; what is marked; and a model that is left as it was."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mue
from mue.layouts.place import place
from mue.layouts.propose import built, propose
from mue.model.matrices import matrices_of, split
from mue.rules.roles import ROLES
from support.flow_models import FFN, HEADS, SIZE, VOCAB, Make, Nameless
from support.own_models.case import COMMON, IDS, TUNED, D
from support.own_models.chains import Chains
from support.own_models.lists import Lists

BASE = mue.Dense(16, 64, 1, head_dim=16, gated=False, **COMMON)
TARGET = mue.MoE.parse("4e2a", width=D, expert=D, layers=2, head_dim=8, gated=False, router="softmax", **COMMON)


def pasted(text: str) -> Any:
    """The proposed method, as Python runs it where it was pasted."""
    space: dict[str, Any] = {"mue": mue}
    exec("class Pasted:\n" + text, space)
    return space["Pasted"].layout


def test_pasted_rows_carry_a_plan_to_the_model() -> None:
    plan = mue.transfer(BASE, TARGET, TUNED)
    model = Lists(TARGET, plan.multipliers)
    text = propose(model, (IDS[:, :-1], IDS[:, 1:])).text()
    assert "LOOK" not in text
    # the class without the rows that it had
    kind = type("Mine", (Lists,), {"layout": pasted(text)})
    mine = kind(TARGET, plan.multipliers)
    plan.init_(mine)
    optimizer = torch.optim.AdamW(plan.param_groups(mine))
    mue.check(mine, plan, (IDS[:, :-1], IDS[:, 1:]), optimizer)
    own = {p.name: (p.role, p.layers, p.expert, p.fan_in) for p in mue.layouts.of_model.placed(model)}
    for p in mue.layouts.of_model.placed(mine):
        expert = p.expert if ROLES[p.role].kind == "expert" else own[p.name][2]
        assert (p.role, p.layers, expert, p.fan_in) == own[p.name]


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("groups", [2, HEADS])
def test_an_optimizer_cuts_fused_parts_as_the_model_does(in_turn: bool, groups: int) -> None:
    shape: dict[str, Any] = {"head_dim": SIZE, "kv_heads": groups, "vocab": VOCAB, "sequence": 32, "router": "softmax"}
    target = mue.MoE.parse("6e2a", width=D, expert=FFN, layers=2, **shape)
    plan = mue.transfer(mue.Dense(D, FFN, 2, head_dim=SIZE, kv_heads=groups, vocab=VOCAB, sequence=32), target, TUNED)
    model = Nameless(Make(groups=groups, experts="stack", in_turn=in_turn))
    proposal = propose(model)
    space: dict[str, Any] = {"mue": mue}
    rows = eval(
        "[" + "\n".join(row.line() for row in proposal.rows) + "\n]", space
    )  # as pasted: with what stands in the text
    assert rows == proposal.layout()
    fused = [p for p in place(model, rows) if len(p.layout.parts) > 1]
    assert len(fused) == 4 and proposal.unmarked == proposal.tensors
    for p in fused:
        weight = model.get_parameter(p.name)
        attention = ROLES[p.role].kind == "attention"
        cut = list(model.cut_qkv(weight.mT).values()) if attention else model.cut_pair(weight.mT)
        own = [part.mT.reshape(-1, part.shape[-1], D) for part in cut]
        assert all(map(torch.equal, split(weight, matrices_of(plan, p)), own))
        # the control: parts one after another are other matrices where the model takes them in turn
        plain = split(weight, matrices_of(plan, replace(p, layout=replace(p.layout, order="blocks"))))
        assert all(map(torch.equal, plain, own)) is not in_turn


class Grouped(nn.Module):
    """Attention whose fused projection lies in two groups of two heads each, as no order of a layout says."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.table, self.qkv, self.o = (
            nn.Embedding(64, 32),
            nn.Linear(32, 96, bias=False),
            nn.Linear(32, 32, bias=False),
        )
        self.head, self.groups = nn.Linear(32, 64, bias=False), groups

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        parts = self.qkv(x).unflatten(-1, (self.groups, -1)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (-1, 8)).flatten(2, 3).transpose(1, 2) for part in parts)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("groups", "order"), [(1, "blocks"), (2, "unknown"), (4, "heads")])
def test_an_order_that_is_none_of_the_known_is_marked(groups: int, order: str) -> None:
    row = next(row for row in propose(Grouped(groups)).rows if row.pattern == "qkv.weight")
    assert row.layout is not None and row.layout.order == order
    assert ("order" in row.look) is (order == "unknown")
    assert ("order=" in row.line()) is (order != "blocks")


def test_rows_of_chained_experts_hold_for_more_layers_and_experts() -> None:
    small = Chains(TARGET, mue.transfer(BASE, TARGET, TUNED).multipliers)
    found = propose(small, (IDS[:, :-1], IDS[:, 1:]))
    roles = {row.pattern: row.layout.role for row in found.rows if row.layout is not None and "experts" in row.pattern}
    assert roles == {
        "h.*.experts.*.0.weight": "expert_up",
        "h.*.experts.*.0.bias": "bias",
        "h.*.experts.*.2.weight": "expert_down",
        "h.*.experts.*.2.bias": "bias",
    }
    larger = mue.MoE.parse("6e2a", width=2 * D, expert=D, layers=3, head_dim=8, gated=False, router="softmax", **COMMON)
    plan = mue.transfer(BASE, larger, TUNED)
    plan.init_(type("Mine", (Chains,), {"layout": pasted(found.text())})(larger, plan.multipliers))


class Odd(nn.Module):
    """What no flow settles: a matrix beside the known ones, a vector of its own, a layer that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 16)
        self.extra, self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)
        self.warp, self.idle = nn.Parameter(torch.full((16,), 0.3)), nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(16, 64, bias=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        x = torch.tanh(self.extra(self.table(ids))) * self.warp
        x = x + self.down(F.relu(self.up(x)))
        return self.head(x)  # type: ignore[no-any-return]


def test_what_the_flow_does_not_settle_is_marked_with_a_reason() -> None:
    found = propose(Odd())
    rows = {row.pattern: row for row in found.rows}
    for name in ("extra.weight", "warp", "idle.weight", "up.weight", "down.weight"):
        assert rows[name].look, name
    assert rows["idle.weight"].layout is None and "not seen to use" in rows["idle.weight"].look
    assert not rows["table.weight"].look
    # a row without a role is no code, so that a table with a hole is refused and not guessed
    assert re.search(r'^ +# mue.Layout\("idle.weight", ROLE', found.text(), re.MULTILINE)
    assert found.to_dict()["decided"] == found.unmarked < found.tensors


class Hidden(nn.Module):
    """A branch that is computed outside of torch, as a kernel of one's own does; ``classes`` has one number for each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.classes = nn.Embedding(64, 16), nn.Embedding(5, 16)
        self.norm, self.up, self.down = nn.RMSNorm(16), nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)
        self.last, self.head = nn.RMSNorm(16), nn.Linear(16, 64, bias=False)

    def forward(self, ids: Tensor, kind: Tensor) -> Tensor:
        x = self.table(ids) + self.classes(kind)[:, None]
        up, down = (w.weight.numpy() for w in (self.up, self.down))
        x = x + torch.from_numpy((self.norm(x).numpy() @ up.T).clip(0) @ down.T)
        return self.head(self.last(x))  # type: ignore[no-any-return]


def test_what_a_kernel_hides_makes_the_rest_doubtful() -> None:
    batch = (torch.randint(64, (2, 8)), torch.randint(5, (2,)))
    rows = {row.pattern: row for row in propose(Hidden(), batch).rows}
    # the norm in the block is followed by no matrix that was seen, as a last norm would be
    assert rows["norm.weight"].look and rows["last.weight"].look and rows["head.weight"].look
    assert "not the tokens of sequences" in rows["classes.weight"].look


def test_the_model_is_as_it_was() -> None:
    model = Odd().train().to(torch.bfloat16)
    before = {n: (t, t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    propose(model)
    after = model.state_dict(keep_vars=True)
    assert all(
        after[n] is t and torch.equal(after[n], value) and after[n].dtype == value.dtype
        for n, (t, value) in before.items()
    )
    assert model.training and model.head.training


def test_a_model_that_does_not_run_on_tokens_says_what_to_return() -> None:
    plan = mue.transfer(BASE, TARGET, TUNED)
    with pytest.raises(ValueError, match=r"'batch': \.\.\."):
        propose(Lists(TARGET, plan.multipliers))


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = Odd()
    with pytest.raises(ValueError, match="meta device"):
        propose(model)


def test_what_builds_is_a_function_of_a_model() -> None:
    with pytest.raises(ValueError, match="return a model"):
        built("os:getcwd")
    with pytest.raises(ValueError, match="is no function"):
        built("collections:OrderedDict")
