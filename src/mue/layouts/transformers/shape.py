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
from mue.layouts.observe.names import ACTIVE_EXPERTS, KV_HEADS, RENORMALISE, SEQUENCE
from mue.shapes import Block, Dense, Image, Mixed, MoE, Transformer
from mue.shapes.transformer import DEFAULT_SEQUENCE

MEASURED = 'gates = "measured" and gate_moments (mue inspect --measure-gates gives them)'
# What may be said beside a model: what no tensor shows, or a config may lack.
SAID = (
    *("heads", "head_dim", "kv_heads", "sequence", "output_multiplier"),
    *("active", "groups", "router", "router_settings", "normalize", "gates", "gate_moments"),
)


class UnreadShapeError(ValueError):
    """A model does not say all that a shape needs.

    Attributes:
        fields: what to pass, by the name that :class:`mue.Dense` and :class:`mue.MoE` have for it.
    """

    def __init__(self, missing: Mapping[str, str]) -> None:
        self.fields = tuple(missing)
        super().__init__("; ".join(f"{why}: pass {field}=..." for field, why in missing.items()))


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
    config: Any | None,
    placed: Sequence[ParamInfo],
    routing: Routers | None,
    said: Mapping[str, Any],
) -> Transformer:
    """The shape that a plan needs.

    Args:
        config: None where a model that declares its parameters has none.
        placed: the full model's parameters (:func:`mue.layouts.place.place`; the meta device will do).
        routing: from :func:`routers`; None where no router was observed.
        said: what the user says beside the model, of :data:`SAID`.

    Raises:
        UnreadShapeError: what neither the model nor ``said`` has.
        ValueError: gates that do not sum to one and no moments; a layer without feed-forward, or with two that are not
            one sum; head sizes that the output projection contradicts; what is said otherwise than the config has it.
    """
    layers: dict[int, dict[str, list[ParamInfo]]] = {}
    for p in placed:
        if p.layer is not None:
            layers.setdefault(p.layer, {}).setdefault(p.role, []).append(p)
    missing: dict[str, str] = {}
    facts = _Facts(config, routing, said, missing)
    roles = {p.role for p in placed}
    # before the blocks: of a model that draws by captions the first thing to know is that it has no shape
    image = _of_image(config, placed) if "patch_embedding" in roles else None
    heads = facts.heads(layers)
    blocks = [_block(i, layers[i], facts) for i in sorted(layers)]
    if missing:
        raise UnreadShapeError(missing)
    common: dict[str, Any] = {
        **heads,
        **(_of_text(config, placed) if image is None else image),
        **{name: said[name] for name in ("sequence", "output_multiplier") if name in said},
        "gated": any(part.endswith("_gate") for p in placed for part in (p.role, *p.layout.parts)),
    }
    merged = _merged([Block(layers=1, **block) for block in blocks])
    if len(merged) > 1:
        return Mixed(blocks=tuple(merged), **common)
    block = merged[0]
    if block.ffn is not None:
        return Dense(ffn=block.ffn, layers=block.layers, **common)
    return MoE(**{k: v for k, v in vars(block).items() if k != "ffn"}, **common)


def _of_text(config: Any | None, placed: Sequence[ParamInfo]) -> dict[str, Any]:
    """Width, vocabulary and sequence of a language model, and whether its head is its embedding."""
    embedding = next(p for p in placed if p.layout.role == "embedding")
    width = (size_of(config, "width") if config is not None else None) or embedding.fan_out
    tied = "head" not in {p.role for p in placed}
    return {"width": width, **_sequence(config), "vocab": embedding.fan_in, "tied": tied}


def _of_image(config: Any, placed: Sequence[ParamInfo]) -> dict[str, Any]:
    """Width and image of a diffusion transformer, by the words that ``diffusers`` has for them.

    Raises:
        ValueError: a number that the config does not have, or a model that draws by something other than a class.
    """
    if not any(p.role == "class_embedding" for p in placed):
        raise ValueError("it has no table of classes, and a plan's images are of classes: it draws by something else")
    words = {"size": "sample_size", "channels": "in_channels", "patch": "patch_size", "classes": "num_embeds_ada_norm"}
    numbers: dict[str, Any] = {name: getattr(config, word, None) for name, word in words.items()}
    if missing := [words[name] for name, number in numbers.items() if not isinstance(number, int)]:
        raise ValueError(f"its config does not say the image: {', '.join(missing)}")
    patch = next(p for p in placed if p.role == "patch_embedding")
    return {"width": patch.fan_out, "image": Image(**numbers)}


def _sequence(config: Any | None) -> dict[str, int]:
    """The usual sequence, or the longest that a config allows where that is shorter."""
    longest = None if config is None else find_integer(text_config(config), SEQUENCE)
    return {} if longest is None or longest >= DEFAULT_SEQUENCE else {"sequence": longest}


@dataclass(frozen=True)
class _Facts:
    """What config, observation and the user say of a model; what none of them says goes into ``missing``."""

    config: Any
    routing: Routers | None
    said: Mapping[str, Any]
    missing: dict[str, str]

    def number(self, name: str, found: int | None, why: str) -> int | None:
        """A number of the config, or the user's where that has none; both only where they agree."""
        own = self.said.get(name)
        if own is not None and found is not None and own != found:
            raise ValueError(f"{name} is {found} in the model's config, and {own} was passed: leave it out")
        if own is None and found is None:
            self.missing[name] = why
        return found if own is None else own

    def heads(self, layers: Mapping[int, Mapping[str, list[ParamInfo]]]) -> dict[str, int]:
        """heads, kv_heads and the head size of the values, which is the output projection's fan-in over the heads."""
        heads = None if self.config is None else size_of(self.config, "heads")
        by_layer = set(getattr(text_config(self.config), "num_attention_heads_per_layer", None) or ())
        if by_layer - {heads}:
            raise ValueError(
                f"num_attention_heads_per_layer has {', '.join(map(str, sorted(by_layer)))} heads and num_attention_heads {heads}: a shape has one"
                " number of heads for all layers, and a head size that follows from it"
            )
        outs = {p.fan_in for roles in layers.values() for p in roles.get("attention_o", [])}
        if len(outs) != 1:
            found = "none" if not outs else f"several fan-ins ({', '.join(map(str, sorted(outs)))})"
            raise ValueError(f"the attention output projections have {found}: a plan's model has one kind of attention")
        fan_in = outs.pop()
        size = self.said.get("head_dim")
        if heads is None and "heads" not in self.said and size and fan_in % size == 0:
            heads = fan_in // size
        many = self.number("heads", heads, "nothing says how many attention heads there are")
        if many is None:
            return {}
        if fan_in % many or size not in (None, fan_in // many):
            of = "" if size is None else f" of {size}"
            raise ValueError(f"the attention output has fan-in {fan_in}, which {many} heads{of} do not divide")
        return {"heads": many, "kv_heads": self._kv_heads(many, fan_in // many, layers), "head_dim": fan_in // many}

    def _kv_heads(self, heads: int, size: int, layers: Mapping[int, Mapping[str, list[ParamInfo]]]) -> int:
        words = () if self.config is None else integers(text_config(self.config)).items()
        found = next((v for k, v in words if re.fullmatch(KV_HEADS, k)), None)
        if self.config is None:  # the keys' own matrix says it, or what a fused one has beyond the queries
            first = layers[min(layers)]
            for p in (*first.get("attention_k", ()), *first.get("attention_q", ())):
                kinds = p.layout.parts or (p.role,)
                shared = p.fan_out - (heads * size if "attention_q" in kinds else 0)
                if "attention_k" in kinds:
                    found = shared // size // len(set(kinds) - {"attention_q"})
        own = self.said.get("kv_heads", found)
        # a number that does not divide the heads cannot be theirs
        return own if own and heads % own == 0 else heads


def _block(layer: int, roles: Mapping[str, list[ParamInfo]], facts: _Facts) -> dict[str, Any]:
    """One layer's numbers from its tensors.

    What no tensor shows (active experts, the score) is taken from what was observed, or said.
    """
    if "expert_down" not in roles:
        downs = [p.fan_in for p in roles.get("ffn_down", [])]
        if len(downs) != 1:
            what = "no feed-forward" if not downs else f"{len(downs)} feed-forwards in sequence"
            raise ValueError(f"layer {layer} has {what}: a plan's block has one; describe this model by hand")
        return {"ffn": downs[0]}
    if "ffn_down" in roles:
        raise ValueError(
            f"layer {layer} has experts and a dense feed-forward beside or after them: give the dense one the role of"
            " shared experts (rows with role shared_up, shared_gate, shared_down) if the two are added up"
        )
    routing, said = facts.routing, facts.said
    if routing is None:
        in_config = None if facts.config is None else find_integer(facts.config, ACTIVE_EXPERTS)
        why = "the config does not say how many experts a token uses (num_experts_per_tok, top_k, ...)"
        active = facts.number("active", in_config, why)
        if "router" not in said:
            facts.missing["router"] = "nothing was seen of how tokens are routed (softmax, sigmoid, ...)"
    else:
        active = facts.number("active", routing.active, "")
        if not routing.normalised and "gate_moments" not in said:
            raise ValueError(f"this model's gates: {routing.advice}")
    experts = roles["expert_down"]
    # n_s of width h_s are one of n_s·h_s
    shared = sum(p.fan_in * p.experts for p in roles.get("shared_down", []))
    seen = {} if routing is None else {"router": routing.score or "softmax", "normalize": bool(routing.normalised)}
    measured = {"gates": "measured"} if said.get("gate_moments") is not None else {}
    own = ("groups", "router", "router_settings", "normalize", "gates", "gate_moments")
    return {
        "expert": experts[0].fan_in,
        "experts": sum(p.experts for p in experts),
        "active": active,
        "shared_experts": 1 if shared else 0,
        "shared": shared or None,
        **seen,
        **measured,
        **{name: said[name] for name in own if said.get(name) is not None},
    }


def _merged(blocks: list[Block]) -> list[Block]:
    merged: list[Block] = []
    for block in blocks:
        if merged and replace(merged[-1], layers=1) == block:
            merged[-1] = replace(merged[-1], layers=merged[-1].layers + 1)
        else:
            merged.append(block)
    return merged
