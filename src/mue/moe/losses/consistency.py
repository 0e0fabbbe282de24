"""The loss of two passes over one batch: not a router's, but of a model whose routers draw.

Shape suffixes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def consistency_loss(logit_BTV: Tensor, other_BTV: Tensor) -> Tensor:
    """Mean over tokens of (KL(p‖q) + KL(q‖p)) / 2: how far two passes over one batch disagree (THOR, arXiv 2110.04260).

    Args:
        logit_BTV, other_BTV: (..., B, T, V) logits of p and of q. Both get gradients: each pass teaches the other.

    Returns:
        A scalar ≥ 0 in nats, in float32 or better, 0 where the two are equal; of stacked variants one each.
    """
    dtype = torch.promote_types(logit_BTV.dtype, torch.float32)
    log_p, log_q = (F.log_softmax(x.to(dtype), dim=-1) for x in (logit_BTV, other_BTV))
    # KL(p‖q) + KL(q‖p) = Σ (p - q)(log p - log q): the two entropies cancel.
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).flatten(-2).mean(-1)
