"""Is the attention scale the planned one? The softmax's own input, where a token meets itself and rotations cancel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mue.checks.branches import fit_ratio
from mue.checks.context import Context
from mue.checks.readings import EPSILONS
from mue.checks.record import Product, Softmax
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, SKIP, UNMEASURED, WARN, Finding, several
from mue.layouts.layout import HasLayout, unwrap
from mue.layouts.observe.config import integers, text_config
from mue.layouts.transformers.stock import is_stock
from mue.model.stock import query_coefficients
from mue.util.text import number

NAME = "attention scale"


@check_of(NAME, place=8, needs=("roles", "values", "batch"))
def attention(ctx: Context) -> Iterator[Finding]:
    """Measured scale on q·k against plan.attention_scale, from the weights where they can be followed."""
    found: dict[tuple[float, str], list[str]] = {}
    read: set[int] = set()
    rotated = _rotated(ctx)
    own: dict[str, float] = {}
    yield from _ahead(ctx)
    yield from (heads := list(_heads(ctx)))
    for s in ctx.seen[0].softmaxes:
        query = next((p.info for p in s.products if p.info.role == "attention_q"), None)
        measured = None if query is None else _measured(ctx, s)
        if query is None or query.layer is None or measured is None:
            continue
        read.add(query.layer)
        expected = _expected(ctx, s.products)
        if rotated != 1 and abs(measured - expected * rotated) <= max(2e-2, ctx.tolerance) * expected * rotated:
            own[query.name] = expected
            continue
        # 2 %: q·k is made again with an epsilon of our own in the norms, and the scales that get confused (1/√E, 1/E,
        # 1, twice) lie factors apart
        if not abs(measured - expected) <= max(2e-2, ctx.tolerance) * expected:
            found.setdefault((expected, number(measured)), []).append(query.name)
    for (expected, measured_text), names in found.items():
        yield Finding(
            NAME,
            FAIL,
            several(names),
            f"q·k times {number(expected)}",
            f"times {measured_text}",
            _causes(ctx, float(measured_text), expected),
            "pass scale=plan.attention_scale to scaled_dot_product_attention, and scale nowhere else",
            len(names),
        )
    if own:
        yield Finding(
            NAME,
            WARN,
            several(own),
            f"q·k times {number(next(iter(own.values())))}",
            f"times {number(rotated)} as well, by which the family's own rotations multiply it",
            ("positions that stretch the context (YaRN) make attention sharper",),
            "tune the base with the same positions, or set attention_factor = 1 in the config's rope parameters",
        )
    queries = {p.layer: p.name for p in reversed(ctx.placed) if p.role == "attention_q" and p.layer is not None}
    for layer in sorted(set(queries) - read):
        yield Finding(NAME, UNMEASURED, queries[layer], "a softmax over q·k", "none was recognised, or its scale not")
    if read and not found and not heads and len(read) > len(own):
        yield Finding(NAME, PASS, measured=f"{len(read)} attentions", count=len(read))
    elif not queries:
        yield Finding(NAME, SKIP, measured="no queries")


def _heads(ctx: Context) -> Iterator[Finding]:
    """Another number of heads than planned: no shape of a parameter shows it, and the scale is of the planned head size."""
    planned = ctx.plan.target.num_heads
    others: dict[int, list[str]] = {}
    for s in ctx.seen[0].softmaxes:
        seen = (
            s.q if s.q is not None else s.logits
        )  # (B, H, T, …); with other dimensions it is not known where the heads are
        query = next((p.info for p in s.products if p.info.role == "attention_q"), None)
        if query is not None and query.layer is not None and seen is not None and seen.dim() == 4:
            others.setdefault(seen.shape[1], []).append(query.name)
    for heads, names in others.items():
        if heads != planned:
            yield Finding(
                NAME,
                FAIL,
                several(dict.fromkeys(names)),
                f"{planned} heads of {ctx.plan.target.head_dim}",
                f"{heads} heads",
                ("the model was built with another head size", "head_dim or heads were not said in the target"),
                f"split into {planned} heads, or plan with heads={heads} and their head_dim",
                len(names),
            )


def _ahead(ctx: Context) -> Iterator[Finding]:
    """A warning where tokens see later ones: meant in an encoder, and a loss that means nothing in a decoder.

    Patches of an image all see each other, and a mask that hides some is a fault.
    """
    if ctx.plan.target.image is not None:
        yield from _hidden(ctx)
        return
    seen = [p.info for s in ctx.seen[0].softmaxes if s.later for p in s.products if p.info.role == "attention_q"]
    names = dict.fromkeys(p.name for p in seen if p.layer is not None)
    if names:
        yield Finding(
            NAME,
            WARN,
            several(names),
            "tokens see themselves and earlier ones",
            "the first token sees the last one",
            ("no causal mask (is_causal=True) was given",),
            "scaled_dot_product_attention(q, k, v, is_causal=True, ...), unless both directions are meant",
            len(names),
        )


def _hidden(ctx: Context) -> Iterator[Finding]:
    hidden = [p.info for s in ctx.seen[0].softmaxes if not s.later for p in s.products if p.info.role == "attention_q"]
    names = dict.fromkeys(p.name for p in hidden if p.layer is not None)
    if names:
        yield Finding(
            NAME,
            FAIL,
            several(names),
            "every patch of an image sees every other",
            "the first patch does not see the last one",
            ("a causal mask, as of a language model (is_causal=True)",),
            "scaled_dot_product_attention(q, k, v, is_causal=False, ...)",
            len(names),
        )


def _rotated(ctx: Context) -> float:
    """By what a stock family's own rotations multiply q·k; YaRN's stretch both of them by one number."""
    if isinstance(unwrap(ctx.model), HasLayout):
        return 1.0
    own = {getattr(m, "attention_scaling", 1.0) for m in unwrap(ctx.model).modules()} - {1.0}
    return float(own.pop()) ** 2 if len(own) == 1 else 1.0


def _causes(ctx: Context, measured: float, expected: float) -> tuple[str, ...]:
    E = ctx.plan.target.head_dim
    known = {
        "it is 1/√head_dim: the planned scale was not passed on": E**-0.5,
        "it is 1/head_dim: another convention than the plan's": 1 / E,
        "it is not applied at all": 1.0,
        "it is applied twice": expected**2,
    }
    hits = [text for text, value in known.items() if abs(measured - value) < 0.02 * value and value != expected]
    return (*hits, "q or k carry a scale of their own", "the model was built from another plan")


def _expected(ctx: Context, products: Iterable[Product]) -> float:
    """The scale on q·k as the weights stand; what a fold put into the queries is taken out again."""
    plan = ctx.plan
    inner = unwrap(ctx.model)
    if isinstance(inner, HasLayout):
        return plan.attention_scale
    if not is_stock(ctx.model):
        return plan.attention_scale
    size = integers(text_config(inner.config)).get("qk_head_dim", plan.target.head_dim)
    in_queries = query_coefficients(plan, ctx.model, ctx.placed)
    layers = {p.info.layer for p in products}
    c = next((in_queries[p.name] for p in ctx.placed if p.name in in_queries and p.layer in layers), 1.0)
    return plan.attention_scale * plan.target.head_dim / size / c


def _measured(ctx: Context, s: Softmax) -> float | None:
    """Scale by which the softmax's diagonal exceeds q·k from the weights; else by which it exceeds its own product."""
    diagonal = _diagonal(s)
    if diagonal is None:
        return s.scale
    c, residue = _ratio(ctx, s, diagonal)
    # else something between projection and softmax is not known here, and the kernel's own scale is all there is
    if residue < 0.02:
        return c
    if s.logits is None or s.scores is None:
        return s.scale
    product = s.scores.reshape(*diagonal.shape[:-1], *s.scores.shape[-2:]).diagonal(dim1=-2, dim2=-1)
    if s.scale is None:
        c, residue = fit_ratio(diagonal, product)
        return c if residue < 0.02 else None
    # positions were added to it (ALiBi): its own product against q·k from the weights, times the numbers that followed
    c, residue = _ratio(ctx, s, product)
    return c * s.scale if residue < 0.02 else s.scale


def _ratio(ctx: Context, s: Softmax, diagonal: Tensor) -> tuple[float, float]:
    """(c, residue) of a diagonal against q·k from the weights and norms, whose epsilon is not known."""
    latent = _latent(s, diagonal)
    owns = [_products(ctx, s, diagonal, eps) for eps in EPSILONS] if latent is None else [latent]
    return min((fit_ratio(diagonal, own) for own in owns if own is not None), key=lambda f: f[1], default=(0.0, 1.0))


def _diagonal(s: Softmax) -> Tensor | None:
    """(B, H, T): what the softmax sees where a token meets itself."""
    if s.logits is not None:
        logits = s.logits if s.logits.dim() == 4 else s.logits[None]
        return logits[..., : logits.shape[-2]].diagonal(dim1=-2, dim2=-1)
    assert s.q is not None and s.k is not None and s.scale is not None
    if s.q.dim() != 4 or s.q.shape[1] % s.k.shape[1]:
        return None
    # grouped queries: head h reads key h // (H/K), as in torch
    k = s.k.repeat_interleave(s.q.shape[1] // s.k.shape[1], 1)
    return (s.q * k).sum(-1) * s.scale


def _products(ctx: Context, s: Softmax, diagonal: Tensor, eps: float) -> Tensor | None:
    """(B, H, T) of q·k as the weights, and norms with this epsilon, give them; None where they cannot be followed."""
    B, H, T = diagonal.shape
    q, k = (_projected(ctx, s, part) for part in ("q", "k"))
    if q is None or k is None or q.numel() % (B * T * H) or k.numel() % (B * T):
        return None
    E = q.numel() // (B * T * H)
    if k.numel() % (B * T * E) or H % (k.numel() // (B * T * E)):
        return None
    layer = s.products[0].info.layer
    gains = [next(iter(_gains(ctx, layer, part)), None) for part in ("q", "k")]
    a, b = (
        _normed(x.reshape(B, T, -1, E).double(), g, eps).transpose(1, 2) for x, g in zip((q, k), gains, strict=True)
    )
    return (a * b.repeat_interleave(H // b.shape[1], 1)).sum(-1)


def _latent(s: Softmax, diagonal: Tensor) -> Tensor | None:
    """(B, H, T) of q·k of latent attention: keys of each head out of the latent, and a rotated part that all heads share."""
    B, H, T = diagonal.shape
    keys = [p for p in s.products if p.info.role == "attention_k" and p.info.layout.parts]
    queries = [p for p in s.products if p.info.role == "attention_q" and not p.info.layout.parts]
    if len(keys) != 2 or len(queries) != 1:
        return None
    narrow, wide = keys  # into the latent, and out of it
    if wide.given.shape[-1] > narrow.out.shape[-1]:
        narrow, wide = wide, narrow
    q = queries[0].out.reshape(B, T, H, -1).double()
    rotated = narrow.out.shape[-1] - wide.given.shape[-1]
    plain = q.shape[-1] - rotated
    if rotated <= 0 or plain <= 0 or wide.out.numel() % (B * T * H):
        return None
    k = wide.out.reshape(B, T, H, -1)[..., :plain].double()
    shared = narrow.out.reshape(B, T, 1, -1)[..., -rotated:].double()
    return ((q[..., :plain] * k).sum(-1) + (q[..., plain:] * shared).sum(-1)).transpose(1, 2)


def _projected(ctx: Context, s: Softmax, part: str) -> Tensor | None:
    own = [p for p in s.products if p.info.role == f"attention_{part}" and not p.info.layout.parts]
    if len(own) == 1:
        return own[0].out
    fused = [p for p in s.products if p.info.layout.parts == ("attention_q", "attention_k", "attention_v")]
    t = ctx.plan.target
    if len(fused) != 1 or own:
        return None
    sizes = [t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim, t.num_kv_heads * t.head_dim]
    out = fused[0].out
    return torch.split(out, sizes, -1)[0 if part == "q" else 1] if out.shape[-1] == sum(sizes) else None


def _gains(ctx: Context, layer: int | None, part: str) -> Iterator[Tensor]:
    for p in ctx.placed:
        if p.role == "qk_norm" and p.layer == layer and p.name.rsplit(".", 2)[-2].startswith(part):
            yield p.parameter.detach().double() + float(p.layout.start == 0)  # such code multiplies by 1 + w


def _normed(x_BTHE: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    if gain is None:
        return x_BTHE
    if gain.numel() != x_BTHE.shape[-1]:  # one norm over all heads
        flat = x_BTHE.flatten(2)
        return (_rms(flat, eps) * gain).view_as(x_BTHE)
    return _rms(x_BTHE, eps) * gain


def _rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
