"""Is this the model that was planned? Every tensor's sizes and the model's own multipliers against the plan."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from torch import nn

from mue.layouts.layout import POSITION, HasLayout, ParamInfo, unwrap
from mue.layouts.of_model import placement_of
from mue.layouts.place import MisfitError, Placement
from mue.plan.plan import PlanData
from mue.plan.values import Multipliers
from mue.rules.roles import ROLES
from mue.shapes import Block, Image, Transformer
from mue.util.text import number


def match_model(plan: PlanData, model: nn.Module) -> list[ParamInfo]:
    """The model's parameters with their roles, in its order, after checking that it is the model that was planned.

    Fan-in and number of experts of every tensor must be the target's, every role the plan counts must be there, and
    the model's own forward multipliers, where it has any, must be the plan's.

    Args:
        model: one that declares its layout, or a stock model of ``transformers``; on any device, wrapped or not.

    Raises:
        ValueError: a parameter without a role; a model of other shapes or multipliers than planned, all faults at once.
    """
    found, declared = placement_of(model), isinstance(unwrap(model), HasLayout)
    faults = _shape_faults(plan, found, declared)
    if declared:
        faults += _multiplier_faults(plan, model)
    else:
        from mue.model.stock import stock_faults  # on use: what observes stock models takes a moment to import

        faults += stock_faults(plan, model)
    return _or_refused(plan, found.planned, faults)


def match_sizes(plan: PlanData, model: nn.Module) -> list[ParamInfo]:
    """:func:`match_model` without a look at multipliers: for weights whose form is known otherwise (a checkpoint's).

    Args:
        plan: whose target the model has to be. model: on any device, wrapped or not.

    Raises:
        ValueError: a parameter without a role; a model of other shapes than planned, all faults at once.
    """
    found = placement_of(model)
    return _or_refused(plan, found.planned, _shape_faults(plan, found, isinstance(unwrap(model), HasLayout)))


def _or_refused(plan: PlanData, params: list[ParamInfo], faults: list[str]) -> list[ParamInfo]:
    if faults:
        raise MisfitError(f"this model is not the planned {plan.target.name} (plan {plan.hash})", faults)
    return params


def _shape_faults(plan: PlanData, found: Placement, declared: bool) -> list[str]:
    """All ways in which the tensors are not the target's, one line each: roles, sizes, what is missing, tied or not.

    ``declared``: by the model's own table, in which a word may be wrong; what was observed of a stock model is not asked for that.
    """
    params, layers = found.planned, plan.target.per_layer
    # a table of positions is planned as an embedding, but is not the one of tokens
    here = {role for p in params for role in (p.layout.role, *p.layout.parts)}
    if plan.target.tied and "head" in here and "embedding" not in here:
        head = next(p.name for p in params if p.role == "head")
        return [f"{head} is the head and, with tied embeddings, the embedding as well: give its row the role embedding"]
    routers: dict[int | None, list[ParamInfo]] = {}
    for p in params:
        if p.role == "router":
            routers.setdefault(p.layer, []).append(p)
    # a model of one block needs no star for it
    only = layers[0] if not found.layers and len(layers) == 1 else None
    # a role that is missing first: what has it lies with another role among the misfits
    faults = _missing(plan, here)
    faults += [fault for p in params if (fault := _misfit(plan, layers, only, p, routers.get(p.layer, [])))]
    faults += (
        _absent_layers(plan, found.layers)
        + _latent_faults(plan, params)
        + _expert_faults(layers, only, params)
        + _sharing_faults(plan, params)
    )
    faults += _final_norm_faults(plan, params, declared)
    return faults


def _missing(plan: PlanData, here: set[str]) -> list[str]:
    """Roles of the plan that no tensor of the model has, and whether its head is its embedding."""
    tied = plan.target.tied
    faults = [
        f"the plan has {planned.count} tensors of role {role}, the model none"
        for role, planned in plan.roles.items()
        if planned.count and role not in here and ROLES[role].drawn
    ]
    # a tied head is placed once, under the embedding's name
    if tied != ("head" not in here):
        own = "head" in here
        faults.append(
            f"the plan's target has tied = {str(tied).lower()}, the model's head is {'a tensor of its own' if own else 'its embedding'}:"
            f" plan with tied = {str(not own).lower()} in the target, or {'share the matrix' if own else 'give the model a head of its own'}"
        )
    return faults


def _absent_layers(plan: PlanData, here: Collection[int]) -> list[str]:
    """Layers of the plan that the model has nothing in; one block without a number is layer 0."""
    absent = sorted(set(range(plan.target.layers)).difference(here))
    if not absent or (not here and plan.target.layers == 1):
        return []
    return [
        f"the plan has {plan.target.layers} layers, and the model no tensor in layer {', '.join(map(str, absent[:8]))}: the first *"
        " of a pattern is the layer, unless a marked one is ({layer}, and {stage} where blocks lie in groups)"
    ]


def _expert_faults(layers: Sequence[Block], only: Block | None, params: Iterable[ParamInfo]) -> list[str]:
    """Where experts are modules of their own, their number is that of their tensors."""
    counted: dict[tuple[int | None, str], set[int]] = {}
    for p in params:
        if ROLES[p.role].kind == "expert" and p.expert is not None:
            counted.setdefault((p.layer, p.role), set()).add(p.expert)
    faults = []
    for (layer, role), experts in counted.items():
        block = only if layer is None else layers[layer] if layer < len(layers) else None
        if block is not None and block.experts and len(experts) != block.experts:
            where = "" if layer is None else f" in layer {layer}"
            faults.append(
                f"the model has {len(experts)} tensors of role {role}{where}, planned {block.experts} experts"
            )
    return faults


def _sharing_faults(plan: PlanData, params: Iterable[ParamInfo]) -> list[str]:
    """Layers share their routed experts as planned, and whatever else they share has one planned value."""
    readers = {layer: layers for layers in plan.target.pool_layers for layer in layers}
    faults = []
    for p in params:
        here = [layer for layer in p.layers if layer < plan.target.layers]
        if ROLES[p.role].kind == "expert" and here:
            wanted = readers.get(here[0], (here[0],))
            if tuple(here) != wanted:
                faults.append(f"{p.name} is read by {_layers(here)}, planned for {_layers(wanted)}")
        elif len({plan.role(p.role, layer).values for layer in here}) > 1:
            faults.append(
                f"{p.name} is read by {_layers(here)}, for which the plan has different values: give each a tensor of its own, or"
                " plan blocks that are alike"
            )
    return faults


def _layers(numbers: Sequence[int]) -> str:
    """``layer 3``, ``layers 0–3`` or ``layers 0, 2, 4``."""
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"layers {numbers[0]}–{numbers[-1]}"
    return f"layers {', '.join(map(str, numbers))}"


def _final_norm_faults(plan: PlanData, params: Iterable[ParamInfo], declared: bool) -> list[str]:
    """The last norm's gain has a role of its own: on a tied, folded plan it carries the head multiplier."""
    params = list(params)
    final = [p for p in params if p.role == "final_norm"]
    inside = [p.name for p in final if p.layer is not None]
    if inside and declared:
        return [f"{inside[0]} has the role final_norm, but lies in a block: give the norms of blocks the role norm"]
    if final:
        return []
    folded = plan.folding.coefficients[0].get("final_norm") if plan.folding is not None else None
    outside = [p.name for p in params if p.role == "norm" and p.layer is None]
    if folded is not None:
        named = f": is it {outside[0]}? Give that the role final_norm" if outside else ": use an untied head"
        return [
            f"the plan's head multiplier ({number(folded)}) is in the gain of the final norm, as its head is tied, and the model has"
            f" no tensor of role final_norm{named}"
        ]
    if declared and outside and plan.target.layers > 1:
        return [
            f"{outside[0]} has the role norm, but lies outside the blocks, and no tensor is the final_norm: give it that role"
        ]
    return []


def _misfit(
    plan: PlanData, layers: Sequence[Block], only: Block | None, p: ParamInfo, routers: list[ParamInfo]
) -> str | None:
    """What is wrong with one tensor, or None.

    Only matrices are asked for their sizes: norms and biases follow what they stand on.
    """
    if p.layers and p.layers[-1] >= len(layers):
        hint = "" if "{" in p.layout.pattern else "; if its first * is no layer, mark it: {expert}, {stage}"
        return f"{p.name} is in layer {p.layers[-1]}, the plan has {len(layers)} layers{hint}"
    if not ROLES[p.role].drawn:
        return None
    for role in p.layout.parts or (p.role,):
        if not plan.role(role, p.layer).count:
            where = "" if p.layer is None else f" in layer {p.layer}"
            return f"{p.name} has role {role}, which the plan does not have{where}"
    for what, found, wanted in _expected(plan, only if p.layer is None else layers[p.layer], p, routers):
        if found not in wanted:
            hint = (
                "; a table of positions has the role position" if (p.role, what) == ("embedding", "vocabulary") else ""
            )
            return f"{p.name} {tuple(p.parameter.shape)}: {what} {found}, planned {wanted[0]}{hint}"
    return None


def _expected(
    plan: PlanData, block: Block | None, p: ParamInfo, routers: list[ParamInfo]
) -> list[tuple[str, int, tuple[int, ...]]]:
    """(what, found, planned) of one tensor's sizes; ``routers`` are all of its layer."""
    t = plan.target
    kind, part = ROLES[p.role].kind, ROLES[p.role].part
    if kind == "embedding":
        # a table of positions has as many rows as the longest sequence, which a plan does not know
        rows = [] if p.layout.role == POSITION else [("vocabulary", p.fan_in, (t.vocab,))]
        return [*rows, ("width", p.fan_out, (t.width,))]
    if t.image is not None and (of_image := _of_images(t, t.image, kind, part, p)):
        return of_image
    if kind == "head":
        return [("vocabulary", p.fan_out, (t.vocab,)), ("width", p.fan_in, (t.width,))]
    if kind == "attention":
        # q, k and v may read a latent; whether one of a layer reads the stream is asked in _latent_faults
        return [("fan-in", p.fan_in, (t.attention_width,))] if part == "o" else []
    if block is None:
        return []
    if kind == "router":
        outs = (block.experts, 1)  # 1: the gate of a shared expert
        latents = _latents(t.width, outs, routers)
        return [("fan-in", p.fan_in, (t.width, *latents)), ("experts", p.fan_out, (*outs, *latents))]
    hidden = {"ffn": block.ffn, "expert": block.expert, "shared": block.shared_width}[kind]
    # n_s shared experts of width h_s are one of n_s·h_s in sum, however a model stores them
    many = p.experts if kind == "shared" else 1
    found = p.fan_in if part == "down" else p.fan_out // max(len(p.layout.parts), 1)
    sizes: list[tuple[str, int, tuple[int, ...]]] = [
        ("hidden width", found * many, (hidden or 0,)),
        ("residual width", p.fan_out if part == "down" else p.fan_in, (t.width,)),
    ]
    if kind == "expert" and p.expert is None:
        sizes.append(("experts", p.experts, (block.experts,)))
    return sizes


def _of_images(
    t: Transformer, image: Image, kind: str, part: str, p: ParamInfo
) -> list[tuple[str, int, tuple[int, ...]]]:
    """:func:`_expected` of what only diffusion transformers have, and of their head."""
    pixels, width = image.patch_elements, ("width", p.fan_out, (t.width,))
    if kind == "patch":
        return [("numbers of a patch", p.fan_in, (pixels,)), width]
    if kind == "condition":  # how many sines the time is read from, every model has as it likes
        rows = {"class": [("classes, with one for none", p.fan_in, (image.classes + 1, image.classes))]}
        return [*rows.get(part, [("fan-in", p.fan_in, (t.width,))] if part == "out" else []), width]
    if kind == "modulation":
        return [("fan-in", p.fan_in, (t.width,))]
    # twice as many where the variance is learnt, too (2212.09748)
    return (
        [("numbers of a patch", p.fan_out, (pixels, 2 * pixels)), ("width", p.fan_in, (t.width,))]
        if kind == "head"
        else []
    )


def _latents(width: int, outs: tuple[int, ...], routers: list[ParamInfo]) -> set[int]:
    """Sizes inside a router that is a small MLP: what one of its matrices puts out and another reads, the last one the scores."""
    # A router's own MLP has matrices whose fan-in is not d
    read, written = {p.fan_in for p in routers}, {p.fan_out for p in routers}
    return (read & written) - {width} if width in read and written & set(outs) else set()


def _latent_faults(plan: PlanData, params: Iterable[ParamInfo]) -> list[str]:
    """q, k and v read the residual stream, or a latent that another of them read from it (latent attention)."""
    width = plan.target.width
    fan_ins: dict[int | None, list[ParamInfo]] = {}
    for p in params:
        role = ROLES[p.role]
        if role.reads_residual and role.kind == "attention":
            fan_ins.setdefault(p.layer, []).append(p)
    return [
        f"{many[0].name} {tuple(many[0].parameter.shape)}: fan-in {many[0].fan_in}, planned {width}"
        for many in fan_ins.values()
        if all(p.fan_in != width for p in many)
    ]


def _multiplier_faults(plan: PlanData, model: nn.Module) -> list[str]:
    """Where a model carries its own forward multipliers (ours do), they must be the plan's."""
    own = getattr(unwrap(model), "multipliers", None)
    if not isinstance(own, Multipliers):
        return []
    planned = plan.multipliers
    ones = (1.0,) * plan.target.layers
    own = replace(
        own,
        attention_scale=own.attention_scale or plan.target.head_dim**-0.5,
        output=own.output or ones,
        route=own.route or ones,
    )
    folded = "plan" if plan.folding is None else f"mue.fold.fold(plan, {plan.folding.route!r})"
    return [
        f"the model's {name} multiplier is {getattr(own, name)}, planned {getattr(planned, name)}: build it with {folded}.multipliers"
        for name in ("residual", "head", "attention_scale", "output", "route")
        # exactly: both come from one plan, or the model was built from another
        if getattr(own, name) != getattr(planned, name)
    ]
