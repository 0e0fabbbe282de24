"""The lab's language model once more, in flax (nnx): the same forward pass written by hand, with the names of the optax export.

It has no multipliers but the attention scale, as a user's model has none.

Shape suffixes: B sequences, T tokens, D width, H heads, K key/value heads, E head size, N experts, F inner width.
"""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax import numpy as jnp
from torch import nn

from mue.lab.models.layers import EPS, ROPE_BASE
from mue.shapes import Block, Transformer


class Kernel(nnx.Module):
    """x · kernel (in, out)."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        self.kernel = nnx.Param(jnp.zeros((fan_in, fan_out)))

    def __call__(self, x: Array) -> Array:
        return x @ self.kernel[...]


class Norm(nnx.Module):
    """x / rms(x) · scale."""

    def __init__(self, width: int) -> None:
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Array) -> Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * self.scale[...]


class Attention(nnx.Module):
    """Causal attention with QK-norm and RoPE on neighbouring pairs."""

    def __init__(self, shape: Transformer, scale: float) -> None:
        D, E, heads, kv = shape.width, shape.head_dim, shape.num_heads, shape.num_kv_heads
        self.head_dim, self.scale = E, scale
        self.q, self.k, self.v = Kernel(D, heads * E), Kernel(D, kv * E), Kernel(D, kv * E)
        self.o = Kernel(heads * E, D)
        self.q_norm, self.k_norm = Norm(E), Norm(E)

    def __call__(self, x_BTD: Array) -> Array:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BTHE, k_BTKE = (
            _rotated(norm(project(x_BTD).reshape(heads)))
            for project, norm in ((self.q, self.q_norm), (self.k, self.k_norm))
        )
        v_BTKE = self.v(x_BTD).reshape(heads)
        many = q_BTHE.shape[2] // k_BTKE.shape[2]
        k_BTHE, v_BTHE = jnp.repeat(k_BTKE, many, 2), jnp.repeat(v_BTKE, many, 2)
        logits = jnp.einsum("bthe,bshe->bhts", q_BTHE, k_BTHE) * self.scale
        past = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(past, logits, -jnp.inf), -1)
        return self.o(jnp.einsum("bhts,bshe->bthe", weights, v_BTHE).reshape(*x_BTD.shape[:2], -1))


def _rotated(x_BTHE: Array) -> Array:
    """RoPE; the angles' table is rounded to float32, as the lab's is."""
    length, size = x_BTHE.shape[1], x_BTHE.shape[-1]
    angle = np.arange(length)[:, None] * ROPE_BASE ** -(np.arange(0, size, 2) / size)
    cos, sin = (f(angle).astype(np.float32).astype(np.float64)[:, None] for f in (np.cos, np.sin))
    a, b = x_BTHE[..., ::2], x_BTHE[..., 1::2]
    return jnp.stack((a * cos - b * sin, a * sin + b * cos), -1).reshape(x_BTHE.shape)


class FeedForward(nnx.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden: int) -> None:
        self.up, self.gate, self.down = Kernel(width, hidden), Kernel(width, hidden), Kernel(hidden, width)

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class MoE(nnx.Module):
    """Σ πᵢEᵢ(x) + S(x); every expert computes every token, and gates are zero where it is not chosen."""

    def __init__(self, width: int, block: Block) -> None:
        N, F, S = block.experts, block.expert or 0, block.shared_width if block.shared_experts else 0
        self.active, self.sigmoid = block.active, block.router == "sigmoid"
        self.router = Kernel(width, N)
        self.experts_up, self.experts_gate = (nnx.Param(jnp.zeros((N, width, F))) for _ in range(2))
        self.experts_down = nnx.Param(jnp.zeros((N, F, width)))
        if S:
            self.shared_up, self.shared_gate = (nnx.Param(jnp.zeros((width, S))) for _ in range(2))
            self.shared_down = nnx.Param(jnp.zeros((S, width)))
        self.shared = S

    def __call__(self, x_BTD: Array) -> Array:
        logits = self.router(x_BTD)
        scores = jax.nn.sigmoid(logits) if self.sigmoid else jax.nn.softmax(logits, -1)
        chosen = jax.lax.top_k(scores, self.active)[1]
        mine = jnp.sum(jax.nn.one_hot(chosen, scores.shape[-1], dtype=scores.dtype), -2)
        gates = scores * mine / jnp.sum(scores * mine, -1, keepdims=True)
        each = _swiglu(x_BTD, self.experts_gate[...], self.experts_up[...], self.experts_down[...])
        y = jnp.einsum("btn,btnd->btd", gates, each)
        if self.shared:
            kernels = (w[...][None] for w in (self.shared_gate, self.shared_up, self.shared_down))
            y = y + _swiglu(x_BTD, *kernels)[:, :, 0]
        return y


def _swiglu(x_BTD: Array, gate_NDF: Array, up_NDF: Array, down_NFD: Array) -> Array:
    hidden = jax.nn.silu(jnp.einsum("btd,ndf->btnf", x_BTD, gate_NDF)) * jnp.einsum("btd,ndf->btnf", x_BTD, up_NDF)
    return jnp.einsum("btnf,nfd->btnd", hidden, down_NFD)


class TwinBlock(nnx.Module):
    """x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(self, shape: Transformer, block: Block, scale: float) -> None:
        self.attention_norm, self.ffn_norm = Norm(shape.width), Norm(shape.width)
        self.attention = Attention(shape, scale)
        if block.ffn:
            self.ffn = FeedForward(shape.width, block.ffn)
        else:
            self.moe = MoE(shape.width, block)
        self.dense = bool(block.ffn)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.attention_norm(x))
        return x + (self.ffn if self.dense else self.moe)(self.ffn_norm(x))


class Embedding(nnx.Module):
    """Rows of the table."""

    def __init__(self, vocab: int, width: int) -> None:
        self.embedding = nnx.Param(jnp.zeros((vocab, width)))


class Twin(nnx.Module):
    """``LanguageModel(shape)`` in flax; gated, and with routers that choose the best by one matrix's scores.

    Args:
        scale: of the attention's logits.
    """

    def __init__(self, shape: Transformer, scale: float) -> None:
        self.embedding = Embedding(shape.vocab, shape.width)
        self.blocks = nnx.List(TwinBlock(shape, block, scale) for block in shape.per_layer)
        self.final_norm = Norm(shape.width)
        self.tied = shape.tied
        if not shape.tied:
            self.head = Kernel(shape.width, shape.vocab)

    def __call__(self, tokens_BT: Array) -> Array:
        x = self.embedding.embedding[...][tokens_BT]
        for block in self.blocks:
            x = block(x)
        x = self.final_norm(x)
        return x @ self.embedding.embedding[...].T if self.tied else self.head(x)

    def loss(self, tokens_BT: Array, targets_BT: Array) -> Array:
        """Mean cross-entropy in nats."""
        logp = jax.nn.log_softmax(self(tokens_BT), -1)
        return -jnp.mean(jnp.take_along_axis(logp, targets_BT[..., None], -1))


def carried(model: nn.Module, coefficients: dict[str, float] | None = None) -> dict[str, np.ndarray]:
    """The weights of the lab's model by the twin's paths, in its orientation; ``coefficients``: times c, by torch's name."""
    found = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy() * (coefficients or {}).get(name, 1.0)
        path = name.replace(".", "/")
        if value.ndim == 1:
            path = path.removesuffix("weight") + "scale"
        elif path == "embedding/weight":
            path = "embedding/embedding"
        else:
            path, value = path.removesuffix("/weight"), np.swapaxes(value, -1, -2)
            path += "/kernel" if name.endswith(".weight") else ""
        found[path] = np.array(value)
    return found
