"""Group-limited routing: each token first keeps a few groups of experts, then takes the best experts of those (DeepSeek-V2,
2405.04434, section 2.2.2, there by devices; DeepSeek-V3, 2412.19437, section 2.1.2, there by nodes).

It limits how far a token travels; it balances nothing. (A share of every group for every token is `groups` of the two standard routers.)

Shape suffixes: T tokens, N experts, G groups, K active experts per token, M kept groups of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mue.moe.routers.base import RouterInput, router
from mue.moe.routers.ops import select_top
from mue.moe.routers.top_k import TopKRouter
from mue.shapes.settings import Setting

_BEST_OF = {"max": 1, "top2": 2}


def fits(active: int, experts: int, settings: Mapping[str, Any]) -> None:
    """Equal groups, of which enough are kept.

    Raises:
        ValueError: the groups do not divide the experts, more are kept than there are, or those kept are too small.
    """
    groups, kept = settings["n_group"], settings["topk_group"]
    if experts % groups:
        raise ValueError(
            f"n_group = {groups} of the group-limited router does not divide the {experts} experts into equal groups"
        )
    if kept > groups:
        raise ValueError(f"topk_group = {kept} of the group-limited router is more than n_group = {groups}")
    if active > kept * (experts // groups):
        raise ValueError(
            f"{active} active experts do not fit into topk_group = {kept} groups of {experts // groups} each: keep more groups, or"
            " have fewer of them (n_group)"
        )


@router(
    "group-limited",
    place=2.5,
    matrix=True,
    balance_bias=True,
    grouped=False,
    any_active=True,
    settings={
        "n_group": Setting(default=8, low=1, meaning="groups of consecutive experts (DeepSeek-V3: 8)"),
        "topk_group": Setting(default=4, low=1, meaning="groups that a token may use (DeepSeek-V3: 4)"),
        "group_score": Setting(
            default="top2",
            choices=tuple(_BEST_OF),
            meaning="what a group is chosen by: its best score (V2) or the sum of its two best (V3), the bias included",
        ),
        "score": Setting(
            default="sigmoid", choices=("sigmoid", "softmax"), meaning="of an expert: sigmoid (V3), softmax (V2)"
        ),
    },
    fits=fits,
)
class GroupLimitedRouter(TopKRouter):
    """The `topk_group` groups with the highest group scores, and of their experts the a with the highest scores.

    Groups and experts are chosen by score and balance bias; the weights are the scores without it, renormalised. (The factor that V3
    multiplies them by, 2.5, is the rule's R here.)
    """

    def select(self, choice_TN: Tensor, active: int, given: RouterInput | None) -> Tensor:
        """(T, active), by falling score."""
        kept, groups = self.options.settings["topk_group"], self.options.settings["n_group"]
        if kept == groups:
            return select_top(choice_TN, active)
        size = self.experts // groups
        best_of = min(_BEST_OF[self.options.settings["group_score"]], size)
        best_TGK = choice_TN.gather(1, select_top(choice_TN, best_of * groups, groups)).view(-1, groups, best_of)
        kept_TM = select_top(best_TGK.sum(2), kept)
        inside_TG = torch.zeros(len(choice_TN), groups, dtype=torch.bool, device=choice_TN.device).scatter_(
            1, kept_TM, True
        )
        # not 0 in place of -inf, as some code has it: biased scores may be negative
        limited_TN = choice_TN.view(-1, groups, size).masked_fill(~inside_TG[:, :, None], -torch.inf)
        return select_top(limited_TN.view_as(choice_TN), active)

    def _check_active(self, active: int) -> None:
        fits(active, self.experts, self.options.settings)
