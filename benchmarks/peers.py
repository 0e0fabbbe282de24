"""Other people's expert compute on the inputs of a `mue.lab.doctor.timing.Bench`: what our backends are compared with.

Each peer gets the weights in the layout it wants and the routing as (T, K) tables; routers are left out everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from mue.lab.doctor.timing import Bench, Step
from mue.moe import Routing


def tables(routing: Routing) -> tuple[Tensor, Tensor]:
    """(T, K) experts and weights."""
    shape = (routing.num_tokens, routing.slots)
    return routing.expert_P.view(shape), routing.weight_P.view(shape)


def dense_fused(bench: Bench) -> Step:
    """The dense FFN with gate and up as one product."""
    case = bench.case
    wide = case.active * case.inner
    gate_up, down = bench.matrix(2 * wide, case.width), bench.matrix(case.width, wide)

    def forward(_: Routing) -> Tensor:
        gate, up = F.linear(bench.x_TD, gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, down)

    return bench.step(forward, [gate_up, down])


def sort_loop(bench: Bench) -> Step:
    """Sort by expert, one small FFN after the other, index_add: what most tutorials do."""
    gate, up, down = bench.routed

    def forward(routing: Routing) -> Tensor:
        expert_TK, weight_TK = tables(routing)
        order = expert_TK.flatten().argsort(stable=True)
        token = order // routing.slots
        counts = torch.bincount(expert_TK.flatten(), minlength=routing.num_experts).tolist()  # on a GPU this waits
        done = []
        for x, g, u, d in zip(bench.x_TD[token].split(counts), gate.unbind(), up.unbind(), down.unbind(), strict=True):
            done.append(F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d))
        rows = torch.cat(done) * weight_TK.flatten()[order, None]
        return rows.new_zeros(bench.x_TD.shape).index_add(0, token, rows)

    return bench.step(forward, bench.routed)


def padded_bmm(bench: Bench) -> Step:
    """Every expert padded to the longest, three batched products."""
    gate, up, down = bench.routed

    def forward(routing: Routing) -> Tensor:
        expert_TK, weight_TK = tables(routing)
        order = expert_TK.flatten().argsort(stable=True)
        token, expert = order // routing.slots, expert_TK.flatten()[order]
        counts = torch.bincount(expert, minlength=routing.num_experts)
        rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[expert]
        padded = bench.x_TD.new_zeros(routing.num_experts, int(counts.max()), bench.case.width)
        padded = padded.index_put((expert, rank), bench.x_TD[token])
        hidden = F.silu(torch.bmm(padded, gate.mT)) * torch.bmm(padded, up.mT)
        rows = torch.bmm(hidden, down.mT)[expert, rank] * weight_TK.flatten()[order, None]
        return rows.new_zeros(bench.x_TD.shape).index_add(0, token, rows)

    return bench.step(forward, bench.routed)


def transformers_experts(implementation: str) -> Callable[[Bench], Step]:
    """The experts of transformers' Qwen3-MoE under one of its implementations."""

    def build(bench: Bench) -> Step:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        case = bench.case
        config = Qwen3MoeConfig(
            hidden_size=case.width, moe_intermediate_size=case.inner, num_experts=case.number,
            num_experts_per_tok=case.active,
        )  # fmt: skip
        config._experts_implementation = implementation
        module = Qwen3MoeExperts(config).to(case.device)
        gate, up, down = bench.routed
        module.gate_up_proj.data, module.down_proj.data = torch.cat((gate, up), 1).detach(), down.detach().clone()
        return bench.step(lambda routing: module(bench.x_TD, *tables(routing)), module.parameters())

    return build


def torchtitan_experts(bench: Bench) -> Step:
    """torchtitan's grouped experts with its local dispatcher; they compute in bf16 whatever they are given."""
    from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    case = bench.case
    module = RoutedExperts.Config(
        inner_experts=GroupedExperts.Config(dim=case.width, hidden_dim=case.inner, num_experts=case.number),
        token_dispatcher=LocalTokenDispatcher.Config(num_experts=case.number, top_k=case.active),
    ).build()
    module = module.to(case.device)
    gate, up, down = (weight.detach().clone() for weight in bench.routed)
    inner = module.inner_experts
    inner.w1_EFD.data, inner.w3_EFD.data, inner.w2_EDF.data = gate, up, down

    def forward(routing: Routing) -> Tensor:
        expert_TK, weight_TK = tables(routing)
        load = torch.bincount(routing.expert_P, minlength=case.number)
        return module(bench.x_TD[None], weight_TK[None], expert_TK[None], load)[0]

    return bench.step(forward, module.parameters())


def scattermoe(bench: Bench) -> Step:
    """scattermoe's gated MLP (Triton, CUDA only)."""
    from scattermoe.mlp import GLUMLP

    case = bench.case
    module = GLUMLP(case.width, case.inner, case.number, case.active).to(case.device)

    def forward(routing: Routing) -> Tensor:
        expert_TK, weight_TK = tables(routing)
        return module(bench.x_TD, weight_TK, expert_TK)

    return bench.step(forward, module.parameters())


PEERS: dict[str, Callable[[Bench], Step]] = {
    "dense-fused": dense_fused,
    "sort-loop": sort_loop,
    "padded-bmm": padded_bmm,
    "transformers-eager": transformers_experts("eager"),
    "transformers-grouped_mm": transformers_experts("grouped_mm"),
    "transformers-sonicmoe": transformers_experts("sonicmoe"),
    "torchtitan": torchtitan_experts,
    "scattermoe": scattermoe,
}


def refusal(name: str, bench: Bench) -> str | None:
    """Why a peer is not part of a cell; None where it is."""
    package = name.partition("-")[0]
    if package in ("transformers", "torchtitan", "scattermoe") and find_spec(package) is None:
        return f"{package} is not installed"
    if name == "torchtitan" and bench.case.dtype == torch.float32:
        return "torchtitan's experts compute in bf16 only"
    if name in ("transformers-sonicmoe", "scattermoe") and bench.case.device != "cuda":
        return "runs on CUDA only"
    return None
