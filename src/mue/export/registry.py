"""Every training stack by name. A stack is one file: a function that writes a plan in its words, registered here.

    @STACKS.register("mine")
    def mine(plan: PlanData, model: Any) -> str: ...

It is handed the plan as the user has it and what the user gave as ``model`` (None: nothing), and returns the text of a file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mue.plan.plan import PlanData
from mue.util.registry import Registry

STACKS: Registry[Callable[[PlanData, Any], str]] = Registry("stack", home="mue.export")


def export(plan: PlanData, to: str, model: Any = None) -> str:
    """The plan as a file of a stack.

    Args:
        plan: folded here, so that no stack's forward code changes. R goes into the stack's own route scale where it has one
            (torchtitan, Megatron-Core), else into the weights; for the others a plan that is folded already stays as it is.
        to: a name of :data:`STACKS`: ``"torch"`` (own loop, Accelerate), ``"transformers"`` (Hugging Face Trainer),
            ``"automodel"`` (NeMo), ``"torchtitan"``, ``"megatron"`` (Megatron-Core), ``"olmo-core"``, ``"optax"`` (JAX), or one that was
            registered.
        model: the planned model as a module (the meta device will do). Or, for the first three, a transformers config, or
            the path or family of one; for the next three, the name of one of the stack's own models, which is written from
            the plan's shape. None: the lab's model for torch, transformers' family of the plan's shape for the next two, the
            stack's first model for the others. For optax, rows (path, role, axes), or a style of path by name.

    Returns:
        The text of the file, which needs its stack and not mue.

    Raises:
        ValueError: an unknown stack; a model that is not the planned one; what the stack's dialect cannot say at all.
    """
    return STACKS.lookup(to)(plan, model)
