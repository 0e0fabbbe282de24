"""Which row a parameter has: stages and marked stars, tables of positions, ties, what is left alone, what is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import mue
from mue.fold import fold
from mue.lab.models.language import LanguageModel
from mue.layouts.layout import Layout
from mue.layouts.of_model import placed, placement_of
from mue.layouts.place import place, placement

TUNED = mue.HParams(lr=4e-3, weight_decay=0.1, init_std=0.05)


def shape(width: int, layers: int = 6, **more: object) -> mue.Dense:
    return mue.Dense(width, width, layers, head_dim=16, **more)  # type: ignore[arg-type]


THIRDS = {"first_third": {"ffn_up": {"lr_times": 4.0}}, "last_third": {"ffn_up": {"lr_times": 0.25}}}


def thirds() -> mue.Plan:
    return mue.transfer(shape(32), shape(64), replace(TUNED, roles=THIRDS))


class Staged(LanguageModel):
    """Six blocks in three groups of two, each group counted from 0, by a pattern of the test's."""

    def __init__(self, plan: mue.Plan, pattern: str, sizes: Sequence[int] = (2, 2, 2)) -> None:
        super().__init__(plan.target, plan.multipliers)
        self.pattern, blocks = pattern, iter(self.blocks)
        self.blocks = nn.ModuleList(nn.ModuleList(next(blocks) for _ in range(size)) for size in sizes)

    def layout(self) -> Sequence[Layout]:
        return [replace(row, pattern=row.pattern.replace("blocks.*", self.pattern)) for row in super().layout()]


def rates(plan: mue.Plan, model: nn.Module, end: str = "ffn.up.weight") -> list[float]:
    lr = {id(p): g["lr"] for g in plan.param_groups(model) for p in g["params"]}
    return [lr[id(p)] for name, p in model.named_parameters() if name.endswith(end)]


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 1), (6,)])
def test_layers_are_counted_through_the_stages(sizes: Sequence[int]) -> None:
    plan = thirds()
    model = Staged(plan, "blocks.{stage}.{layer}", sizes)
    planned = [plan.role("ffn_up", i).values.lr for i in range(6)]
    assert len(set(planned)) == 3 and rates(plan, model) == planned
    plan.init_(model)
    mue.check(model, plan, None, torch.optim.AdamW(plan.param_groups(model)))


def test_stages_of_more_than_ten_blocks_are_in_the_order_of_their_numbers() -> None:
    deep = mue.transfer(shape(32, 24), shape(64, 24), TUNED)
    numbers = [p.layer for p in placed(Staged(deep, "blocks.{stage}.{layer}", (12, 12))) if p.role == "ffn_up"]
    assert numbers == list(range(24))


def test_stages_without_marks_are_refused_with_the_way_out() -> None:
    plan = thirds()
    with pytest.raises(ValueError, match=r"no tensor in layer 3, 4, 5: the first \* .*\{layer\}, and \{stage\}"):
        plan.init_(Staged(plan, "blocks.*.*"))


def test_a_marked_star_may_be_any_of_them() -> None:
    plan = thirds()

    class Grouped(Staged):
        """The second number counts through the whole model, whatever the group."""

        def __init__(self, plan: mue.Plan) -> None:
            super().__init__(plan, "blocks.*.{layer}")
            blocks = [block for stage in self.blocks for block in stage]  # type: ignore[union-attr]
            self.blocks = nn.ModuleList(
                nn.ModuleDict({str(i): blocks[i] for i in pair}) for pair in ((0, 1), (2, 3), (4, 5))
            )

    assert rates(plan, Grouped(plan)) == [plan.role("ffn_up", i).values.lr for i in range(6)]


def test_a_number_where_other_rows_have_the_layers_star_is_the_layer() -> None:
    plan = thirds()

    class Stated(LanguageModel):
        def layout(self) -> Sequence[Layout]:
            found = []
            for row in super().layout():
                stated = [replace(row, pattern=row.pattern.replace("*", str(i), 1)) for i in range(6)]
                found += stated if row.role == "ffn_up" else [row]
            return found

    assert rates(plan, Stated(plan.target, plan.multipliers)) == [plan.role("ffn_up", i).values.lr for i in range(6)]


def test_the_star_after_a_stated_layer_is_the_expert_and_other_numbers_are_none() -> None:
    experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
    blocks = nn.ModuleList(nn.ModuleDict({"norm": nn.RMSNorm(4)}) for _ in range(2))
    blocks[1].add_module("experts", experts)
    stem = nn.Sequential(nn.Identity(), nn.RMSNorm(4), nn.Sequential(nn.RMSNorm(4)))
    model = nn.ModuleDict({"stem": stem, "blocks": blocks})
    rows = [
        Layout("blocks.*.norm.weight", "norm", ("vector",)),
        Layout("blocks.1.experts.*.weight", "expert_up", ("out", "in")),
        Layout("stem.1.weight", "norm", ("vector",)),
        Layout("stem.2.0.weight", "norm", ("vector",)),
    ]
    found = {p.name: (p.layer, p.expert) for p in place(model, rows)}
    assert [found[f"blocks.1.experts.{n}.weight"] for n in range(3)] == [(1, 0), (1, 1), (1, 2)]
    assert [found[name][0] for name in ("stem.1.weight", "stem.2.0.weight", "blocks.0.norm.weight")] == [None, None, 0]


def test_a_row_of_a_buffer_is_one_too_many_and_a_row_of_nothing_a_slip() -> None:
    model = nn.ModuleDict({"norm": nn.RMSNorm(4)})
    model["norm"].register_buffer("load", torch.zeros(4))
    gain = Layout("norm.weight", "norm", ("vector",))
    assert [p.name for p in place(model, [gain])] == ["norm.weight"]
    for name, said in (("load", "norm.load is a buffer, .* needs no row"), ("lod", "correct the pattern")):
        with pytest.raises(ValueError, match=said):
            place(model, [gain, Layout(f"norm.{name}", "router_bias", ("vector",))])


def test_stages_and_other_layers_are_not_mixed() -> None:
    plan = thirds()

    class Half(Staged):
        def layout(self) -> Sequence[Layout]:
            rows = super().layout()
            return [
                replace(r, pattern=r.pattern.replace("{stage}.{layer}", "*.*")) if r.role == "norm" else r for r in rows
            ]

    with pytest.raises(ValueError, match=r"layers are counted through the stages of 'blocks\.' and otherwise, too"):
        plan.init_(Half(plan, "blocks.{stage}.{layer}"))


@pytest.mark.parametrize(
    ("pattern", "role", "message"),
    [
        ("blocks.{lyer}.w", "ffn_up", "unknown mark {lyer}; known: {layer}, {stage}, {expert}"),
        ("blocks.{stage}.*.w", "ffn_up", "{stage} needs a {layer}"),
        ("a.{layer}.{layer}.w", "ffn_up", "{layer} stands in it twice"),
        ("blocks.**", "ffn_up", "which only 'unplanned' rows may leave open"),
        ("w", "positions", "unknown role 'positions'; did you mean 'position'"),
    ],
)
def test_marks_that_make_no_sense_are_refused(pattern: str, role: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        Layout(pattern, role, ("out", "in"))
    assert message in str(error.value)


# ---- experts that are modules ---------------------------------------------------------------------------------------------


class Lone(nn.Module):
    """One block without a number, its experts in a list: no star of its patterns is a layer."""

    def __init__(self, experts: int = 4, pattern: str = "experts.{expert}") -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32, bias=False) for _ in range(4))
        self.router, self.pattern = nn.Linear(32, experts, bias=False), pattern
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(32, 24, bias=False), "down": nn.Linear(24, 32, bias=False)})
            for _ in range(experts)
        )

    def layout(self) -> list[Layout]:
        out_in = ("out", "in")
        return [
            Layout("embedding.weight", "embedding", ("in", "out")),
            Layout("head.weight", "head", out_in),
            *(Layout(f"{x}.weight", f"attention_{x}", out_in) for x in "qkvo"),
            Layout("router.weight", "router", out_in),
            *(Layout(f"{self.pattern}.{part}.weight", f"expert_{part}", out_in) for part in ("up", "down")),
        ]


def lone_plan(**more: int) -> mue.Plan:
    own = {"width": 32, "expert": 24, "layers": 1, "head_dim": 16, "vocab": 64, "gated": False} | more
    base = mue.Dense(16, 16, 1, head_dim=16, vocab=64, gated=False)
    return mue.transfer(base, mue.MoE.parse("4e2a", **own), TUNED)


def test_a_lone_layer_of_experts_is_planned() -> None:
    plan, model = lone_plan(), Lone()
    plan.init_(model)
    experts = [p for p in placed(model) if p.role == "expert_up"]
    assert [(p.layer, p.expert) for p in experts] == [(None, i) for i in range(4)]
    assert len({float(p.parameter.detach().flatten()[0]) for p in experts}) == 4
    planned = plan.roles["expert_up"].values
    assert float(experts[0].parameter.detach().std()) == pytest.approx(planned.init_std, rel=0.1)
    with pytest.raises(ValueError, match=r"experts\.1\.up\.weight is in layer 1.*mark it: \{expert\}"):
        plan.init_(Lone(pattern="experts.*"))


def test_sizes_and_number_of_a_lone_layer_are_the_plans() -> None:
    with pytest.raises(ValueError, match="8 tensors of role expert_up, planned 4 experts"):
        lone_plan().init_(Lone(8))
    with pytest.raises(ValueError, match=r"hidden width 24, planned 40"):
        lone_plan(expert=40).init_(Lone())


def test_a_list_of_experts_has_as_many_as_planned() -> None:
    class Listed(LanguageModel):
        """Each expert's matrices as parameters of their own."""

        def __init__(self, plan: mue.Plan, experts: int) -> None:
            super().__init__(plan.target, plan.multipliers)
            for block in self.blocks:
                for part in ("up", "gate", "down"):
                    tensor = getattr(block.moe, f"experts_{part}")
                    delattr(block.moe, f"experts_{part}")
                    setattr(
                        block.moe, part, nn.ParameterList(nn.Parameter(tensor[i % 4].detach()) for i in range(experts))
                    )

        def layout(self) -> Sequence[Layout]:
            return [
                replace(r, pattern=r.pattern.replace("experts_", "") + ".*", axes=r.axes[1:])
                if r.role.startswith("expert")
                else r
                for r in super().layout()
            ]

    target = mue.MoE.parse("4e2a", width=64, expert=24, layers=2, head_dim=16)
    plan = mue.transfer(shape(32), target, TUNED)
    plan.init_(Listed(plan, 4))
    with pytest.raises(ValueError, match="8 tensors of role expert_gate in layer 1, planned 4 experts"):
        plan.init_(Listed(plan, 8))


# ---- positions, ties, names -----------------------------------------------------------------------------------------------


class Positions(LanguageModel):
    """A learned table of positions, under a name and a role of the test's."""

    def __init__(self, plan: mue.Plan, name: str, role: str, token_table: bool = True) -> None:
        super().__init__(plan.target, plan.multipliers)
        setattr(self, name, nn.Embedding(1024, plan.target.width))
        self.row, self.token_table = Layout(f"{name}.weight", role, ("in", "out")), token_table

    def layout(self) -> Sequence[Layout]:
        return [*super().layout(), self.row]


@pytest.mark.parametrize("name", ["pos_emb", "where", "wpe"])
def test_a_table_of_positions_has_a_role_of_its_own_and_any_name(name: str) -> None:
    plan = mue.transfer(shape(32), shape(64), TUNED)
    model = Positions(plan, name, "position")
    plan.init_(model)
    table = getattr(model, name).weight
    assert float(table.detach().std()) == pytest.approx(plan.role("embedding").values.init_std, rel=0.02)
    assert rates(plan, model, f"{name}.weight") == [plan.role("embedding").values.lr]
    assert [p.role for p in placed(model) if p.parameter is table] == ["embedding"]
    with pytest.raises(ValueError, match="vocabulary 1024, planned 256; a table of positions has the role position"):
        plan.init_(Positions(plan, name, "embedding"))


def test_a_table_of_positions_is_not_the_one_of_tokens() -> None:
    plan = mue.transfer(shape(32), shape(64), TUNED)

    class NoTokens(Positions):
        def layout(self) -> Sequence[Layout]:
            return [replace(r, role="position") if r.pattern == "embedding.weight" else r for r in super().layout()]

    with pytest.raises(ValueError, match="1 tensors of role embedding, the model none"):
        plan.init_(NoTokens(plan, "pos", "position"))


class HeadFirst(nn.Module):
    """A tied model that registers its head before its embedding."""

    def __init__(self, plan: mue.Plan, embedding: str = "embedding", head: bool = True) -> None:
        super().__init__()
        inner = LanguageModel(plan.target, plan.multipliers)
        self.head = nn.Linear(plan.target.width, plan.target.vocab, bias=False)
        self.head.weight = inner.embedding.weight
        self.m, self.multipliers = inner, plan.multipliers
        rows = [replace(r, pattern=f"m.{r.pattern}") for r in inner.layout() if r.role != "head"]
        self.rows = [r for r in rows if r.role != "embedding" or embedding]
        self.rows += [Layout("head.weight", "head", ("out", "in"))] if head else []

    def layout(self) -> list[Layout]:
        return self.rows


def tied_plan() -> mue.Plan:
    return mue.transfer(shape(32, 2, tied=True), shape(64, 2, tied=True), TUNED)


@pytest.mark.parametrize("head", [True, False])
def test_a_tied_table_is_the_embedding_whichever_name_comes_first(head: bool) -> None:
    plan = fold(tied_plan())
    model = HeadFirst(plan, head=head)
    plan.init_(model)
    assert float(model.head.weight.detach().std()) == pytest.approx(plan.role("embedding").values.init_std, rel=0.02)
    (table,) = [p for p in placed(model) if p.role == "embedding"]
    assert table.name == "head.weight" and (table.fan_in, table.fan_out) == (256, 64)
    exported: dict[str, object] = {}
    exec(plan.export("torch", model), exported)
    exported["param_groups"](model)  # type: ignore[operator]  # under the name that the model has it by


def test_a_tied_head_alone_is_one_clear_line() -> None:
    with pytest.raises(ValueError) as error:
        tied_plan().init_(HeadFirst(tied_plan(), embedding=""))
    assert str(error.value).split("\n")[1:] == [
        "  head.weight is the head and, with tied embeddings, the embedding as well: give its row the role embedding"
    ]


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_a_part_called_module_may_be_declared(prefix: str) -> None:
    class Inside(nn.Module):
        def __init__(self, plan: mue.Plan) -> None:
            super().__init__()
            self.module, self.multipliers = LanguageModel(plan.target, plan.multipliers), plan.multipliers

        def layout(self) -> list[Layout]:
            return [replace(r, pattern=prefix + r.pattern) for r in self.module.layout()]

    plan = mue.transfer(shape(32), shape(64), TUNED)
    one, two = Inside(plan), LanguageModel(plan.target, plan.multipliers)
    plan.init_(one)
    plan.init_(two)
    assert torch.equal(one.module.head.weight, two.head.weight) and len(rates(plan, one)) == 6


def test_two_parameters_of_one_name_are_refused() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(2))
    model.module = nn.Module()
    model.module.w = nn.Parameter(torch.ones(2))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="w is the name of two parameters"):
        place(model, [Layout("w", "norm", ("vector",))])


# ---- left alone -----------------------------------------------------------------------------------------------------------


class WithAdapter(LanguageModel):
    """Beside what is planned: an adapter, a frozen teacher, a placeholder without elements."""

    def __init__(self, plan: mue.Plan, declared: bool = True) -> None:
        super().__init__(plan.target, plan.multipliers)
        self.adapter, self.declared = nn.Linear(64, 4), declared
        self.teacher = nn.ModuleList(nn.Linear(8, 8) for _ in range(7)).requires_grad_(False)
        self.placeholder = nn.Parameter(torch.empty(0))

    def layout(self) -> Sequence[Layout]:
        more = [Layout("adapter.*", "unplanned"), Layout("teacher.**", "unplanned"), Layout("placeholder", "unplanned")]
        return [*super().layout(), *(more if self.declared else [])]


def test_what_is_not_planned_is_left_alone() -> None:
    plan = mue.transfer(shape(32, 2), shape(64, 2), TUNED)
    model = WithAdapter(plan)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    plan.init_(model)
    alone = placement_of(model).unplanned
    assert len(alone) == 2 + 14 + 1 and all(torch.equal(p, before[n]) for n, p in alone.items())
    assert not torch.equal(model.head.weight, before["head.weight"])
    with pytest.warns(UserWarning, match=r"placeholder and 2 more are unplanned and in no group"):
        groups = plan.param_groups(model)
    assert not {id(p) for p in alone.values()} & {id(p) for g in groups for p in g["params"]}
    with pytest.raises(ValueError, match="'unplanned' to leave it alone"):
        plan.init_(WithAdapter(plan, declared=False))


@pytest.mark.filterwarnings("ignore:.*unplanned")
def test_the_check_lists_what_is_left_alone() -> None:
    plan = mue.transfer(shape(32, 2), shape(64, 2), TUNED)
    model = WithAdapter(plan)
    plan.init_(model)
    own = {"params": [*model.adapter.parameters(), model.placeholder], "lr": 1e-3}
    report = mue.check(model, plan, None, torch.optim.AdamW([*plan.param_groups(model), own]))
    (passed,) = [f for f in report.findings if f.check == "coverage"]
    assert "left alone: placeholder, adapter.weight" in passed.measured and "3 of 17 trained" in passed.measured


def test_a_layer_of_a_teacher_is_no_layer_of_the_model() -> None:
    model = nn.Module()
    model.teacher = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(9))
    model.w = nn.Parameter(torch.ones(2))
    found = placement(model, [Layout("teacher.*.weight", "unplanned"), Layout("w", "norm", ("vector",))])
    assert not found.layers and len(found.unplanned) == 9


# ---- weights that are made of others --------------------------------------------------------------------------------------

MADE: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "weight_norm": (parametrizations.weight_norm, r"parametrizations\.weight\.original[01]"),
    "spectral_norm": (parametrizations.spectral_norm, r"parametrizations\.weight\.original"),
    "old weight_norm": (weight_norm, r"weight_[gv]"),
    "old spectral_norm": (spectral_norm, r"weight_orig"),
    "pruning": (lambda m: prune.l1_unstructured(m, "weight", 0.5), r"weight_orig"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", MADE)
def test_a_weight_that_is_computed_from_others_is_refused(kind: str) -> None:
    make, names = MADE[kind]
    plan = mue.transfer(shape(32, 2, gated=False), shape(64, 2, gated=False), TUNED)
    model = LanguageModel(plan.target, plan.multipliers)
    for block in model.blocks:
        make(block.ffn.up)  # type: ignore[union-attr,arg-type]
    declared = [n.replace(".0.", ".*.", 1) for n, _ in model.named_parameters() if n.startswith("blocks.0.ffn.up.")]
    shapes = {n.replace(".0.", ".*.", 1): p.shape for n, p in model.named_parameters()}
    rows = [r for r in model.layout() if "ffn.up" not in r.pattern]
    rows += [
        Layout(n, "ffn_up", ("out", "in")) if shapes[n][-1] == 64 else Layout(n, "norm", ("vector",) * len(shapes[n]))
        for n in declared
    ]
    with pytest.raises(
        ValueError, match=rf"ffn\.up\.{names} is not the weight .* makes blocks\.\d\.ffn\.up\.weight of it"
    ):
        place(model, rows)
    alone = [*(r for r in rows if "ffn.up" not in r.pattern), Layout("blocks.*.ffn.up.**", "unplanned")]
    assert len(placement(model, alone).unplanned) == 2 * len(declared)


def test_a_name_that_only_sounds_computed_is_planned() -> None:
    model = nn.Module()
    model.weight_orig = nn.Parameter(torch.ones(2, 2))
    assert place(model, [Layout("weight_orig", "head", ("out", "in"))])[0].role == "head"


def test_a_computed_weight_without_a_row_is_named_as_what_it_is() -> None:
    """Also on a model that is observed, where no row has such a name: what to do is the same."""
    model = nn.Module()
    model.q = parametrizations.weight_norm(nn.Linear(4, 4, bias=False))
    with pytest.raises(ValueError, match=r"q\.parametrizations\.weight\.original0 is not the weight"):
        place(model, [])


def test_weights_that_layers_share_lie_in_all_of_them() -> None:
    """By their names, where each layer has them under its own, or as their row says."""
    shared = nn.Linear(4, 4, bias=False)
    blocks = nn.ModuleList(nn.ModuleDict({"norm": nn.RMSNorm(4), "up": shared}) for _ in range(3))
    norms, up = (
        Layout("blocks.*.norm.weight", "norm", ("vector",)),
        Layout("blocks.*.up.weight", "ffn_up", ("out", "in")),
    )
    found = {p.name: (p.layer, p.layers) for p in place(nn.ModuleDict({"blocks": blocks}), [norms, up])}
    assert found["blocks.0.up.weight"] == (0, (0, 1, 2)) and found["blocks.1.norm.weight"] == (1, (1,))
    alone = nn.ModuleList(nn.ModuleDict({"norm": nn.RMSNorm(4)}) for _ in range(3))
    model = nn.ModuleDict({"blocks": alone, "pool": shared})
    placed = placement(model, [norms, Layout("pool.weight", "ffn_up", ("out", "in"), layers=(1, 2, 3))])
    assert [(p.layer, p.layers) for p in placed.planned if p.name == "pool.weight"] == [(1, (1, 2, 3))]
    assert placed.layers == {0, 1, 2, 3}


def test_layers_of_a_row_are_layers() -> None:
    for layers, pattern, message in (
        ((1, 0), "pool.up", "rising order"),
        ((-1,), "pool.up", "rising order"),
        ((0, 1), "blocks.*.up", "its first star is the layer, and layers says it as well"),
    ):
        with pytest.raises(ValueError, match=message):
            Layout(pattern, "ffn_up", ("out", "in"), layers=layers)


def test_one_fault_of_many_layers_is_one_line_and_a_star_does_not_cross_dots() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(4, 4) for _ in range(12))})
    rows = [Layout("blocks.*.weight", "ffn_up", ("out", "in")), Layout("b*.bias", "bias", ("vector",))]
    with pytest.raises(ValueError, match="do not fit its layout") as no:
        place(model, rows)
    _, *lines = str(no.value).splitlines()
    assert "blocks.0.bias" in lines[0] and lines[0].endswith("(and 11 more like it)")
    assert "the row 'b*.bias' stops at a dot: one * is one part between dots" in lines[0]
    assert len(lines) == 2 and "matches no parameter" in lines[1]
