"""Grouped expert compute: one function, several backends, the same numerics.

    y_t = sum over pairs (t, e, w) of  w * down_e( silu(gate_e x_t) * (up_e x_t) )   +   the shared experts' FFN of x_t

Shape suffixes: T tokens, P pairs, N experts, D width, H expert width, S width of all shared experts together.

Backends ("auto" takes native on a CPU and grouped_mm on CUDA where they can, else portable):
    native      C++ on the CPU, routed and shared experts in one call (mue.moe.backends.native); has to be built once.
    grouped_mm  torch's grouped products, for CUDA (mue.moe.backends.grouped).
    portable    pure torch, anywhere (mue.moe.backends.portable).
    reference   a plain loop over experts under ordinary autograd: the oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mue.moe.backends import grouped, native, portable
from mue.moe.expert_weights import ExpertWeights, check
from mue.moe.routing import Routing, expert_load

Backend = Callable[[Tensor, Routing, ExpertWeights, torch.dtype], Tensor]


def experts(
    x_TD: Tensor, routing: Routing, weights: ExpertWeights, backend: str = "auto", scale: float = 1.0
) -> Tensor:
    """Routed plus shared experts of every token, times `scale` (the output multiplier A).

    The routed sum has the routing's weights (which contain R), the shared output has coefficient 1. Under autocast
    everything runs in autocast's dtype and the result has that dtype, as nn.Linear's would.

    Args:
        x_TD: (T, D) on any device.
        routing: any `Routing` over the same T tokens and N experts.
        weights: at least the routed or the shared experts.
        backend: "auto" or one of BACKENDS; all agree to rounding.

    Returns:
        (T, D), deterministic on CPU (for the same number of threads).

    Raises:
        ValueError: shapes that do not belong together, an expert index outside [0, N], a backend that is unknown or
            cannot do this here.
    """
    check(x_TD, routing, weights)
    dtype = compute_dtype(x_TD)
    if backend == "auto":
        backend = choose(x_TD, weights, dtype)
    elif backend not in BACKENDS:
        raise ValueError(f'backend={backend!r} is unknown: use "auto" or one of {sorted(BACKENDS)}')
    elif backend in REFUSALS and (reason := REFUSALS[backend](x_TD, weights, dtype)):
        raise ValueError(reason)
    # the backends cast by themselves: the native one reads weights as they are stored, with no copy in bf16
    with torch.autocast(x_TD.device.type, enabled=False):
        if scale != 1.0 and backend == "native" and weights.shared_up_SD is None:  # the same on D times fewer numbers
            routing, scale = replace(routing, weight_P=routing.weight_P * scale), 1.0
        y_TD = BACKENDS[backend](x_TD, routing, weights, dtype)
        return y_TD if scale == 1.0 else y_TD * scale


def choose(x_TD: Tensor, weights: ExpertWeights, dtype: torch.dtype) -> str:
    """The backend that "auto" means for this input.

    Args:
        x_TD: (T, D). weights: of the block. dtype: in which it would be computed (:func:`compute_dtype`).

    Returns:
        A name of BACKENDS: of those that can, the one that was measured to be the fastest at such a shape. It is the plain operators'
        where somebody wants to see each of them (``mue.check``).
    """
    if not torch.compiler.is_compiling() and getattr(_get_current_dispatch_mode(), "wants_plain_operators", False):
        return "portable"
    best = {"cpu": "native", "cuda": "grouped_mm"}.get(x_TD.device.type, "portable")
    if best == "portable" or REFUSALS[best](x_TD, weights, dtype) is not None:
        return "portable"
    return "portable" if best == "native" and native.is_slower(weights, dtype) else best


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which products with ``x`` are computed.

    Returns:
        autocast's, where it is on for the device of ``x`` (it leaves float64 alone), else that of ``x``.
    """
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _activation(x: Tensor, gate: Tensor | None, up: Tensor) -> Tensor:
    """silu(gate x) * (up x), or gelu(up x) where there is no gate."""
    return F.gelu(F.linear(x, up)) if gate is None else F.silu(F.linear(x, gate)) * F.linear(x, up)


def _with_shared(routed: Backend, *, casts: bool = False) -> Backend:
    """A backend of routed experts, with the casts before it (but of the weights where it `casts` them itself) and the shared
    experts beside it."""

    def run(x_TD: Tensor, routing: Routing, weights: ExpertWeights, dtype: torch.dtype) -> Tensor:
        x_TD = x_TD.to(dtype)
        y_TD = None
        if weights.up_NHD is not None:
            alone = ExpertWeights(*weights.matrices[:3])
            y_TD = routed(x_TD, routing, alone if casts else alone.map(lambda matrix: matrix.to(dtype)), dtype)
        gate_SD, up_SD, down_DS = (None if matrix is None else matrix.to(dtype) for matrix in weights.matrices[3:])
        if up_SD is not None and down_DS is not None:
            shared_TD = F.linear(_activation(x_TD, gate_SD, up_SD), down_DS)
            y_TD = shared_TD if y_TD is None else y_TD + shared_TD
        assert y_TD is not None  # check
        return y_TD

    return run


def _reference(x_TD: Tensor, routing: Routing, weights: ExpertWeights, dtype: torch.dtype) -> Tensor:
    """One expert after the other, as the formula reads; sums in at least float32."""
    expert_load(routing)  # the same refusal as the other backends
    gate_NHD, up_NHD, down_NDH = weights.matrices[:3]
    assert up_NHD is not None and down_NDH is not None
    y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(dtype, torch.float32))
    gates = [None] * routing.num_experts if gate_NHD is None else gate_NHD.unbind(0)
    for expert, (gate, up, down) in enumerate(zip(gates, up_NHD.unbind(0), down_NDH.unbind(0), strict=True)):
        pair = (routing.expert_P == expert).nonzero().squeeze(1)
        token = routing.token_P[pair]
        hidden = _activation(x_TD[token], gate, up) * routing.weight_P[pair, None]
        y_TD = y_TD.index_add(0, token, F.linear(hidden.to(dtype), down).to(y_TD.dtype))
    return y_TD.to(dtype)


BACKENDS: dict[str, Backend] = {
    "reference": _with_shared(_reference),
    "portable": _with_shared(portable.run, casts=True),
    "native": native.run,
    "grouped_mm": _with_shared(grouped.run),
}
# Why a backend cannot compute this; None where it can.
REFUSALS: dict[str, Callable[[Tensor, ExpertWeights, torch.dtype], str | None]] = {
    "native": native.refusal,
    "grouped_mm": grouped.refusal,
}
