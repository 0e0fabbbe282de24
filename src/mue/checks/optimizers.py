"""Which algorithm an optimizer is, whoever wrote it, and what is inside those that wrap others."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch

from mue.model.muon import Muon

# What packages put around an algorithm's name for another implementation of it: apex, DeepSpeed, Transformer Engine (Fused, CPU),
# bitsandbytes (Paged, 8bit), torchao (8bit, 4bit, Fp8), Keller Jordan's Muon (SingleDevice), torchdistx (AnyPrecision).
_FRONT = r"^(?:fused|paged|deepspeed|cpu|singledevice|distributed|anyprecision|torch|hf|flash|triton|foreach|generic|mixedprecision)+"
_BACK = r"(?:\d+bit|\d+bits|fp8|bf16|optimizer|withauxadam)+$"
# Algorithms by name. To itself: one that no plan is written for, so that it is another one for every plan.
_OTHERS = """
    adabelief adabound adadelta adafactorschedulefree adagrad adahessian adai adalomo adamax adammini adamp
    adamwschedulefree adamwsn adan ademamix adopt apollo asgd came dadaptadam dadaptadamw dadaptlion dion ftrl
    galoreadamw galoreadamw8bit kron laprop lars lbfgs lomo lookahead madgrad mars nadam novograd onebitadam padam
    prodigy psgd qhadam radam radamschedulefree ranger ranger21 rmsprop rmsproptf rprop scion sgdp sgdschedulefree
    shampoo sm3 soap sophia sophiag sophiah sparseadam stableadamw tiger yogi zerooneadam
"""
ALGORITHMS = {
    **{name: name for name in _OTHERS.split()},
    "adam": "adam-l2",
    "adamw": "adamw",
    "nadamw": "nadamw",
    "lion": "lion",
    "sgd": "sgd",
    "muon": "muon",
    "lamb": "lamb",
    "adafactor": "adafactor",
    # Composer's and llm-foundry's: p *= 1 - wd·lr/initial_lr
    "decoupledadamw": "adamw-independent",
    "decoupledlionw": "lion-independent",
    "decoupledsgdw": "sgd-independent",
    "sgdw": "sgd-decoupled",
    "lionw": "lion",
}
# Under which names implementations of Adam keep whether the decay is decoupled: torch; apex, DeepSpeed, Transformer Engine;
# torchao; DeepSpeed on the CPU; pytorch-optimizer; timm.
_DECOUPLED = ("decoupled_weight_decay", "adam_w_mode", "is_adamw", "adamw_mode", "weight_decouple", "decoupled_decay")
_INDEPENDENT = ("decouple_lr", "fixed_decay")  # optimi's and pytorch-optimizer's word for p *= 1 - wd
_WITH_DECAY = {"adam-l2": "adamw", "nadam": "nadamw"}
_MANY = ("optimizers", "chained_optimizers")  # torchtitan's container, Megatron's chain
_ONE = ("optimizer", "optim")  # accelerate, Lightning, DeepSpeed, Megatron; torch's ZeroRedundancyOptimizer


def algorithm(optimizer: Any, group: dict[str, Any]) -> str | None:
    """The algorithm that moves a group's parameters.

    Args:
        optimizer: of any package. group: one of its ``param_groups``.

    Returns:
        A name of :data:`mue.shapes.OPTIMIZERS`, another algorithm's, or None for a class that is not known.
    """
    if isinstance(optimizer, Muon):  # ours, with the AdamW beside it
        return str(group["algorithm"])
    if "use_muon" in group:  # Keller Jordan's, with AdamW for all that is no matrix
        return "muon" if group["use_muon"] else "adamw"
    for kind in type(optimizer).__mro__:
        name = ALGORITHMS.get(_plain(kind.__name__))
        if name is not None:
            return _with_decay(name, kind, optimizer, group)
        if _step(kind) is not _step(kind.__mro__[1]):  # it makes a step of its own, whatever else it inherits
            break
    inside = next((getattr(optimizer, n) for n in _ONE if hasattr(getattr(optimizer, n, None), "param_groups")), None)
    return algorithm(inside, group) if inside is not None else None


def _step(kind: type) -> Any:
    """A class's step without what torch puts around it when the first optimizer of that class is built."""
    step = getattr(kind, "step", None)
    return inspect.unwrap(step) if callable(step) else step


def _plain(name: str) -> str:
    """A class's name in small letters, without the words that name the implementation."""
    name = name.lower().replace("_", "")
    return name if name in ALGORITHMS else re.sub(_FRONT, "", re.sub(_BACK, "", name))


def _with_decay(name: str, kind: type, optimizer: Any, group: dict[str, Any]) -> str | None:
    """The algorithm with the decay that its settings say: one class may have several."""
    said = [bool(group.get(key, getattr(optimizer, key, None))) for key in _DECOUPLED if _has(optimizer, group, key)]
    if any(_has(optimizer, group, key) and group.get(key, getattr(optimizer, key, None)) for key in _INDEPENDENT):
        return f"{_WITH_DECAY.get(name, name)}-independent"
    if any(said):
        return _WITH_DECAY.get(name, name)
    # bitsandbytes' Adam has AdamW's decay under this name, so that a name alone does not say it
    if name == "adam-l2" and not said and not kind.__module__.startswith("torch.") and group.get("weight_decay"):
        return None
    return name


def _has(optimizer: Any, group: dict[str, Any], key: str) -> bool:
    return key in group or hasattr(optimizer, key)


def called(optimizer: Any) -> str:
    """An optimizer's class as a user imports it."""
    kind = type(optimizer)
    return f"torch.optim.{kind.__name__}" if f"{kind.__module__}.".startswith("torch.optim.") else kind.__name__


def is_torchs_adamw(optimizer: Any) -> bool:
    """Whether the step is that of ``torch.optim.AdamW``, exactly: itself, a subclass with its step, or a wrapper around it."""
    inside = next(
        (getattr(optimizer, n) for n in _ONE if hasattr(getattr(optimizer, n, None), "param_groups")), optimizer
    )
    adamw = all(algorithm(inside, g) == "adamw" for g in inside.param_groups)
    return adamw and _step(type(inside)) is _step(torch.optim.AdamW)


def unwrapped(optimizer: Any) -> Iterator[Any]:
    """The optimizers in a list, a chain or a wrapper: those whose groups have the rates.

    Raises:
        ValueError: something that is no optimizer, with the fix.
    """
    if isinstance(optimizer, list | tuple):
        if any(isinstance(one, dict) and "params" in one for one in optimizer):
            raise ValueError(
                "optimizer= has got parameter groups: give the optimizer built from them, e.g."
                " torch.optim.AdamW(plan.param_groups(model))"
            )
        for one in optimizer:
            yield from unwrapped(one)
        return
    many = next((getattr(optimizer, n) for n in _MANY if isinstance(getattr(optimizer, n, None), list | tuple)), None)
    if many:
        yield from unwrapped(list(many))
        return
    if isinstance(optimizer, type) or not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "step"):
        what = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else f"a {type(optimizer).__name__}"
        raise ValueError(
            f"optimizer= has got {what}: give the optimizer that will train, or a list of them, e.g."
            " torch.optim.AdamW(plan.param_groups(model))"
        )
    yield optimizer


def state_of(optimizer: Any) -> Any:
    """Its state by parameter; empty where a wrapper shows none."""
    return getattr(optimizer, "state", None) or {}


def holds_its_own(optimizer: Any) -> bool:
    """Whether it wraps another optimizer, as those do that step master weights or flat shards instead of the parameters."""
    return any(hasattr(getattr(optimizer, n, None), "param_groups") for n in _ONE)
