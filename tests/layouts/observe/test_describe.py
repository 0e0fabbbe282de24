"""An unknown model is described from what its forward pass does: dimensions from doubling, what nobody reads left undecided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mue.layouts.layout import Layout
from mue.layouts.observe.axis_sizes import axis_sizes
from mue.layouts.observe.decide import Facts, decide
from mue.layouts.observe.describe import Description, describe
from mue.layouts.observe.param_use import ParamUse
from mue.layouts.place import place
from support.layout_models import UP, Config, Strange


def strange(rows: list[Layout] | None = None, build: Callable[[Config], nn.Module] = Strange) -> Description:
    return describe(build, Config(), rows or [])


def test_an_unknown_family_is_described_but_for_what_only_a_person_can_say() -> None:
    described = strange()
    assert [f.pattern for f in described.undecided] == ["layers.*.moe.up_stack"]  # gate or up: shapes cannot tell
    with pytest.raises(ValueError, match=r"(?s)no role could be decided.*up_stack', ROLE, \('expert', 'in', 'out'\)\)"):
        described.layout()
    rows = {f.pattern: f.row for f in strange([UP]).patterns}
    kinds = {p: (r.role, r.axes) for p, r in rows.items() if r is not None}
    assert kinds["layers.*.moe.chooser"] == ("router", ("out", "in"))
    assert kinds["layers.*.moe.back"] == ("expert_down", ("expert", "in", "out"))
    assert kinds["layers.*.attention.output.weight"] == ("attention_o", ("out", "in"))
    assert kinds["last_norm.weight"] == ("final_norm", ("vector",))
    assert kinds["layers.*.norm.weight"] == ("norm", ("vector",))
    assert kinds["predict.weight"] == ("head", ("out", "in"))
    assert kinds["table.weight"] == ("embedding", ("in", "out"))


def test_the_table_that_was_read_holds_at_any_size() -> None:
    rows = strange([UP]).layout()
    with torch.device("meta"):
        big = Strange(Config(512, 1000, 2048, 32, 5, 8, 64))
    placed = {p.name: p for p in place(big, rows)}
    assert (placed["layers.4.moe.back"].fan_in, placed["layers.4.moe.back"].experts) == (2048, 32)
    assert placed["layers.0.moe.up_stack"].fan_in == 512


def test_a_users_row_that_matches_nothing_or_has_other_axes_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"your row 'layers\.\*\.moe\.upstack' .* matches no parameter"):
        strange([Layout("layers.*.moe.upstack", "expert_up", ("expert", "in", "out"))])
    with pytest.raises(ValueError, match=r"declares axes \('in', 'out'\), but layers\.0\.moe\.up_stack has 3"):
        strange([Layout("layers.*.moe.up_stack", "expert_up", ("in", "out"))])


def test_a_parameter_that_no_forward_pass_reaches_is_undecided() -> None:
    class Idle(Strange):
        def __init__(self, c: Config) -> None:
            super().__init__(c)
            self.spare = nn.Parameter(torch.randn(c.hidden_size, c.hidden_size))

    (spare, _) = sorted(strange(build=Idle).undecided, key=lambda f: f.pattern != "spare")
    assert "never used it" in spare.question()
    assert "Layout('spare', ROLE, ('out', 'in'))" in spare.question()


def test_a_plain_layer_the_forward_pass_skips_is_tried_alone() -> None:
    class Skipping(Strange):
        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
            x = self.table(input_ids)
            return self.predict(self.last_norm(self.layers[0](x)))  # type: ignore[no-any-return]

    assert [f.pattern for f in strange([UP], Skipping).undecided] == []


def test_a_dimension_that_cannot_be_doubled_is_reported() -> None:
    def build(c: Config) -> nn.Module:
        if c.num_experts > 6:
            raise RuntimeError("only six experts")
        return Strange(c)

    assert "only six experts" in axis_sizes(build, Config()).unbuilt["experts"]
    with pytest.raises(ValueError, match="no number for the residual width"):
        axis_sizes(build, SimpleNamespace(size=3))


def test_roles_of_what_was_never_seen_are_never_guessed() -> None:
    nothing = Facts("layers.*.mlp.up_proj.weight", (8, 4), ParamUse(), (frozenset(), frozenset()), (False, True), None)
    assert decide(nothing).role is None


def test_a_projection_is_not_up_for_its_bare_name() -> None:
    """GPT-like models call the *down* projection ``proj``; where hidden is as wide as the model nothing else tells."""
    square = (frozenset({"width"}), frozenset({"width"}))
    facts = Facts("h.*.mlp.proj.weight", (64, 64), ParamUse(summed={(1,)}, order=1), square, (True, True), None)
    assert decide(facts).role != "ffn_up"
    assert decide(replace(facts, pattern="h.*.mlp.up_proj.weight")).role == "ffn_up"  # the control
