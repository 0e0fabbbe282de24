"""The families of ``transformers`` that a plan can be applied to, each at a tiny size with a plan whose multipliers differ from 1."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mue
from mue.fold import fold
from mue.layouts.inspect import Inspection, inspect, measure_gates
from mue.layouts.of_model import placed
from mue.layouts.transformers.configs import build, default_config
from mue.layouts.transformers.family import family_of
from mue.layouts.transformers.tiny import shrink
from support.sde import SDE

TUNED = mue.HParams(lr=4e-3, weight_decay=0.1, init_std=0.04, eps=1e-10)
# by the SDE rule, so that every number moves with the run: whoever forgets one is seen
TRAININGS: dict[str, Any] = {"base_training": mue.Training(1024, 100), "training": mue.Training(1024, 400), **SDE}
WIDTH = 32  # of the base

# Twelve that between them have every structure a check has to follow; the whole list is `make slow`.
NAMED = (
    "qwen3_moe",  # query and key norms, experts without a shared one
    "qwen2_moe",  # a shared expert behind a gate of its own, biases of q, k and v
    "mixtral",
    "olmoe",  # query and key norms over all heads
    "deepseek_v3",  # latent attention, a route scale of its own, a balance bias, a dense layer first
    "gpt_oss",  # biases of experts and router, sinks, a clamped activation
    "flex_olmo",  # norms after the branches
    "ernie4_5_moe",  # tied, a balance bias in a softmax router
    "gpt2",  # learned positions, fused q, k and v stored (in, out), LayerNorm, tied
    "gpt_neox",  # parallel branches
    "gemma2",  # sandwich norms, gains of 1 + w, softcapped logits, an embedding times √d, tied
    "qwen3",
)


# Of these a plan can be applied to the parameters, but the code has multipliers of its own that no setting switches off.
OWN_CODE = {"beam": "its code weighs the stream against each branch by their number, and no setting switches that off"}


class RefusedError(ValueError):
    """A family that no plan can be applied to as it stands; the message is the library's own."""


@dataclass(frozen=True)
class Stock:
    """A tiny family with its plan.

    Attributes:
        config: with R in the weights. plan: with multipliers. routed: the config with R as the model's own route scale, or None.
        experts: names of the modules that are handed expert indices and weights, by layer.
    """

    name: str
    config: Any
    plan: mue.Plan
    routed: Any
    experts: dict[int, str]


LISTING = Path(__file__).with_name("impossible.json")


@cache
def accepted() -> tuple[str, ...]:
    """Every causal-LM family that a plan can be applied to, as :data:`LISTING` has them (benchmarks/mutations.py --listing)."""
    return tuple(json.loads(LISTING.read_text(encoding="utf-8"))["families"])


@cache
def stock_family(name: str) -> Stock:
    """A family at its tiny size.

    Raises:
        RefusedError: nothing that a plan can be applied to, with the library's own words.
    """
    if name in OWN_CODE:
        raise RefusedError(OWN_CODE[name])
    try:
        config = shrink(default_config(name), 2, family_of(name).tiny)
        if hasattr(config, "first_k_dense_replace"):
            config.first_k_dense_replace = 1  # one dense layer, one with experts
        seen = inspect(config)
        for scaling in seen.scalings:
            if scaling.active or scaling.what == "routed sum":
                kind = type(getattr(config, scaling.attribute))
                setattr(config, scaling.attribute, kind(scaling.neutral or 1.0))
    except Exception as error:  # a family's own code on a config that it does not expect
        raise RefusedError(
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        ) from error
    return _planned(name, config, seen)


def _planned(name: str, config: Any, seen: Inspection) -> Stock:
    """The first base from which a plan can be applied to the stock code: one head size or depth cannot be carried everywhere."""
    why, moments = seen.no_shape, None
    if seen.routing is not None and not seen.routing.normalised:
        if seen.routing.remedy and seen.routing.setting is not None:
            setattr(config, seen.routing.setting[0], True)
        elif not seen.undecided:
            try:
                moments = measure_gates(config, router_std=TUNED.init_std * (WIDTH / _width(config)) ** 0.5).pair
            except ValueError as error:
                raise RefusedError(str(error).splitlines()[0][:200]) from error
    found = inspect(config, gate_moments=moments)
    if found.shape is None:
        raise RefusedError((found.no_shape or why)[:200])
    for head_dim, layers in (
        (8, 1),
        (found.shape.head_dim, 1),
        (8, found.shape.layers),
        (found.shape.head_dim, found.shape.layers),
    ):
        base = mue.Dense(width=WIDTH, ffn=64, layers=layers, head_dim=head_dim, heads=max(1, WIDTH // head_dim))
        plan = mue.transfer(base, found.shape, TUNED.replace(clip=1.0), **TRAININGS)
        try:
            model = build_stock(config)
            fold(plan).init_(model)
        except ValueError as error:
            why = " ".join(str(error).split())
            continue
        return Stock(name, config, plan, _routed(config, found, plan), _experts(model))
    raise RefusedError(why[:200])


def _width(config: Any) -> int:
    shape = next(iter(placed(build_stock(config)))).parameter.shape
    return int(shape[-1])


def _routed(config: Any, found: Inspection, plan: mue.Plan) -> Any:
    """The config with the plan's R as its own route scale, where it has one that its code reads."""
    names = [s.attribute for s in found.scalings if s.what == "routed sum"]
    if not names:
        return None
    other = copy.deepcopy(config)
    for name in names:
        setattr(other, name, max(plan.multipliers.route))
    try:
        fold(plan, "model").init_(build_stock(other))
    except ValueError:
        return None
    return other


def build_stock(config: Any, seed: int = 0) -> nn.Module:
    """The family's own model of a config, with plain products."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = build(copy.deepcopy(config))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def tokens_of(seed: int) -> Tensor:
    """(2, 24) tokens of the tiny vocabulary, no special ones among them."""
    return torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _experts(model: nn.Module) -> dict[int, str]:
    """Layer → the module that is handed the experts' indices and weights for each token."""
    found: dict[int, str] = {}
    handles = []
    for name, module in model.named_modules():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if layer is None:
            continue

        def seen(m: nn.Module, args: tuple[Any, ...], name: str = name, layer: int = layer) -> None:
            if handed(args) is not None:
                found[layer] = name  # the innermost module is called last

        handles.append(module.register_forward_pre_hook(seen))
    model.eval()
    model(input_ids=tokens_of(0))
    for handle in handles:
        handle.remove()
    return found


def handed(args: tuple[Any, ...]) -> tuple[int, int] | None:
    """Positions of the expert indices and their weights among a module's arguments."""
    for i, index in enumerate(args):
        for j, weights in enumerate(args):
            pair = isinstance(index, Tensor) and isinstance(weights, Tensor) and index.dtype == torch.int64
            if pair and index.dim() == 2 and weights.is_floating_point() and weights.shape == index.shape:
                return i, j
    return None
