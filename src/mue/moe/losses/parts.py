"""What losses read of a routing.

Shape suffixes: T tokens, N experts.
"""

from __future__ import annotations

from torch import Tensor

from mue.moe.routing import Routing

PARTS = {
    "scores_TN": "the router's scores",
    "logits_TN": "the router's logits",
    "sequence": "how long sequences are",
}


def need(routing: Routing, part: str, loss: str) -> Tensor:
    """A part of a routing that not every router gives.

    Args:
        part: one of :data:`PARTS`. loss: whose need it is, for the message.

    Raises:
        ValueError: it is not there.
    """
    value = getattr(routing, part)
    if value is None:
        where = (
            "call the layer with x of shape (sequences, tokens, width)"
            if part == "sequence"
            else f"its forward has to set routing.{part}"
        )
        raise ValueError(
            f"the loss {loss} reads {PARTS[part]}, and this routing has none: {where}, or leave the loss out"
        )
    return value  # type: ignore[no-any-return]


def probabilities(routing: Routing, loss: str) -> Tensor:
    """(T, N) the scores of each token over their sum, for affinities need not sum to one (as 2412.19437, eq. 19, has it).

    Args:
        loss: see :func:`need`.
    """
    need(routing, "scores_TN", loss)
    return routing.prob_TN
