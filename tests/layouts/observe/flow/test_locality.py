"""Which of two projections is the query, where attention has no softmax: by changing one token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mue.layouts.propose import propose


class Linear(nn.Module):
    """Attention by running sums of k·v, as linear attention has it; the two projections may change places."""

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        self.table, self.swapped = nn.Embedding(64, 16), swapped
        self.one, self.other, self.third, self.back = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.head = nn.Linear(16, 64, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        q, k = (F.elu(p(x)) + 1 for p in ((self.other, self.one) if self.swapped else (self.one, self.other)))
        sums = torch.einsum("btk,btv->btkv", k, self.third(x)).cumsum(1)
        x = x + self.back(torch.einsum("btk,btkv->btv", q, sums))
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_query_acts_at_its_own_position(swapped: bool) -> None:
    found = {name: row for row in propose(Linear(swapped)).rows for name in row.names}
    names = ("other.weight", "one.weight") if swapped else ("one.weight", "other.weight")
    roles = [found[name].layout.role for name in (*names, "third.weight")]  # type: ignore[union-attr]
    assert roles == ["attention_q", "attention_k", "attention_v"]
    assert all(found[name].look for name in names)  # no softmax says so: a person has to look
