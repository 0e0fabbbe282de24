"""Roles: every parameter exactly one, whatever wraps the model; each way to get it wrong is refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mue
from mue.lab.models.language import LanguageModel
from mue.layouts.layout import Layout, ParamInfo, canonical, chain_steps, expert_slices, pattern_of, unwrap
from mue.layouts.of_model import layout_of, placed
from mue.layouts.place import MisfitError, place

SHAPES = {
    "dense": mue.Dense(width=32, ffn=48, layers=2, head_dim=16, vocab=40),
    "tied": mue.Dense(width=32, ffn=48, layers=2, head_dim=16, vocab=40, tied=True),
    "plain": mue.Dense(width=32, ffn=48, layers=1, head_dim=16, vocab=40, gated=False),
    "moe": mue.MoE.parse("4e2a1s", width=32, expert=24, shared=40, layers=2, head_dim=16, vocab=40),
    "mixed": mue.Mixed(
        32, (mue.Block(layers=1, ffn=48), mue.Block(layers=2, experts=4, active=2, expert=24)), head_dim=16, vocab=40
    ),
}


class Tiny(nn.Module):
    """Two matrices, no layout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.out = nn.Linear(4, 8, bias=False)


TINY = [Layout("embed.weight", "embedding", ("in", "out")), Layout("out.weight", "head", ("out", "in"))]


@pytest.mark.parametrize("name", SHAPES)
def test_every_parameter_has_one_role_and_the_count_is_the_shapes(name: str) -> None:
    shape = SHAPES[name]
    model = LanguageModel(shape)
    params = placed(model)
    assert {p.name for p in params} == {n for n, _ in model.named_parameters()}
    assert sum(p.parameter.numel() for p in params) == shape.parameters
    # The shape counts experts one by one, and its shared experts as n_s; tensors hold them stacked.
    counted = {role: sum(p.experts for p in group) for role, group in by_role(params).items()}
    expected = {r: n for r, n in shape.counts().items() if r != "router_bias"}
    assert counted == expected


def by_role(placed: list[ParamInfo]) -> dict[str, list[ParamInfo]]:
    groups: dict[str, list[ParamInfo]] = {}
    for p in placed:
        groups.setdefault(p.role, []).append(p)
    return groups


def test_fan_in_comes_from_the_declared_axes() -> None:
    params = {p.name: p for p in placed(LanguageModel(SHAPES["moe"]))}
    down = params["blocks.1.moe.experts_down"]
    assert (down.fan_in, down.fan_out, down.experts, down.layer) == (24, 32, 4, 1)
    assert params["embedding.weight"].fan_in == 40
    assert params["head.weight"].fan_in == 32
    assert params["final_norm.weight"].layer is None
    assert params["blocks.0.moe.shared_down"].fan_in == 40


def test_expert_slices_follow_the_expert_axis() -> None:
    weight = nn.Parameter(torch.arange(24.0).view(2, 3, 4))
    model = nn.Module()
    model.w = weight
    (p,) = place(model, [Layout("w", "expert_up", ("out", "expert", "in"))])
    slices = dict(expert_slices(p))
    assert list(slices) == [0, 1, 2]
    assert torch.equal(slices[1], weight.detach()[:, 1])
    slices[1].zero_()
    assert weight.detach()[:, 1].abs().sum() == 0  # a view: init writes through it


@pytest.mark.parametrize(
    "raw",
    [
        "module.blocks.0.attention.q.weight",
        "_orig_mod.module.blocks.0.attention.q.weight",
        "module._orig_mod.blocks.0.attention.q.weight",
        "_orig_mod.blocks.0._fsdp_wrapped_module.attention.q.weight",
        "_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.attention.q.weight",
        "blocks.0._orig_mod.attention.q.weight",
    ],
)
def test_wrappers_leave_the_name(raw: str) -> None:
    assert canonical(raw) == "blocks.0.attention.q.weight"


@pytest.mark.parametrize("name", ["embed.weight", "model.module_list.0.weight", "submodule.weight", "a.module.weight"])
def test_names_that_only_look_wrapped_stay(name: str) -> None:
    # mup strips characters ("module.embed" → "bed"), a prefix rule must not.
    assert canonical(name) == name
    assert canonical("module." + name) == name


def test_deepcopy_and_compile_and_data_parallel_names_change_no_role() -> None:
    model = LanguageModel(SHAPES["mixed"])
    plain = [(p.name, p.role, p.fan_in, p.layer) for p in placed(model)]
    wrapper = nn.Module()
    wrapper.module = model
    for other in (copy.deepcopy(model), torch.compile(model), wrapper, torch.compile(copy.deepcopy(model))):
        assert [(p.name, p.role, p.fan_in, p.layer) for p in place(other, layout_of(model))] == plain
    compiled = torch.compile(model)
    assert isinstance(compiled, nn.Module)
    assert unwrap(compiled) is model
    assert placed(compiled)[0].parameter is next(model.parameters())


def test_a_tied_head_is_one_parameter_found_by_identity() -> None:
    model = LanguageModel(SHAPES["tied"])
    roles = by_role(placed(model))
    assert "head" not in roles and len(roles["embedding"]) == 1
    untied = LanguageModel(SHAPES["dense"])
    with torch.no_grad():
        untied.head.weight.copy_(untied.embedding.weight)  # equal numbers are not the same parameter
    assert len(by_role(placed(untied))["head"]) == 1


def test_an_unknown_parameter_is_named_with_shape_nearest_pattern_and_the_line() -> None:
    model = Tiny()
    model.outer = nn.Linear(4, 6, bias=False)
    with pytest.raises(ValueError) as error:
        place(model, TINY)
    text = str(error.value)
    assert "outer.weight (6, 4) has no role" in text
    assert "nearest known: 'out.weight'" in text
    assert "Layout('outer.weight', ROLE, ('out', 'in'))" in text


def test_blocks_and_experts_are_counted_and_steps_of_a_chain_are_not() -> None:
    def expert(h: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, h), nn.GELU(), nn.Sequential(nn.Dropout(), nn.Linear(h, 8)))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.experts = nn.LayerNorm(8), nn.ModuleList(expert(8) for _ in range(2))
            self.pair = nn.ModuleList([nn.Linear(8, 4), nn.Linear(4, 8)])
            self.each = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    model = nn.Module()
    model.h = nn.Sequential(Block(), Block(), nn.LayerNorm(8))
    steps = chain_steps(model)
    assert {pattern_of(n, steps) for n, p in model.named_parameters() if p.dim() == 2} == {
        "h.*.experts.*.0.weight",
        "h.*.experts.*.2.1.weight",
        "h.*.pair.0.weight",
        "h.*.pair.1.weight",
        "h.*.each.*.weight",
    }
    assert pattern_of("h.2.weight", steps) == "h.2.weight"
    assert pattern_of("module.h.1.experts.0.2.1.bias", steps) == "h.*.experts.*.2.1.bias"


def test_all_faults_are_listed_at_once() -> None:
    model = Tiny()
    model.a = nn.Linear(4, 4, bias=False)
    model.b = nn.Linear(4, 4, bias=False)
    with pytest.raises(ValueError) as error:
        place(model, [*TINY, Layout("c.weight", "ffn_up", ("out", "in"))])
    for part in ("a.weight", "b.weight", "'c.weight' (ffn_up) matches no parameter"):
        assert part in str(error.value)


def test_a_row_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'typo\.weight' \(head\) matches no parameter: remove it or correct"):
        place(Tiny(), [*TINY, Layout("typo.weight", "head", ("out", "in"))])


def test_two_rows_for_one_parameter_are_refused() -> None:
    with pytest.raises(ValueError, match=r"matched by 2 rows .*keep one"):
        place(Tiny(), [*TINY, Layout("*.weight", "head", ("out", "in"))])


def test_another_number_of_axes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"declares axes \('expert', 'out', 'in'\)"):
        place(Tiny(), [TINY[0], Layout("out.weight", "expert_up", ("expert", "out", "in"))])


def test_a_star_is_one_dotted_part_and_dots_are_dots() -> None:
    row = Layout("blocks.*.q", "attention_q", ("out", "in"))
    assert row.regex.fullmatch("blocks.11.q")
    assert not row.regex.fullmatch("blocks.1.2.q")
    assert not row.regex.fullmatch("blocksx1xq")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("w", "ffn_upp", ("out", "in")), "unknown role 'ffn_upp'; did you mean 'ffn_up'"),
        (("w", "ffn_up", ("out", "inn")), "unknown axis 'inn'; did you mean 'in'"),
        (("w", "norm", ("vector")), r"axes is the text 'vector'; write \('vector',\), with the comma"),
        (("w", "ffn_up", ("out", "expert")), "needs an 'in' axis"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused(row: tuple[str, str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(*row)


def test_a_model_without_layout_is_told_what_to_write() -> None:
    with pytest.raises(ValueError, match=r"Tiny declares no parameter layout: give it a method layout\(\)"):
        placed(Tiny())


def test_a_refusal_has_every_fault_and_says_alike_ones_once() -> None:
    faults = ["x.0.1.w is bad", "x.1.0.w is bad", "0.w is bad", "1.w is bad", "x.1.0.w is worse"]
    error = MisfitError("the model does not fit", faults)
    assert error.faults == tuple(faults)
    lines = str(error).splitlines()
    assert [line.strip() for line in lines[1:]] == [
        "x.0.1.w is bad (and 1 more like it)",
        "0.w is bad (and 1 more like it)",
        "x.1.0.w is worse",
    ]
