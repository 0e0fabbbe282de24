"""A mue shape read off a stock model: widths and experts from its placed parameters, the rest from config and gates."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mue.layouts.layout import ParamInfo
from mue.layouts.observe.config import find_integer, integers, size_of, subconfigs, text_config
from mue.layouts.observe.describe import Description
from mue.layouts.observe.names import ACTIVE_EXPERTS, KV_HEADS, RENORMALISE
from mue.shapes import Block, Dense, Mixed, MoE, Transformer

MEASURED = 'gates = "measured" and gate_moments (mue inspect --measure-gates gives them)'


@dataclass(frozen=True)
class Routers:
    """How a stock model weighs its experts.

    Attributes:
        active: experts per token. score: ``"sigmoid"``, ``"softmax"`` or None where neither was seen alone.
        normalised: the weights sum to one number, None where they could not be watched. scale: that number.
        setting: the config's own switch that renormalises, with its value now; None where there is none.
        remedy: whether that switch, set to true, was seen to renormalise (some families read it, some only list it).
    """

    active: int
    score: str | None
    normalised: bool | None
    scale: float | None
    setting: tuple[str, bool] | None
    remedy: bool = False

    @property
    def advice(self) -> str:
        """What a user has to do, in a line."""
        if self.normalised:
            return "weights are normalised" + ("" if self.scale == 1 else f", times the model's own {self.scale:g}")
        if self.setting and self.remedy:
            return f"weights do not sum to one: set {self.setting[0]} = true, or plan with {MEASURED}"
        seen = "could not be watched" if self.normalised is None else "do not sum to one"
        idle = f" ({self.setting[0]} changes nothing in this family's code)" if self.setting else ""
        return f"weights {seen}{idle}: plan with {MEASURED}"


def routers(config: Any, description: Description, again: Callable[[Any], Description]) -> Routers | None:
    """The routers of a described config; None for a dense one. ``again`` describes a config with another setting."""
    active = find_integer(config, ACTIVE_EXPERTS)
    if active is None or not any(f.row and f.row.role == "expert_down" for f in description.patterns):
        return None
    normalised, scale = _observed(description)
    setting = _switch(config)
    found = Routers(active, description.score, normalised, scale, setting)
    if normalised is not False or setting is None or setting[1]:
        return found
    other = copy.deepcopy(config)
    for part in subconfigs(text_config(other)):
        if setting[0] in vars(part):
            setattr(part, setting[0], True)
    return replace(found, remedy=bool(_observed(again(other))[0]))


def _observed(description: Description) -> tuple[bool | None, float | None]:
    """Whether the weights summed to one number in every layer (None: not watched), and that number."""
    seen = list(description.gates.values())
    normalised = all(g.normalised for g in seen) if seen else None
    # four decimals: the sums are of float32, and a route scale is written with two or three
    totals = {round(g.total, 4) for g in seen}
    return normalised, totals.pop() if normalised and len(totals) == 1 else None


def _switch(config: Any) -> tuple[str, bool] | None:
    """The config's own switch that should renormalise, and its value."""
    for part in subconfigs(text_config(config)):
        for key, value in vars(part).items():
            if re.fullmatch(RENORMALISE, key) and isinstance(value, bool):
                return key, value
    return None


def shape_of(
    config: Any,
    placed: Sequence[ParamInfo],
    routing: Routers | None,
    gate_moments: tuple[float, float] | None = None,
    sequence: int = 1024,
) -> Transformer:
    """The shape that a plan needs.

    Args:
        placed: the full model's parameters (:func:`mue.layouts.place.place`; the meta device will do).
        routing: from :func:`routers`.
        gate_moments: (E[Σw], E[Σw²]) at init, for gates that do not sum to one.
        sequence: tokens of a training sequence (for FLOPs only).

    Raises:
        ValueError: gates that do not sum to one and no moments; a layer without feed-forward, or with two that are not
            one sum; head sizes that the output projection contradicts.
    """
    layers: dict[int, dict[str, list[ParamInfo]]] = {}
    for p in placed:
        if p.layer is not None:
            layers.setdefault(p.layer, {}).setdefault(p.role, []).append(p)
    blocks = _merged([_block(i, layers[i], routing, gate_moments) for i in sorted(layers)])
    width = size_of(config, "width") or 0
    roles = {p.role for p in placed}
    vocabulary = next(p.fan_in for p in placed if p.layout.role == "embedding")
    common: dict[str, Any] = {
        "width": width,
        **_heads(config, layers),
        "vocab": vocabulary,
        "sequence": sequence,
        "gated": bool(roles & {"ffn_gate", "expert_gate", "shared_gate"}),
        "tied": "head" not in roles,
    }
    if len(blocks) > 1:
        return Mixed(blocks=tuple(blocks), **common)
    block = blocks[0]
    if block.ffn is not None:
        return Dense(ffn=block.ffn, layers=block.layers, **common)
    own = {k: v for k, v in vars(block).items() if k not in ("ffn",)}
    return MoE(**own, **common)


def _block(
    layer: int, roles: Mapping[str, list[ParamInfo]], routing: Routers | None, moments: tuple[float, float] | None
) -> Block:
    """One layer's block from its tensors.

    What no tensor shows (active experts, the score) is taken from what was observed.
    """
    if "expert_down" not in roles:
        downs = [p.fan_in for p in roles.get("ffn_down", [])]
        if len(downs) != 1:
            what = "no feed-forward" if not downs else f"{len(downs)} feed-forwards in sequence"
            raise ValueError(f"layer {layer} has {what}: a plan's block has one; describe this model by hand")
        return Block(layers=1, ffn=downs[0])
    if "ffn_down" in roles:
        raise ValueError(
            f"layer {layer} has experts and a dense feed-forward beside or after them: give the dense one the role of"
            " shared experts (rows with role shared_up, shared_gate, shared_down) if the two are added up"
        )
    if routing is None:
        raise ValueError(
            "the config does not say how many experts a token uses (num_experts_per_tok, top_k, ...): name it so"
        )
    if not routing.normalised and moments is None:
        raise ValueError(f"this model's gates: {routing.advice}")
    experts = roles["expert_down"]
    # n_s of width h_s are one of n_s·h_s (conventions 12)
    shared = sum(p.fan_in * p.experts for p in roles.get("shared_down", []))
    return Block(
        layers=1,
        expert=experts[0].fan_in,
        experts=sum(p.experts for p in experts),
        active=routing.active,
        shared_experts=1 if shared else 0,
        shared=shared or None,
        router=routing.score or "softmax",
        normalize=bool(routing.normalised),
        gates="unit-sum" if moments is None else "measured",
        gate_moments=moments,
    )


def _merged(blocks: list[Block]) -> list[Block]:
    merged: list[Block] = []
    for block in blocks:
        if merged and replace(merged[-1], layers=1) == block:
            merged[-1] = replace(merged[-1], layers=merged[-1].layers + 1)
        else:
            merged.append(block)
    return merged


def _heads(config: Any, layers: Mapping[int, Mapping[str, list[ParamInfo]]]) -> dict[str, int]:
    """heads, kv_heads and the head size of the values, which is the output projection's fan-in over the heads."""
    heads = size_of(config, "heads")
    by_layer = set(getattr(text_config(config), "num_attention_heads_per_layer", None) or ())
    if by_layer - {heads}:
        raise ValueError(
            f"num_attention_heads_per_layer has {', '.join(map(str, sorted(by_layer)))} heads and num_attention_heads {heads}: a shape has one"
            " number of heads for all layers, and a head size that follows from it"
        )
    outs = {p.fan_in for roles in layers.values() for p in roles.get("attention_o", [])}
    if heads is None or len(outs) != 1:
        found = "none" if not outs else f"several fan-ins ({', '.join(map(str, sorted(outs)))})"
        raise ValueError(f"the attention output projections have {found}: a plan's model has one kind of attention")
    fan_in = outs.pop()
    if fan_in % heads:
        raise ValueError(f"the attention output has fan-in {fan_in}, which {heads} heads do not divide")
    kv = next((v for k, v in integers(text_config(config)).items() if re.fullmatch(KV_HEADS, k)), heads)
    # a number that does not divide the heads cannot be theirs
    return {"heads": heads, "kv_heads": kv if heads % kv == 0 else heads, "head_dim": fan_in // heads}
