"""Numbers in names: layers, stages, experts, and places that are none of them."""

from __future__ import annotations

from mue.layouts.observe.flow.patterns import Names

ATTENTION, FEED = frozenset({"attention"}), frozenset({"ffn"})


def test_a_block_with_both_branches_is_the_layer_and_other_numbers_stay() -> None:
    # layers.N.0 is attention and layers.N.1.M an element of a feed-forward's sequence
    names = [f"layers.{n}.{rest}" for n in range(2) for rest in ("0.qkv", "0.o", "1.0.w", "1.3.w", "1.2.gain")]
    branches = [
        frozenset(f"layers.{n}.{m}" for m in members)
        for n in range(2)
        for members in (("0.qkv", "0.o"), ("1.0.w", "1.3.w"))
    ]
    found = Names([*names, "head.1.w"], branches, [ATTENTION, FEED] * 2, frozenset())
    assert found.pattern("layers.1.0.qkv") == "layers.*.0.qkv"
    assert found.pattern("layers.0.1.3.w") == "layers.*.1.3.w"
    assert found.pattern("layers.0.1.2.gain") == "layers.*.1.2.gain"  # in no branch, but in the block
    assert found.pattern("head.1.w") == "head.1.w"
    assert found.layers("layers.1.0.qkv") == ()


def test_branches_that_are_counted_one_after_another_say_their_layer() -> None:
    branches = [frozenset({f"layers.{n}.w", f"layers.{n}.o"}) for n in range(4)]
    found = Names([f"layers.{n}.{w}" for n in range(4) for w in "wo"], branches, [ATTENTION, FEED] * 2, frozenset())
    assert [found.pattern(f"layers.{n}.w") for n in range(4)] == [f"layers.{n}.w" for n in range(4)]
    assert [found.layers(f"layers.{n}.w") for n in range(4)] == [(0,), (0,), (1,), (1,)]


def test_stages_and_experts_have_marks() -> None:
    at = [f"stages.{s}.blocks.{n}" for s in range(2) for n in range(2)]
    members = ("q", "o", *(f"experts.{e}.up" for e in range(3)), *(f"experts.{e}.down" for e in range(3)))
    branches = [frozenset(f"{p}.{m}" for m in part) for p in at for part in (members[:2], members[2:])]
    names = [f"{p}.{m}" for p in at for m in members]
    experts = frozenset(n for n in names if "experts" in n)
    found = Names(names, branches, [ATTENTION, FEED] * 4, experts)
    assert found.pattern("stages.1.blocks.0.q") == "stages.{stage}.blocks.{layer}.q"
    assert found.pattern("stages.0.blocks.1.experts.2.up") == "stages.{stage}.blocks.{layer}.experts.{expert}.up"


def test_layers_are_counted_where_blocks_are_lists_of_matrices() -> None:
    names = [f"{w}.{n}.weight" for n in range(2) for w in ("up", "down", "norm")]
    branches = [frozenset({f"up.{n}.weight", f"down.{n}.weight"}) for n in range(2)]
    found = Names(names, branches, [FEED] * 2, frozenset())
    assert [(found.pattern(n), found.layers(n)) for n in names[:2]] == [("up.0.weight", (0,)), ("down.0.weight", (0,))]
    assert found.layers("down.1.weight") == (1,) and found.layers("up.1.bias") == (1,)
    assert found.lost("norm.1.weight") and not found.lost("up.1.weight")  # in no branch: a person has to say
