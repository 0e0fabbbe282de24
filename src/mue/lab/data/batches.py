"""Batches in an order that is a pure function of (seed, step).

Shape suffixes: B sequences in a batch, T tokens in a sequence, W = T + 1 tokens in a window, N windows in an epoch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from mue.lab.data.corpus import Corpus
from mue.lab.data.encode import Tokens

if TYPE_CHECKING:
    import torch

Split = Literal["train", "validation"]


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of one split, in an order that is a pure function of (seed, step): nothing is remembered between calls.

    An epoch shifts the stream by a random offset, cuts it into N non-overlapping windows of T + 1 tokens and visits
    each once, in an order drawn for that epoch. The order comes from a keyed bijection on 0..N-1 (:func:`shuffled`),
    not from a stored permutation, so any step of any epoch costs the same. Windows cross document boundaries.

    Raises ValueError if the split is shorter than one window, or if a size is not positive.
    """

    corpus: Corpus
    split: Split
    sequence: int
    batch_sequences: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in ("train", "validation"):
            raise ValueError(f"split = {self.split!r} does not exist; it is 'train' or 'validation'")
        for name in ("sequence", "batch_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if len(self._stream) < self._window:
            raise ValueError(
                f"the {self.split} text has {len(self._stream)} tokens, shorter than one sequence of {self.sequence}"
                " + 1; use more text or a shorter sequence"
            )

    @property
    def _stream(self) -> Tokens:
        return self.corpus.train if self.split == "train" else self.corpus.validation

    @property
    def _window(self) -> int:
        return self.sequence + 1  # one token more: the targets are the inputs moved by one

    @property
    def windows(self) -> int:
        """N: windows in an epoch, the same whatever the epoch's offset."""
        return max(1, (len(self._stream) - self.sequence) // self._window)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_sequences * self.sequence

    def at(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of a step, at the same cost for any.

        Args:
            step: counted from 0.

        Returns:
            Inputs x_BT and targets y_BT, int64 on the CPU.

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"steps count from 0, so there is no step {step}")
        sample_B = np.arange(step * self.batch_sequences, (step + 1) * self.batch_sequences, dtype=np.int64)
        epoch_B, place_B = np.divmod(sample_B, self.windows)
        start_B = np.empty_like(sample_B)
        for epoch in np.unique(epoch_B):  # two where a batch straddles epochs, more only for a tiny text
            here = epoch_B == epoch
            order = round_keys("order", self.seed, int(epoch))
            # Shifted anew in each epoch: else windows would be cut at the same places for ever.
            slack = len(self._stream) - self.windows * self._window
            offset = int(round_keys("offset", self.seed, int(epoch))[0]) % (slack + 1)
            start_B[here] = offset + self._window * shuffled(place_B[here], self.windows, order)
        return self._gather(start_B)

    def fixed(self, n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """At most ``n`` batches spread evenly over the whole split, for evaluation: no seed, the same every time.

        Each batch spans the split, so that a prefix of the list is a fair sample too. There are fewer than ``n`` where
        the split holds fewer without overlap; there is always one.
        """
        if n < 1:
            raise ValueError(f"the number of batches must be at least 1, not {n}")
        n = min(n, max(1, len(self._stream) // (self._window * self.batch_sequences)))
        start_S = spread(self._stream, self._window, n * self.batch_sequences)
        return [self._gather(start_S[i::n]) for i in range(n)]

    def _gather(self, start_B: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        return windows_at(self._stream, start_B, self._window)


def spread(stream: Tokens, window: int, count: int) -> npt.NDArray[np.int64]:
    """Where ``count`` windows begin that lie evenly over a whole stream."""
    return np.linspace(0, len(stream) - window, count).astype(np.int64)


def windows_at(stream: Tokens, start_B: npt.NDArray[np.int64], window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs x_BT and targets y_BT, T = window - 1, of the windows that begin there."""
    import torch  # here, so that what only names a corpus starts without

    window_BW = stream[start_B[:, None] + np.arange(window)].astype(np.int64)
    tokens_BW = torch.from_numpy(window_BW)
    return tokens_BW[:, :-1].contiguous(), tokens_BW[:, 1:].contiguous()


# Four rounds make a permutation that looks random with ideal round functions (Luby & Rackoff, SIAM J. Comput. 17,
# 1988); ours are cheap mixers, so twice as many.
_ROUNDS = 8


def round_keys(purpose: str, seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    """Eight 64-bit keys from (purpose, seed, epoch): a hash, so the same with every numpy on every machine."""
    digest = hashlib.blake2b(f"{purpose} {seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def shuffled(place: npt.NDArray[np.int64], n: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Where a permutation of 0..n-1, drawn by ``keys``, sends each place: O(1) per place, no table.

    A Feistel network on the grid (left, right) of about sqrt(n) x sqrt(n): each round adds to one half a keyed hash
    of the other, which is invertible, so the whole is a bijection of the grid. The grid is a little larger than n;
    walking on from the places outside until one falls inside keeps a bijection (Black & Rogaway 2002, "cycle walking").
    """
    columns = max(1, int(np.ceil(np.sqrt(n))))
    rows = -(-n // columns)

    def network(index: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = np.divmod(index, np.uint64(columns))
        for i, key in enumerate(keys):
            if i % 2 == 0:
                left = (left + _mix(right, key) % np.uint64(rows)) % np.uint64(rows)
            else:
                right = (right + _mix(left, key) % np.uint64(columns)) % np.uint64(columns)
        return left * np.uint64(columns) + right

    out = network(place.astype(np.uint64))
    while (outside := out >= n).any():
        out[outside] = network(out[outside])
    return out.astype(np.int64)


def _mix(value: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea & Flood 2014) of value and key; wraps modulo 2^64 on purpose."""
    z = value * np.uint64(0x9E3779B97F4A7C15) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
