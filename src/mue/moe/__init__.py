"""Mixture-of-Experts: what a router returns, routers, grouped expert compute, and the layer made of them.

Here: everything of a MoE block that is torch. Not here: what a plan or a check needs to know of a router
(``mue.shapes.routers``), the model around the layer (``mue.lab.models``), and C++ (``mue.kernels``).
"""

from mue.moe.expert_weights import ExpertWeights
from mue.moe.experts import experts
from mue.moe.layer import MoELayer
from mue.moe.losses import balance_bias_step, load_balance_loss, router_z_loss
from mue.moe.pool import ExpertPool
from mue.moe.routers.top_k import Router
from mue.moe.routing import Routing, gate_moments, routing_stats

__all__ = [
    "ExpertPool",
    "ExpertWeights",
    "MoELayer",
    "Router",
    "Routing",
    "balance_bias_step",
    "experts",
    "gate_moments",
    "load_balance_loss",
    "router_z_loss",
    "routing_stats",
]
