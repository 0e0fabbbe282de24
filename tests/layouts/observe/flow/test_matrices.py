"""Roles read off the flow of values, on transformers of many makes whose parameters have names that say nothing."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mue.layouts.place import place
from mue.layouts.propose import LayoutProposal, propose
from mue.rules.roles import ROLES
from support.flow_models import Make, Nameless

MAKES = st.builds(
    Make,
    norm=st.sampled_from(["layer", "rms", "manual", "shifted"]),
    place=st.sampled_from(["pre", "post", "sandwich"]),
    order=st.sampled_from(["", "qkv", "kqv", "qvk", "vkq"]),
    groups=st.sampled_from([1, 2, 4]),
    in_turn=st.booleans(),
    scores=st.sampled_from(["kernel", "einsum"]),
    rotary=st.booleans(),
    qk_norm=st.booleans(),
    bias=st.booleans(),
    gate=st.sampled_from(["", "gate first", "up first"]),
    act=st.sampled_from(["silu", "gelu", "relu2", "by hand"]),
    experts=st.sampled_from(["", "list", "stack", "stack, transposed"]),
    shared=st.booleans(),
    parallel=st.booleans(),
    tied=st.booleans(),
    positions=st.sampled_from(["", "lookup", "slice"]),
)


def wrong(model: Nameless, proposal: LayoutProposal) -> list[str]:
    """Tensors that were decided, and otherwise than they are."""
    found = []
    for row in proposal.rows:
        for name in row.names:
            roles, axes, start = model.truth[name]
            layout = row.layout
            said = layout and (layout.parts or (layout.role,), layout.axes)
            said = said if layout is None or layout.order == model.fused_order(roles) else f"in order {layout.order}"
            if layout is not None and start is not None:
                started = ROLES[layout.role].start if layout.start is None else layout.start
                said = said if started == start else f"starts at {started}"
            if not row.look and said != (roles, axes):
                found.append(f"{name} is {roles} {axes} {start}, and was decided to be {said}")
    return found


@settings(max_examples=12, deadline=None)
@given(MAKES)
@example(Make(gate="apart", experts="list", shared=True, bias=True, norm="layer"))
@example(Make(place="post", norm="shifted", order="vkq", rotary=True))
@example(Make(place="sandwich", qk_norm=True, groups=1, scores="einsum", order=""))
@example(Make(order="qkv", in_turn=True, groups=2, rotary=True, experts="list"))
@example(Make(experts="stack, transposed", gate="up first", shared=True, tied=True, positions="slice"))
def test_what_is_decided_is_right_whatever_the_names(make: Make) -> None:
    torch.manual_seed(0)
    model = Nameless(make)
    proposal = propose(model)
    assert not wrong(model, proposal)
    assert proposal.unmarked >= 0.8 * proposal.tensors  # a mark on everything would be right, too
    assert {p.name for p in place(model, proposal.layout())} == set(model.truth)


def test_the_oracle_would_see_a_slip() -> None:
    model = Nameless(Make())
    proposal = propose(model)
    name = next(n for n, (roles, _, _) in model.truth.items() if roles == ("attention_o",))
    model.truth[name] = (("ffn_down",), ("out", "in"), None)
    assert len(wrong(model, proposal)) == 1
