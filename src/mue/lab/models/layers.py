"""The layers of the lab's decoder as their formulas read. How each operator is computed is decided in ``mue.lab.models.ops``.

Every layer broadcasts over a leading axis of variants: with weights (variants, out, in) and tokens (variants, B, T) one call
computes as many models at once (``mue.lab.train.stacked_session``); without that axis it is an ordinary layer.

Shape suffixes: B sequences, T tokens of a sequence, D width, F inner width, H heads, K key/value heads, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mue.lab.models import ops
from mue.shapes import Transformer

EPS = 1e-6  # of every norm
ROPE_BASE = 10_000.0  # of the angles (2104.09864)


class RMSNorm(nn.Module):
    """x / rms(x) · gain over the last axis (1910.07467); with a ``rope`` table then RoPE."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        return ops.rms_norm(x, self.weight, EPS, rope)


class Linear(nn.Linear):
    """x · weightᵀ without a bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return ops.project(input, self.weight)


class Embedding(nn.Embedding):
    """Rows of the table."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.look_up(input, self.weight)


class PastTokens:
    """Keys and values of the tokens that one attention layer has seen: the next token is then computed alone.

    Of one model, not of stacked variants. A whole prompt comes first, then one token at a time.
    """

    def __init__(self) -> None:
        self.k_BKTE: Tensor | None = None
        self.v_BKTE: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.k_BKTE is None else self.k_BKTE.shape[2]

    def with_next(self, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far, these included, which are kept.

        Raises:
            ValueError: several tokens after others, which would see each other's future.
        """
        if self.k_BKTE is not None and self.v_BKTE is not None:
            if k_BKTE.shape[2] != 1:
                raise ValueError(f"{k_BKTE.shape[2]} tokens after {len(self)}: give one at a time, or begin anew")
            k_BKTE, v_BKTE = (torch.cat(x, 2) for x in ((self.k_BKTE, k_BKTE), (self.v_BKTE, v_BKTE)))
        self.k_BKTE, self.v_BKTE = k_BKTE, v_BKTE
        return k_BKTE, v_BKTE


class Attention(nn.Module):
    """o(softmax(scale · q kᵀ) v) with QK-norm (2302.05442): over the past with RoPE (2104.09864), or over all patches of an image.

    Args:
        shape: width, heads and head size; the longest sequence, or the image, whose patches have their place in the stream already.
        scale: of the logits; None: 1/√E.

    Raises:
        ValueError: an odd head size.
    """

    rope: Tensor | None

    def __init__(self, shape: Transformer, scale: float | None) -> None:
        super().__init__()
        E, D = shape.head_dim, shape.width
        self.causal = shape.image is None
        if E % 2 and self.causal:
            raise ValueError(f"head_dim {E} is odd: rotary positions need pairs, choose an even head_dim")
        self.head_dim, heads, kv_heads = E, shape.num_heads, shape.num_kv_heads
        self.scale = E**-0.5 if scale is None else scale
        self.q = Linear(D, heads * E)
        self.k = Linear(D, kv_heads * E)
        self.v = Linear(D, kv_heads * E)
        self.o = Linear(heads * E, D)
        self.q_norm, self.k_norm = RMSNorm(E), RMSNorm(E)
        # not in checkpoints: it follows from the shape
        self.register_buffer("rope", rotary_table(shape.sequence, E) if self.causal else None, persistent=False)

    def forward(self, x_BTD: Tensor, past: PastTokens | None = None) -> Tensor:
        first = 0 if past is None else len(past)
        rope = None if self.rope is None else self.rope[first : first + x_BTD.shape[-2]]
        heads = *x_BTD.shape[:-1], -1, self.head_dim
        q_BTHE, k_BTKE, v_BTKE = (p(x_BTD).view(heads) for p in (self.q, self.k, self.v))
        q_BTHE, k_BTKE = self.q_norm(q_BTHE, rope), self.k_norm(k_BTKE, rope)
        # Attention has no weights, so that variants are more sequences here.
        q, k, v = (x.flatten(0, -4).transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
        if past is not None:
            k, v = past.with_next(k, v)
        y = ops.attend(q, k, v, self.scale, self.causal)
        return self.o(y.transpose(1, 2).reshape(*x_BTD.shape[:-1], -1))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """A · down(silu(gate x) · up x) (SwiGLU, 2002.05202), or A · down(gelu(up x)) where not gated."""

    def __init__(self, width: int, hidden: int, gated: bool, output_multiplier: float) -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.gate = Linear(width, hidden) if gated else None
        self.down = Linear(hidden, width)
        self.output_multiplier = output_multiplier

    def forward(self, x: Tensor) -> Tensor:
        gate = None if self.gate is None else self.gate.weight
        return ops.scaled(ops.feed_forward(x, gate, self.up.weight, self.down.weight), self.output_multiplier)


def rotary_table(length: int, head_dim: int, base: float = ROPE_BASE) -> Tensor:
    """cos and sin of RoPE's angles (2104.09864, eq. 15) as (length, 1, head_dim/2, 2)."""
    # float64 up to the last step: of an angle of 10^4 float32 keeps three digits behind the point
    frequency = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()), -1).float()[:, None]
