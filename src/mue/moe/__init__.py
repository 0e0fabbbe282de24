"""Mixture-of-Experts: routing, routers, grouped expert compute and the layer made of them."""

from mue.moe.expert_weights import ExpertWeights
from mue.moe.experts import experts
from mue.moe.layer import MoELayer
from mue.moe.losses import balance_bias_step, load_balance_loss, router_z_loss
from mue.moe.routers.top_k import Router
from mue.moe.routing import Routing, gate_moments, routing_stats

__all__ = [
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
