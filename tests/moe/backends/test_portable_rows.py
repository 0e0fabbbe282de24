"""The rows of the portable backend: which experts share a batch, what alignment wastes, how pairs are sorted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mue.moe.backends import portable_rows
from support.expert_cases import make_routing


def test_bf16_rows_come_in_buckets() -> None:
    """Every row count of a bf16 product is a multiple of 32 (each new row count costs a millisecond of set-up); one thread's float32 rows
    are not padded."""
    counts = torch.bincount(make_routing("topk", 100, 7, 2).expert_P).tolist()
    chunks, rows = portable_rows.layout(counts, 32, 1, 1, 100)
    assert [batch.rows for chunk in chunks for batch in chunk.batches for _ in range(batch.experts)] == rows
    assert all(row % 32 == 0 for row in rows)
    assert portable_rows.layout(counts, 1, 1, 1, 100)[1] == counts
    assert any(count % 32 for count in counts)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.one_of(st.integers(0, 5), st.integers(200, 230), st.integers(0, 3000)), min_size=1, max_size=70),
    parts=st.integers(1, 16),
    cost=st.sampled_from([1, 16384, 131072]),
    bf16=st.booleans(),
)
def test_batches_hold_every_expert_once_and_waste_little(counts: list[int], parts: int, cost: int, bf16: bool) -> None:
    alignment, parts = (32, 1) if bf16 else (parts, parts)
    chunks, rows = portable_rows.layout(counts, alignment, parts, cost, 2048)
    batches = [batch for chunk in chunks for batch in chunk.batches]
    held = [expert for batch in batches for expert in range(batch.first, batch.first + batch.experts)]
    assert held == [expert for expert, count in enumerate(counts) if count]
    assert [row == 0 for row in rows] == [count == 0 for count in counts]
    stop = 0
    for chunk in chunks:
        assert chunk.start == stop
        for batch in chunk.batches:
            assert chunk.start + batch.start == stop
            assert batch.parts == (parts if batch.experts == 1 else 1)
            assert batch.experts == 1 or batch.experts % parts == 0  # every thread has whole products
            real = sum(counts[batch.first : batch.first + batch.experts])
            size = batch.experts * batch.parts * batch.rows
            assert real <= size <= real + max(size // portable_rows.MOST_WASTE, alignment - 1)
            assert batch.rows % alignment == 0 or not bf16
            stop += size
        assert chunk.stop == stop
        assert stop - chunk.start <= 2048 or len(chunk.batches) == 1
    assert stop == sum(rows)


def test_nearly_equal_experts_share_a_batch() -> None:
    """Balanced loads do, skewed ones do not, and neither where the alignment rows cost more than a call."""

    def sizes(counts: list[int], cost: int) -> list[int]:
        chunks, _ = portable_rows.layout(counts, 2, 2, cost, 1 << 20)
        return [batch.experts for chunk in chunks for batch in chunk.batches]

    balanced = [500, 510, 505, 490, 520, 495, 515, 500]
    assert sizes(balanced, 128 * 128) == [8]
    assert sizes([1600, 1100, 800, 600], 128 * 128) == [1, 1, 1, 1]
    assert sizes(balanced, 4096 * 4096) == [1] * 8


@pytest.mark.parametrize(("number", "pairs"), [(7, 100), (7, 5000), (300, 5000), (1 << 15, 5000), (255, 40_000)])
def test_sorting_is_stable(number: int, pairs: int) -> None:
    """Also where small integers are sorted in place of large ones, padding pairs last."""
    expert_P = torch.randint(0, number + 1, (pairs,))
    order_P = portable_rows.sorted_pairs(expert_P, number)
    assert torch.equal(order_P, torch.argsort(expert_P, stable=True))
    assert not torch.equal(order_P, torch.argsort(expert_P.flip(0), stable=True))  # negative control
