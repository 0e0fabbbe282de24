"""Checkpoints: one safetensors file with weights, buffers and optimizer state; no pickle, replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from mue.util.files import write_atomic


def save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    averages: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Replace ``path`` by the present state; on any error (a full disk, say) the old file stays as it was.

    Tensors are named ``model/NAME``, ``optimizer/NAME/KEY`` and ``ema/NAME``; ``state`` travels as JSON in the header.

    Args:
        averages: of the weights, by name.
        state: what else a run has to remember; it needs the keys ``run`` and ``plan``, by which :func:`load` knows the
            file.

    Raises:
        OSError: the file cannot be written; the text says whether an older checkpoint is still there.
    """
    tensors = {f"model/{name}": value for name, value in _unique(model).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = torch.as_tensor(value)
    tensors |= {f"ema/{name}": value for name, value in (averages or {}).items()}
    # safetensors refuses a tensor that is not contiguous.
    contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
    _write(path, contiguous, state)


def load(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: Mapping[str, torch.Tensor] | None = None,
    *,
    run: str,
    plan: str,
) -> dict[str, Any]:
    """Put a checkpoint's state into model and optimizer, in place, and into the averages of the weights where there are any.

    Args:
        run, plan: the key of the run and the hash of the plan that the file has to belong to.

    Returns:
        What :func:`save` was given as ``state``.

    Raises:
        ValueError: the file is damaged, or belongs to another run or plan than ``run`` and ``plan``.
    """
    try:
        with safe_open(path, framework="pt") as file:
            own, state = _checked(path, file, model, run, plan, "model/")
            own_state: dict[str, dict[str, torch.Tensor]] = {}
            for name in file.keys():  # noqa: SIM118 - not a dict
                kind, _, rest = name.partition("/")
                if kind == "model":
                    own[rest].copy_(file.get_tensor(name))
                elif kind == "ema":
                    (averages or {})[rest].copy_(file.get_tensor(name))
                else:
                    parameter, _, key = rest.rpartition("/")
                    # Adam's step count too: fused AdamW keeps it where the parameter is.
                    own_state.setdefault(parameter, {})[key] = file.get_tensor(name).to(own[parameter].device)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to start over") from error
    # By name: Optimizer.load_state_dict goes by a parameter's place in its group, which another grouping would shift.
    for name, parameter in model.named_parameters():
        if name in own_state:
            optimizer.state[parameter] = own_state[name]
    return state


@torch.no_grad()
def load_weights(path: Path, model: nn.Module, *, run: str, plan: str) -> None:
    """Put the weights (with the balance biases) of a checkpoint, or of what :func:`save_weights` wrote, into a model, in place.

    Args:
        run, plan: as of :func:`load`.

    Raises:
        ValueError: as of :func:`load`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            prefix = "model/" if any(name.startswith("model/") for name in file.keys()) else ""  # noqa: SIM118 - not a dict
            own, _ = _checked(path, file, model, run, plan, prefix)
            for name, tensor in own.items():
                tensor.copy_(file.get_tensor(f"{prefix}{name}"))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to start over") from error


def _checked(
    path: Path, file: Any, model: nn.Module, run: str, plan: str, prefix: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A model's tensors by name, and the state in an open file that has all of them under ``prefix`` and is of this run."""
    state: dict[str, Any] = json.loads((file.metadata() or {}).get("mue", "{}"))
    if state.get("run") != run:
        raise ValueError(
            f"{path} is a checkpoint of run {state.get('run')} (plan {state.get('plan')}), not of run {run}"
            f" (plan {plan}): use another folder, or remove it to start over"
        )
    own = _unique(model)
    stored = {name for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118 - not a dict
    if stored != {f"{prefix}{name}" for name in own}:
        odd = sorted(stored ^ {f"{prefix}{name}" for name in own})[0]
        raise ValueError(
            f"{path} is damaged: {odd} is in the file or in the model, not in both; remove it to start over"
        )
    return own, state


def save_weights(path: Path, model: nn.Module, metadata: dict[str, str]) -> None:
    """Write the weights alone (with the balance biases), under the model's own names, for use elsewhere.

    Args:
        metadata: goes into the file's header as JSON, under ``mue``.
    """
    _write(path, {name: value.detach().contiguous() for name, value in _unique(model).items()}, metadata)


def _unique(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without the second name of tied tensors, which safetensors refuses."""
    seen: set[int] = set()  # by identity, which only keep_vars leaves as it is: else each call makes new views
    kept = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            kept[name] = value.detach()
    return kept


def _write(path: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Replace a file by one with these tensors, and ``state`` in its header; an error leaves the old one."""

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, {"mue": json.dumps(state)})
        except SafetensorError as error:  # the library's word for an I/O error
            raise OSError(str(error)) from error

    try:
        write_atomic(path, write)
    except OSError as error:
        kept = " (the last good one is kept)" if path.exists() else ""
        raise OSError(f"cannot write checkpoint {path}{kept}: {error}") from error
