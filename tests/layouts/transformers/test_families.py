"""Every causal-LM family of the installed transformers that has experts, at a tiny size: described fully or refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest

pytest.importorskip("transformers", reason="model families need the hf extra")

import torch

from mue.layouts.layout import Layout
from mue.layouts.observe.describe import Description
from mue.layouts.of_model import placed
from mue.layouts.place import place
from mue.layouts.transformers import stock
from mue.layouts.transformers.configs import build, causal_families, default_config, families_with_experts
from mue.layouts.transformers.describe import describe_config
from mue.layouts.transformers.family import FAMILIES as FAMILY_TABLE
from mue.layouts.transformers.family import Family, family_of
from mue.rules.roles import ROLES
from support.layout_models import UP, Config, Strange

torch.set_num_threads(1)
DENSE = ("llama", "qwen3", "gpt2", "gpt_neox", "mistral", "gemma3_text", "olmo2", "phi3")
# Families whose parameters cannot all be described, with what the refusal must say.
REFUSED = {
    "axk2": "a matrix inside a norm",  # gated norms with a low-rank MLP of their own
    "doge": "neither the vocabulary nor positions",  # a million experts as rows of an embedding
    "dots3_note": "could not be built and run",  # head sizes that differ by layer
    "dots3_note_text": "could not be built and run",
    "inkling2_text": "its name is no known gain",  # learned queries over depth
    "qwen4_exp": "hyper-connection",  # low-rank hyper-connections
    "qwen4_exp_text": "hyper-connection",
}
NAMED = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "granitemoeshared",
    "phimoe",
    "jamba",
    "dbrx",
    "minimax",
    "glm4_moe",
    "dots1",
    "ernie4_5_moe",
    "hunyuan_v1_moe",
    "llama4",
    "lfm2_moe",
    "flex_olmo",
]


@cache
def described(family: str) -> Description:
    return describe_config(default_config(family))


FAMILIES = families_with_experts()
# By default those that the README names, the dense ones and the refused ones; `make slow` walks all of them.
SAMPLE = {*NAMED, *DENSE, *REFUSED} - {"llama4"}
WALK = [f if f in SAMPLE else pytest.param(f, marks=pytest.mark.slow) for f in (*FAMILIES, *DENSE)]


@pytest.mark.parametrize("family", WALK)
def test_every_parameter_is_described_or_refused_by_name(family: str) -> None:
    if family in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[family]):
            described(family).layout()
        return
    roles: dict[str, int] = {}
    for row in described(family).layout():
        roles[row.role] = roles.get(row.role, 0) + 1
        assert row.planned in ROLES
    assert {"embedding", "final_norm"} <= set(roles)
    if family not in DENSE:
        assert {"router", "expert_down"} <= set(roles)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx", "olmoe", "qwen2_moe", "jamba", "gpt2", "phi3"])
def test_the_table_read_off_the_tiny_model_fits_the_full_one(family: str) -> None:
    with torch.device("meta"):
        full = build(default_config(family))
    placed = place(full, described(family).layout())  # all of it, and each row is used
    assert {id(p.parameter) for p in placed} == {id(p) for p in full.parameters()}
    assert all(p.experts > 1 for p in placed if p.role == "expert_down")


def test_the_walk_is_over_everything_with_experts() -> None:
    assert set(NAMED) <= set(FAMILIES) <= set(causal_families())
    assert len([f for f in FAMILIES if f not in REFUSED]) >= 50
    assert set(REFUSED) <= set(FAMILIES)


def fan_ins(family: str, **numbers: int) -> dict[str, tuple[str, int, int]]:
    config = default_config(family)
    with torch.device("meta"):
        full = build(config)
    return {p.layout.pattern: (p.role, p.fan_in, p.experts) for p in place(full, described(family).layout())}


def test_fan_in_where_shape_alone_misleads() -> None:
    # GPT-OSS stores experts (expert, in, out) and has equal widths: the last axis is the wrong one, and no shape tells.
    oss = fan_ins("gpt_oss")
    assert oss["model.layers.*.mlp.experts.gate_up_proj"] == ("expert_gate", 2880, 128)
    assert described("gpt_oss").layout()[[f.pattern for f in described("gpt_oss").patterns].index(
        "model.layers.*.mlp.experts.gate_up_proj")].axes == ("expert", "in", "out")  # fmt: skip
    # DBRX lays experts one after another: (E·h, d) has fan-in h on the way down, not E·h.
    dbrx = fan_ins("dbrx")
    assert dbrx["transformer.blocks.*.ffn.experts.mlp.w2"] == ("expert_down", 3584, 8)
    assert dbrx["transformer.blocks.*.ffn.experts.mlp.w1"] == ("expert_gate", 2048, 8)
    # GPT-2's Conv1D is (in, out), and c_proj of attention is square.
    gpt2 = fan_ins("gpt2")
    assert gpt2["transformer.h.*.mlp.c_proj.weight"] == ("ffn_down", 3072, 1)
    assert gpt2["transformer.h.*.attn.c_attn.weight"] == ("attention_q", 768, 1)
    # Latent attention: each factor has its own fan-in.
    v3 = fan_ins("deepseek_v3")
    assert v3["model.layers.*.self_attn.q_b_proj.weight"] == ("attention_q", 1536, 1)
    assert v3["model.layers.*.self_attn.o_proj.weight"] == ("attention_o", 16384, 1)


def test_gains_that_add_one_start_at_zero() -> None:
    starts = {f.row.start for f in described("gemma3_text").patterns if f.row and f.row.role == "norm"}
    assert starts == {0.0}
    assert {f.row.start for f in described("llama").patterns if f.row and f.row.role == "norm"} == {1.0}


def test_gates_are_read_off_the_forward_pass() -> None:
    for family, normalised in {
        "mixtral": True,
        "olmoe": False,
        "qwen2_moe": False,
        "deepseek_v2": False,
        "gpt_oss": True,
    }.items():
        gates = described(family).gates
        assert gates and all(g.normalised is normalised and g.active == 2 for g in gates.values()), family
    (scale,) = {round(g.total, 5) for g in described("deepseek_v3").gates.values()}
    assert scale == 2.5  # its own routed_scaling_factor


def test_a_users_row_wins_and_one_that_matches_nothing_is_an_error() -> None:
    rows = [
        Layout("model.layers.*.*_layernorm.mlp.fc1.weight", "attention_v", ("out", "in")),
        Layout("model.layers.*.*_layernorm.mlp.fc2.weight", "attention_o", ("out", "in")),
    ]
    assert not describe_config(default_config("axk2"), rows).undecided
    with pytest.raises(ValueError, match=r"your row 'nothing' .* matches no parameter"):
        describe_config(default_config("llama"), [Layout("nothing", "bias", ("vector",))])


def test_an_unknown_family_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown model family 'mixtrall'; did you mean 'mixtral'"):
        default_config("mixtrall")


@dataclass
class PebbleConfig(Config):
    """What a class needs to be a family: a ``model_type``, and ``to_dict`` to build it again."""

    model_type: str = "pebble"

    def to_dict(self) -> dict[str, object]:
        return dict(vars(self))


class Pebble(Strange):
    """A user's class: its config says how to build it again, and one of its parameters cannot be decided."""

    def __init__(self, config: PebbleConfig) -> None:
        super().__init__(config)
        self.config = config


def test_a_family_from_outside_is_one_function() -> None:
    model = Pebble(PebbleConfig())
    with pytest.raises(ValueError, match=r"layers\.\*\.moe\.up_stack"):
        placed(model)
    stock._observed.cache_clear()

    @FAMILY_TABLE.register("pebble")
    def pebble() -> Family:
        return Family(rows=(UP, Layout("not.of.this.variant", "bias", ("vector",))))

    try:
        (up,) = {p.layout for p in placed(model) if "up_stack" in p.name}
        assert (up.role, up.axes) == (UP.role, UP.axes)
        assert placed(model)[0].role == "embedding"
        rows = [Layout(UP.pattern, "expert_gate", UP.axes)]  # the user's own win
        described = describe_config(model.config, rows, Pebble)
        assert {p.row.role for p in described.patterns if p.row and p.pattern == UP.pattern} == {"expert_gate"}
        assert "known of this family" in {p.how for p in describe_config(model.config, (), Pebble).patterns}
    finally:
        FAMILY_TABLE._entries.pop("pebble")
        stock._observed.cache_clear()
    assert family_of("pebble") == Family()


def test_a_family_that_leaves_its_experts_open_by_default_is_filled_in() -> None:
    """Negative control: without its file the default config has none."""
    assert default_config("doge").is_moe and not type(default_config("doge"))().is_moe


@pytest.mark.parametrize(
    ("family", "tensor", "order"),
    [
        ("gpt_oss", "gate_up_proj", "rows"),
        ("gpt_neox", "query_key_value.weight", "heads"),
        ("mixtral", "gate_up_proj", "blocks"),
        ("phi3", "qkv_proj.weight", "blocks"),
        ("dbrx", "Wqkv.weight", "blocks"),
    ],
)
def test_fused_projections_lie_as_their_code_cuts_them(family: str, tensor: str, order: str) -> None:
    (found,) = {row.order for row in described(family).layout() if row.parts and row.pattern.endswith(tensor)}
    assert found == order
