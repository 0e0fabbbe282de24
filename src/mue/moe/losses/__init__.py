"""Auxiliary losses: functions of a :class:`mue.moe.Routing`, each known by a name, all without a coefficient.

    @AUXILIARY_LOSSES.register("mine")     # mue.shapes.losses; then losses = { mine = 1e-3 } of any router
    def mine(routing): ...                 # a scalar

Not here: which of them a run has and how much of each. That is a setting of its routers, carried by the plan.
"""

from mue.moe.losses.balance import balance_bias_step, load_balance_loss
from mue.moe.losses.consistency import consistency_loss
from mue.moe.losses.sharpness import router_z_loss

__all__ = ["balance_bias_step", "consistency_loss", "load_balance_loss", "router_z_loss"]
