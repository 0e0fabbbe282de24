"""The observing mechanism itself, without transformers: axes from strides, dimensions from doubling, refusals by name."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mue.layouts.layout import Layout, place
from mue.layouts.observe.axis_sizes import axis_sizes
from mue.layouts.observe.decide import decide
from mue.layouts.observe.describe import Description, describe
from mue.layouts.observe.param_use import param_use
from mue.layouts.transformers.tiny import shrink
from support.layout_models import UP, Config, Strange

X = torch.randn(5, 6)
USES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "linear": ((4, 6), lambda w: F.linear(X, w), (1,)),
    "transposed": ((6, 4), lambda w: X @ w, (0,)),
    "from the left": ((4, 6), lambda w: w @ X.T, (1,)),
    "square": ((6, 6), lambda w: X @ w, (0,)),
    "square, transposed": ((6, 6), lambda w: X @ w.T, (1,)),
    "made contiguous": ((6, 4), lambda w: F.linear(X, w.T.contiguous()), (0,)),
    "cast": ((4, 6), lambda w: F.linear(X.double(), w.double()), (1,)),
    "stacked experts": ((3, 6, 4), lambda w: torch.bmm(X.expand(3, 5, 6), w), (1,)),
    "stacked experts, one picked": ((3, 4, 6), lambda w: F.linear(X, w[1]), (2,)),
    "experts picked by a tensor": ((3, 6, 4), lambda w: torch.bmm(X[:, None], w[torch.tensor([0, 2, 1, 1, 0])]), (1,)),
    "einsum": ((3, 4, 6), lambda w: torch.einsum("ti,eoi->eto", X, w), (2,)),
    "experts along one axis": ((12, 6), lambda w: F.linear(X, w.view(3, 4, 6)[2]), (1,)),
    "experts along one axis, down": ((18, 4), lambda w: X @ w.view(3, 6, 4)[2], (0,)),
    "heads split": ((8, 6), lambda w: torch.einsum("ti,hoi->tho", X, w.view(2, 4, 6)), (1,)),
    "halves of a fused weight": ((8, 6), lambda w: F.linear(X, w[:4]) * F.linear(X, w[4:]), (1,)),
    "1 + gain, then a product": ((4, 6), lambda w: F.linear(X, 1 + w), (1,)),
}


class One(nn.Module):
    """A single weight and what is done with it."""

    def __init__(self, shape: tuple[int, ...], use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.use = use


@pytest.mark.parametrize("name", USES)
def test_the_summed_axis_is_read_from_the_forward_pass(name: str) -> None:
    shape, use, summed = USES[name]
    model = One(shape, use)
    seen = param_use(model, lambda: use(model.w))["w"]
    assert seen.summed == {summed} and not seen.looked_up


@pytest.mark.parametrize("name", USES)
def test_what_was_read_is_what_the_numbers_say(name: str) -> None:
    # Independently: double one index of the axis in w and halve the input there; a summed axis cancels, no other does.
    shape, use, (axis,) = USES[name]
    if shape[axis] != 6 or name == "1 + gain, then a product":
        pytest.skip("the input's six coordinates are not this axis one to one")
    global X
    w, x = torch.randn(shape), X
    try:
        plain = use(w)
        scale = torch.rand(6) + 0.5
        X = x / scale
        cancelled = use(w * scale.view([6 if i == axis else 1 for i in range(w.dim())]))
    finally:
        X = x
    torch.testing.assert_close(cancelled, plain, rtol=1e-4, atol=1e-4)


def test_gains_biases_lookups_sinks_and_filters_are_not_matrices() -> None:
    model = nn.Module()
    model.gain, model.bias = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(4))
    model.sink, model.rate = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.randn(6))
    model.weight, model.table = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(9, 6))
    model.filter, model.unused = nn.Parameter(torch.randn(6, 1, 3)), nn.Parameter(torch.randn(2, 2))

    def run() -> None:
        x = F.embedding(torch.arange(5), model.table) * (1 + model.gain) * -model.rate.exp()
        y = F.linear(x, model.weight, model.bias)
        torch.cat([y, model.sink[:, None]], -1).softmax(-1)
        F.conv1d(x.T[None], model.filter, groups=6)

    seen = param_use(model, run)
    assert seen["table"].looked_up and seen["filter"].convolved and seen["weight"].summed == {(1,)}
    for name in ("gain", "bias", "sink", "rate"):
        assert seen[name].elementwise and not seen[name].summed, name
    assert not seen["unused"].seen


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


def test_shrinking_keeps_one_layer_of_each_kind() -> None:
    class Listed(Config):
        def __init__(self) -> None:
            super().__init__(hidden_size=4096, num_hidden_layers=6, num_attention_heads=32)
            self.layer_types = ["a", "a", "b", "a", "a", "b"]

    small = shrink(Listed(), 1)
    assert (small.hidden_size, small.num_hidden_layers, small.layer_types) == (64, 2, ["a", "b"])


def test_roles_of_what_was_never_seen_are_never_guessed() -> None:
    from mue.layouts.observe.decide import Facts
    from mue.layouts.observe.param_use import ParamUse

    nothing = Facts("layers.*.mlp.up_proj.weight", (8, 4), ParamUse(), (frozenset(), frozenset()), (False, True), None)
    assert decide(nothing).role is None
